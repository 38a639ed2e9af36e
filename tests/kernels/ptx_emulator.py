"""As much PTX as the unpacking of codes takes, on NumPy arrays: what a GPU does in many threads at once."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Words = NDArray[np.uint32]
DTYPES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}


def run(text: str, outputs: int, inputs: list[Words]) -> list[NDArray[np.uint16]]:
    """The 16-bit registers $0 .. $outputs - 1 after `text`, given the 32-bit ones that follow them.

    ValueError for an instruction, a type or an operand that is not known, or a register that was not written.
    """
    registers: dict[str, Any] = {f"${outputs + i}": words.astype(np.uint32) for i, words in enumerate(inputs)}
    body = re.fullmatch(r"\{ \.reg \.b32 ([a-z,]+);(.*)\}", text)
    if body is None:
        raise ValueError(f"no block with registers: {text}")
    names = body[1].split(",")
    for line in filter(None, map(str.strip, body[2].split(";"))):
        operation, _, operands = line.partition(" ")
        target, *sources = re.findall(r"\{[^}]*\}|[^,{}]+", operands)
        if operation == "mov.b32" and target.startswith("{"):
            low, high = target[1:-1].split(",")
            word = _value(sources[0], registers)
            registers[low], registers[high] = word.astype(np.uint16), (word >> 16).astype(np.uint16)
        elif target not in names:
            raise ValueError(f"{target} is no register: {line}")
        else:
            registers[target] = _result(operation, [_value(source, registers) for source in sources])
    return [registers[f"${i}"] for i in range(outputs)]


def _value(name: str, registers: dict[str, Any]) -> Words:
    if name[0].isdigit():
        return np.array([int(name, 0)], np.uint32)
    if name not in registers:
        raise ValueError(f"{name} is read before it is written")
    return registers[name]


def _result(operation: str, sources: list[Words]) -> Words:
    kind = operation.rpartition(".")[2]
    match operation, sources:
        case "mov.u32", [word]:
            return word
        case "shr.u32", [word, count]:
            return word >> count
        case "and.b32", [one, other]:
            return one & other
        case "or.b32", [one, other]:
            return one | other
        case "lop3.b32", [one, two, three, table]:
            return _chosen(one, two, three, int(table[0]))
        case ("add.rn.f16x2", [one, other]):
            return _fused(one, np.array([0x3C003C00], np.uint32), other, kind)
        case ("fma.rn.f16x2" | "fma.rn.bf16x2", [one, other, more]):
            return _fused(one, other, more, kind)
    raise ValueError(f"an instruction that is not known: {operation} with {len(sources)} operands")


def _chosen(one: Words, two: Words, three: Words, table: int) -> Words:
    """Any function of three bits: `table` holds its value at 4 one + 2 two + three."""
    result = np.zeros(np.broadcast(one, two, three).shape, np.uint32)
    for index in range(8):
        if table >> index & 1:
            terms = (
                word if index >> place & 1 else ~word for word, place in ((one, 2), (two, 1), (three, 0))
            )
            first, second, third = terms
            result |= first & second & third
    return result


def _fused(one: Words, other: Words, more: Words, kind: str) -> Words:
    """one * other + more in each half, rounded once: float64 holds what codes give exactly, which is checked."""
    result = np.zeros(np.broadcast(one, other, more).shape, np.uint32)
    for shift in (0, 16):
        a, b, c = (_floats(word >> shift, kind) for word in (one, other, more))
        product = a * b
        total = product + c
        assert np.array_equal(total - product, np.broadcast_to(c, total.shape))
        rounded = torch.from_numpy(total).to(DTYPES[kind])
        result |= rounded.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << shift
    return result


def _floats(words: Words, kind: str) -> NDArray[np.float64]:
    """What the low halves stand for."""
    halves = torch.from_numpy(words.astype(np.uint16).view(np.int16))
    return halves.view(DTYPES[kind]).double().numpy()
