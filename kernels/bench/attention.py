"""Paged attention: decode and prefill against their floors, against torch's attention over keys that lie side by side
and, where torch has one, over the same blocks, and what the mode with equal bits in both costs.

Runs on any device; the mode that it prices exists on a GPU only.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor

from peqa_kernels.bench.case import Case
from peqa_kernels.bench.machine import Machine, rotation_bytes
from peqa_kernels.bench.row import Row
from peqa_kernels.bench.timing import Call, Timer, Way
from peqa_kernels.bench.weights import offered
from peqa_kernels.paged_attention import AttentionPlan, paged_attention

BLOCK_SIZE = 16
BF16 = 2  # bytes
FLASH_ATTENTION = {9: "FA3", 10: "FA4"}  # torch's names of packages by the GPU's generation


@dataclass(frozen=True)
class AttentionShape:
    """`sequences` of `keys` keys each, of which `new` are this step's tokens, and the layer's heads."""

    sequences: int
    new: int
    keys: int
    heads: int = 32
    kv_heads: int = 8
    d: int = 128

    @property
    def name(self) -> str:
        """For row names."""
        kind = "decode" if self.new == 1 else f"prefill-{self.new}-tokens"
        return f"{kind}/{self.heads}-{self.kv_heads}-heads/{self.sequences}-sequences-{self.keys}-keys"

    def moved_bytes(self) -> float:
        """Keys and values once, queries and outputs once."""
        cached = 2 * self.sequences * self.keys * self.kv_heads * self.d
        return BF16 * (cached + 2 * self.sequences * self.new * self.heads * self.d)

    def flops(self) -> float:
        """Two products over the keys that each new token sees."""
        seen = self.new * self.keys - self.new * (self.new - 1) / 2
        return 4.0 * self.sequences * seen * self.heads * self.d


SHAPES = (
    AttentionShape(1, 1, 8192),
    AttentionShape(32, 1, 2048),
    AttentionShape(32, 1, 2048, kv_heads=32),
    AttentionShape(1, 2048, 2048),
    AttentionShape(8, 256, 4096),
)


def cases(shapes: tuple[AttentionShape, ...], span: int = 0) -> list[Case]:
    """A case per shape; `span` bytes of keys and values in turn, 0: what this machine's caches ask for."""
    return [Case(f"gpu attention {shape.name}", partial(_measure, shape, span)) for shape in shapes]


def _measure(shape: AttentionShape, span: int, machine: Machine, timer: Timer) -> list[Row]:
    """Rows without bars."""
    plain, invariant, side_by_side = calls(shape, machine.device, span or rotation_bytes(machine.device))
    ways = [Way("plain", plain), Way("invariant", invariant)]
    comparable = shape.new in (1, shape.keys)  # with cached keys torch's causal mask begins elsewhere
    if comparable:
        ways.append(Way("torch", side_by_side))
    with flash_attention_of(machine.device):
        if machine.device.type == "cuda":
            ways += offered("varlen_attn", partial(over_blocks, shape, plain))
        times = timer.compare(f"attention {shape.name}", *ways)
    own = times["plain"].median
    facts = {"rows": shape.sequences * shape.new, **machine.facts(own, shape.moved_bytes(), shape.flops())}
    name = f"gpu/attention/{shape.name}"
    rows = [
        Row(f"{name}/of-floor", facts["of_floor"], "x", ">=", None, facts),
        Row(f"{name}/cost-of-equal-bits", times["invariant"].median / own, "x", "<=", None, facts),
    ]
    if comparable:
        rows.append(_against(f"{name}/vs-torch-side-by-side", own, times["torch"].median, facts))
    if "varlen_attn" in times:
        rows.append(_against(f"{name}/vs-torch-varlen", own, times["varlen_attn"].median, facts))
    return rows


def _against(name: str, own: float, peer: float, facts: dict[str, Any]) -> Row:
    """How many times as fast as a peer; both in seconds."""
    return Row(name, peer / own, "x", ">=", None, {**facts, "peer_us": peer * 1e6})


def calls(
    shape: AttentionShape, device: torch.device, span: int
) -> tuple[list[Call], list[Call], list[Call]]:
    """The default mode, the invariant one, and torch over keys side by side: a call each per cache of the rotation."""
    blocks = -(-shape.keys // BLOCK_SIZE)
    size = (shape.sequences * blocks, BLOCK_SIZE, shape.kv_heads, shape.d)
    q = torch.randn(shape.sequences * shape.new, shape.heads, shape.d, device=device).bfloat16()
    starts = torch.arange(shape.sequences + 1, dtype=torch.int32, device=device) * shape.new
    lens = torch.full((shape.sequences,), shape.keys, dtype=torch.int32, device=device)
    plain = AttentionPlan(shape.new, shape.keys)
    invariant = AttentionPlan(shape.new, shape.keys, invariant=True)
    made: tuple[list[Call], list[Call], list[Call]] = ([], [], [])
    for _ in range(max(1, -(-span // (2 * BF16 * torch.Size(size).numel())))):
        keys, values = (torch.randn(size, device=device).bfloat16() for _ in range(2))
        table = torch.randperm(size[0], device=device).int().view(shape.sequences, blocks)
        paged = partial(paged_attention, q, keys, values, table, starts, lens, scaling=shape.d**-0.5)
        made[0].append(partial(paged, plan=plain))
        made[1].append(partial(paged, plan=invariant))
        key, value = (
            cache.view(shape.sequences, -1, *size[2:])[:, : shape.keys].transpose(1, 2)
            for cache in (keys, values)
        )
        queries = q.view(shape.sequences, shape.new, shape.heads, shape.d).transpose(1, 2)
        made[2].append(partial(_side_by_side, queries, key, value))
    return made


def _side_by_side(q: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's attention: causal where all keys are new, over all of them where one token is."""
    return F.scaled_dot_product_attention(
        q, key, value, is_causal=q.shape[2] == key.shape[2], enable_gqa=True
    )


def paged_varlen() -> Callable[..., Any] | None:
    """torch's attention over packed queries and a block table; None where this torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "block_table" in inspect.signature(varlen_attn).parameters else None


def over_blocks(shape: AttentionShape, plain: list[Call]) -> list[Call]:
    """The calls of `plain` as torch's own, over the same blocks. NotImplementedError where this torch has none."""
    attend = paged_varlen()
    if attend is None:
        raise NotImplementedError(f"torch {torch.__version__} has no varlen_attn with a block table")
    made: list[Call] = []
    for call in plain:
        assert isinstance(call, partial)
        q, keys, values, table, starts, lens = call.args
        made.append(
            partial(
                attend,
                q,
                keys,
                values,
                starts,
                None,
                shape.new,
                shape.keys,
                scale=call.keywords["scaling"],
                window_size=(-1, 0),
                enable_gqa=True,
                seqused_k=lens,
                block_table=table,
            )
        )
    return made


@contextlib.contextmanager
def flash_attention_of(device: torch.device) -> Iterator[None]:
    """For a while torch's attention is the FlashAttention package of this GPU's generation, if that is installed.

    torch's own kernels take no block table; those of version 3 (Hopper) and 4 (Blackwell) do.
    """
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    with contextlib.ExitStack() as after:
        if major in FLASH_ATTENTION:
            with contextlib.suppress(AttributeError, ImportError, RuntimeError, ValueError):  # not installed
                torch.nn.attention.activate_flash_attention_impl(FLASH_ATTENTION[major])
                after.callback(torch.nn.attention.restore_flash_attention_impl)
        yield
