"""The engine on a GPU: decode steps of a 7B-shaped base against their floor, and the CPU's answers on the demo's base.

Runs on any device, so that it can be proven with a small base where there is no GPU.
"""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from peqa_kernels.bench.machine import Machine
from peqa_kernels.bench.row import Row
from peqa_runtime.bench.decode_steps import decode_steps
from peqa_runtime.bench.random_base import LlamaShape, write_random_base
from peqa_runtime.bench.workload import Load, Prompts, engine_with_tasks, mixed
from peqa_runtime.core import Request
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.engine import Engine

SEQUENCES = (1, 8, 32, 64)
SHARES = {1: 0.6, 32: 0.7}  # of the floor, at least
RESIDENT = 1000
COMPARED = 16  # prompts whose answers the CPU and the GPU both give
EQUAL_SHARE = 1.0
PROMPT_STEPS = 8
MOST_FOR_EQUAL_BITS = 1.03
"""Times the plain step, of decodes and of prompts, for the mode to be worth its being on by default."""


def random_base_steps(
    tokenizer_of: Path, shape: LlamaShape, machine: Machine, load: Load, seed: int
) -> list[Row]:
    """Decode steps of a random base with room for RESIDENT tasks, `load.tasks` of them in use."""
    with TemporaryDirectory(prefix="peqa-random-base-") as folder:
        base = Path(folder) / "base"
        write_random_base(base, shape, tokenizer_of, seed)
        config = EngineConfig(task_rows=RESIDENT + 1, max_sequences=max(SEQUENCES))
        with engine_with_tasks(base, load.task_names, config, machine.device.type) as engine:
            rows = steps_against_floor(engine, machine, load, Prompts(shape.vocab, seed))
            whole = statistics.median(prompt_steps(engine, load, Prompts(shape.vocab, seed + 1)))
        del engine
        gc.collect()  # the device has no room for two
        config = replace(config, row_invariant=True)
        with engine_with_tasks(base, load.task_names, config, machine.device.type) as engine:
            plain = {
                row.facts["sequences"]: row.facts["time_us"] / 1e6 for row in rows if "sequences" in row.facts
            }
            costs = cost_of_equal_bits(engine, plain, load, Prompts(shape.vocab, seed))
            own = statistics.median(prompt_steps(engine, load, Prompts(shape.vocab, seed + 1)))
            return [*rows, *costs, cost_of_prompts(own, whole, config.max_batch_tokens)]


def steps_against_floor(engine: Engine, machine: Machine, load: Load, prompts: Prompts) -> list[Row]:
    """Floor over time of decode steps: bytes at the measured copy rate, or flops at the measured bf16 rate.

    Where the engine has CUDA graphs, the times are theirs, and each has a row that compares it with eager steps.
    """
    rows = []
    for count in SEQUENCES:
        seconds = statistics.median(decode_steps(engine, load, prompts, count))
        moved = _bytes(engine, count, min(count, load.tasks), load.prompt_tokens + load.output_tokens // 2)
        facts = machine.facts(seconds, moved, _flops(engine, count))
        facts |= {"sequences": count, "tasks": min(count, load.tasks), "tokens_per_s": count / seconds}
        name = f"engine/gpu/random-7b/{count}-sequences/of-floor"
        rows.append(Row(name, facts["of_floor"], "x", ">=", SHARES.get(count), facts))
        if engine.runner.graphs is not None:
            eager = statistics.median(eager_steps(engine, load, prompts, count))
            name = f"engine/gpu/random-7b/{count}-sequences/graph-against-eager"
            times = {"device": machine.name, "graph_us": seconds * 1e6, "eager_us": eager * 1e6}
            rows.append(Row(name, eager / seconds, "x", ">=", None, times))
    used = torch.cuda.memory_allocated() if machine.device.type == "cuda" else None
    return rows + memory_rows(engine, machine, used)


def memory_rows(engine: Engine, machine: Machine, used: int | None) -> list[Row]:
    """Gigabytes of what serving RESIDENT tasks takes, and of its parts, of `used` bytes (None: not known).

    The KV cache stands apart: it takes what is left of the device, however many tasks there are.
    """
    cache, bank = _cache_bytes(engine), _bank_bytes(engine)
    base = _linear_bytes(engine) if used is None else used - cache - bank
    parts = {"with-1000-tasks": base + bank, "base-and-workspaces": base, "bank": bank, "kv-cache": cache}
    facts = {"tasks": RESIDENT, "device": machine.name}
    return [
        Row(f"engine/gpu/random-7b/memory-{name}", size / 1e9, "GB", "<=", None, facts)
        for name, size in parts.items()
    ]


def eager_steps(engine: Engine, load: Load, prompts: Prompts, sequences: int) -> list[float]:
    """`decode_steps` as if the engine had no CUDA graphs."""
    graphs, engine.runner.graphs = engine.runner.graphs, None
    try:
        return decode_steps(engine, load, prompts, sequences)
    finally:
        engine.runner.graphs = graphs


def cost_of_equal_bits(engine: Engine, plain: dict[int, float], load: Load, prompts: Prompts) -> list[Row]:
    """Decode steps of an engine that is row-invariant over those of one that is not: `plain`, seconds by sequences."""
    rows = []
    for count, seconds in plain.items():
        own = statistics.median(decode_steps(engine, load, prompts, count))
        facts = {"time_us": own * 1e6, "plain_us": seconds * 1e6, "sequences": count}
        name = f"engine/gpu/random-7b/{count}-sequences/cost-of-equal-bits"
        rows.append(Row(name, own / seconds, "x", "<=", MOST_FOR_EQUAL_BITS, facts))
    return rows


def cost_of_prompts(own: float, plain: float, tokens: int) -> Row:
    """A step of `tokens` tokens of prompts, in seconds, of an engine that is row-invariant over one that is not."""
    facts = {"time_us": own * 1e6, "plain_us": plain * 1e6, "prompt_tokens": tokens}
    return Row(
        "engine/gpu/random-7b/prompts/cost-of-equal-bits", own / plain, "x", "<=", MOST_FOR_EQUAL_BITS, facts
    )


def prompt_steps(engine: Engine, load: Load, prompts: Prompts) -> list[float]:
    """Seconds of PROMPT_STEPS steps, each filled by one prompt; a first one, which may compile, is not counted."""
    seconds = []
    params = replace(load.params, max_tokens=1)
    tokens = min(engine.config.max_batch_tokens, engine.max_model_len - 1)
    for number in range(PROMPT_STEPS + 1):
        lease = engine.tasks.acquire(load.task_names[number % load.tasks])
        prompt = prompts.write(tokens)
        request = Request(f"prompt-{number}", prompt, params, lease.task, lease.revision, lease.kind)
        engine.add_request(request, lease)
        begin = time.perf_counter()
        while engine.has_work:
            engine.step()
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def answers_of_both(base: Path, device: str, load: Load, seed: int) -> Row:
    """How many greedy answers, in float32 on both sides, are the CPU's."""
    answers = []
    for where in ("cpu", device):
        with engine_with_tasks(base, load.task_names, EngineConfig(), where, dtype="float32") as engine:
            prompts = Prompts(engine.model.vocab_size, seed)
            work = [prompts.write(load.prompt_tokens) for _ in range(COMPARED)]
            done = engine.generate(work, load.params, task=mixed(load.task_names, COMPARED))
            answers.append([one.token_ids for one in done])
    equal = sum(one == other for one, other in zip(*answers, strict=True)) / COMPARED
    facts = {"prompts": COMPARED, "tokens": load.output_tokens}
    return Row("engine/gpu/answers-of-the-cpu", equal, "share", ">=", EQUAL_SHARE, facts)


def _linear_bytes(engine: Engine) -> int:
    """Codes, scales and zero points of one step, and the head."""
    total = 0
    for linear in engine.model.linears:
        weight = linear.module.weight_codes()
        total += weight.qweight.nbytes + weight.scales.nbytes
    return total + sum(tensor.nbytes for tensor in engine.model.model.get_output_embeddings().parameters())


def _bytes(engine: Engine, sequences: int, tasks: int, context: int) -> float:
    """Bytes that a decode step must read: weights, the tasks' output scales, keys and values."""
    outputs = sum(linear.out_features for linear in engine.model.linears)
    itemsize = engine.model.dtype.itemsize
    kv = sum(spec.kv_heads * (spec.d_k + spec.d_v) for spec in engine.model.kv_spec) * itemsize
    scales = engine.bank.dtype.itemsize * outputs * tasks
    return _linear_bytes(engine) + scales + kv * context * sequences


def _flops(engine: Engine, sequences: int) -> float:
    """2 M N K of every linear and the head."""
    weights = sum(linear.out_features * linear.in_features for linear in engine.model.linears)
    return 2.0 * sequences * (weights + engine.model.vocab_size * _hidden(engine))


def _hidden(engine: Engine) -> int:
    return int(engine.model.model.config.get_text_config().hidden_size)


def _bank_bytes(engine: Engine) -> int:
    tensors = [t for bank in engine.bank.banks for t in (bank.out_scale, bank.in_scale, bank.group_scale)]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _cache_bytes(engine: Engine) -> int:
    return sum(tensor.nbytes for caches in engine.kv_cache.layers for tensor in caches)
