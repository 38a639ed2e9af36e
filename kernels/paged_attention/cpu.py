"""Paged attention in torch for the CPU, where a token's bits do not depend on what else runs in the call.

Queries are cut at absolute positions that are multiples of QUERY_TILE and keys at multiples of KEY_TILE, tiles always
have their full shape, and they are multiplied TILES_PER_STEP at a time. So every matmul of every call has the same
shape and a token always stands at the same place in it: neither its neighbours nor the way its prompt was cut into
chunks can change a bit. The price is arithmetic on padding (a decode step fills one row of eight).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peqa_kernels.paged_attention.checks import check_slots, check_tables
from peqa_kernels.paged_attention.reference import to_cache

# Chosen by time on two busy cores (9 heads, 3 of keys, d = 64) among query tiles of 4, 8, 16 and steps of 4, 8 tiles: a
# call of one token takes 1.4 ms, of 16 sequences 6 ms, a prompt of 512 tokens 31 ms; 16 rows waste most in decode, 4
# gather the same keys too often in prefill.
QUERY_TILE = 8
TILES_PER_STEP = 4
KEY_TILE = 128  # K and V of one tile and head: 64 KiB at d = 64 and fp32, which stays in the L2 cache


def paged_attention_cpu(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend from packed queries to each sequence's own blocks; arguments and result as `paged_attention`.

    Computes in float32 whatever the dtype of q and the caches. Raises AttentionInputError for block tables, lengths or
    query starts that point outside of the tensors.
    """
    check_tables(block_tables, query_starts, seq_lens, key_cache, q.shape[0], sliding_window)
    out = q.new_zeros(q.shape[0], q.shape[1], value_cache.shape[-1])
    tiles = _query_tiles(query_starts.tolist(), seq_lens.tolist())
    for first in range(0, len(tiles), TILES_PER_STEP):
        step = _Step.build(tiles[first : first + TILES_PER_STEP], sliding_window)
        part = _attend(
            step, q, key_cache, value_cache, block_tables, scaling, sliding_window, softcap, sinks
        )  # [TILES_PER_STEP, QUERY_TILE, heads, d_v]
        real = step.token >= 0
        out[step.token[real]] = part[real].to(out.dtype)
    return out


def write_kv_cpu(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Copy each token's key and value to its slot, rounded as `to_cache` does; in place; arguments as `write_kv`.

    Raises AttentionInputError for slots that the caches do not have.
    """
    check_slots(slot_mapping, key_cache)
    keep = slot_mapping >= 0
    if not bool(keep.all()):
        key, value, slot_mapping = key[keep], value[keep], slot_mapping[keep]
    place = slot_mapping // key_cache.shape[1], slot_mapping % key_cache.shape[1]
    key_cache.index_put_(place, to_cache(key, key_cache.dtype))
    value_cache.index_put_(place, to_cache(value, value_cache.dtype))


@dataclass(frozen=True)
class _QueryTile:
    """The queries of one sequence that stand in one aligned run of QUERY_TILE positions."""

    sequence: int  # row of block_tables
    start: int  # absolute position of the tile's first row, a multiple of QUERY_TILE
    first: int  # absolute position of the first row that holds a query of this call
    last: int  # ... and of the row behind the last one
    token: int  # index into q of the query at `first`
    length: int  # keys of the sequence


def _query_tiles(query_starts: list[int], seq_lens: list[int]) -> list[_QueryTile]:
    """Cut each sequence's new tokens at multiples of QUERY_TILE."""
    tiles = []
    for s, length in enumerate(seq_lens):
        position = length - (query_starts[s + 1] - query_starts[s])
        token = query_starts[s]
        while position < length:
            start = position - position % QUERY_TILE
            last = min(start + QUERY_TILE, length)
            tiles.append(_QueryTile(s, start, position, last, token, length))
            token += last - position
            position = last
    return tiles


@dataclass(frozen=True)
class _Step:
    """TILES_PER_STEP query tiles (the missing ones empty) as index tensors."""

    sequence: Tensor  # int64 [T]
    position: Tensor  # int64 [T, QUERY_TILE]; absolute position of each row
    token: Tensor  # int64 [T, QUERY_TILE]; index into q, -1 = padding
    key_from: Tensor  # int64 [T]; first position that any real row sees
    key_to: Tensor  # int64 [T]; position behind the last one that any real row sees, 0 = empty tile
    key_tiles: range  # key tiles that at least one query tile needs

    @staticmethod
    def build(tiles: list[_QueryTile], sliding_window: int | None) -> _Step:
        """Pad to TILES_PER_STEP and lay the index tensors out."""
        token = torch.full((TILES_PER_STEP, QUERY_TILE), -1)
        bounds = torch.zeros(TILES_PER_STEP, 4, dtype=torch.int64)
        for i, tile in enumerate(tiles):
            rows = torch.arange(tile.first - tile.start, tile.last - tile.start)
            token[i, rows] = torch.arange(tile.token, tile.token + len(rows))
            oldest = 0 if sliding_window is None else max(0, tile.first - sliding_window + 1)
            bounds[i] = torch.tensor([tile.sequence, tile.start, oldest, tile.last])
        sequence, start, key_from, key_to = bounds.unbind(1)
        lowest = int(key_from[: len(tiles)].min())
        return _Step(
            sequence=sequence,
            position=start[:, None] + torch.arange(QUERY_TILE),
            token=token,
            key_from=key_from,
            key_to=key_to,
            key_tiles=range(lowest // KEY_TILE, -(-int(key_to.max()) // KEY_TILE)),
        )


def _attend(
    step: _Step,
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One step's query tiles against all their key tiles: float32 [T, QUERY_TILE, heads, d_v]. Online softmax."""
    heads, kv_heads, d_v = q.shape[1], key_cache.shape[2], value_cache.shape[3]
    repeat = heads // kv_heads
    rows = QUERY_TILE * repeat
    queries = q[step.token.clamp(min=0)].float() * scaling  # [T, QUERY_TILE, heads, d]
    queries = queries.masked_fill((step.token < 0)[:, :, None, None], 0.0)  # a neighbour's NaN stays out
    queries = queries.unflatten(2, (kv_heads, repeat)).transpose(1, 2)  # [T, kv_heads, QUERY_TILE, repeat, d]
    queries = queries.reshape(TILES_PER_STEP * kv_heads, rows, -1)

    best, total = _start(sinks, kv_heads, repeat)  # [T, kv_heads, rows, 1], running maximum and denominator
    acc = torch.zeros(TILES_PER_STEP, kv_heads, rows, d_v)
    for tile in step.key_tiles:
        keys, values, seen = _gather(step, tile, key_cache, value_cache, block_tables, sliding_window)
        seen = seen[:, None, :, None, :].expand(-1, kv_heads, -1, repeat, -1).flatten(2, 3)
        score = torch.bmm(queries, keys.transpose(1, 2)).unflatten(0, (TILES_PER_STEP, kv_heads))
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        score = score.masked_fill(~seen, float("-inf"))  # [T, kv_heads, rows, KEY_TILE]
        live = seen.any(-1, keepdim=True)  # a row that sees nothing here keeps its bits
        new_best = torch.where(live, torch.maximum(best, score.amax(-1, keepdim=True)), best)
        shift = torch.where(live, new_best, 0.0)
        shrink = torch.where(live, torch.exp(best - shift), 1.0)
        weight = torch.exp(score - shift)
        part = torch.bmm(weight.flatten(0, 1), values).unflatten(0, (TILES_PER_STEP, kv_heads))
        acc = torch.where(live, acc * shrink + part, acc)
        total = torch.where(live, total * shrink + weight.sum(-1, keepdim=True), total)
        best = new_best
    out = acc / total  # padding rows: 0 / 0, never read
    return out.unflatten(2, (QUERY_TILE, repeat)).transpose(1, 2).reshape(-1, QUERY_TILE, heads, d_v)


def _start(sinks: Tensor | None, kv_heads: int, repeat: int) -> tuple[Tensor, Tensor]:
    """Running maximum and denominator before the first key: nothing, or each head's sink."""
    shape = (TILES_PER_STEP, kv_heads, QUERY_TILE * repeat, 1)
    if sinks is None:
        return torch.full(shape, float("-inf")), torch.zeros(shape)
    best = sinks.float().view(1, kv_heads, 1, repeat).expand(TILES_PER_STEP, -1, QUERY_TILE, -1)
    return best.reshape(shape), torch.ones(shape)


def _gather(
    step: _Step,
    tile: int,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    sliding_window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One key tile of each query tile's sequence.

    Returns keys [T * kv_heads, KEY_TILE, d] and values [T * kv_heads, KEY_TILE, d_v] in float32, and which row sees
    which key, bool [T, QUERY_TILE, KEY_TILE]. Positions that no row sees are zeros, not what the slot holds: a NaN
    there may be another sequence's, and 0 * NaN is NaN.
    """
    block_size = key_cache.shape[1]
    position = torch.arange(tile * KEY_TILE, (tile + 1) * KEY_TILE)
    owned = (position >= step.key_from[:, None]) & (position < step.key_to[:, None])  # [T, KEY_TILE]
    column = (position // block_size).clamp(max=block_tables.shape[1] - 1)
    block = block_tables[step.sequence[:, None], column].long()  # [T, KEY_TILE]
    place = torch.where(owned, block, 0).flatten(), (position % block_size).repeat(TILES_PER_STEP)
    hide = ~owned[:, :, None, None]

    def tiles_of(cache: Tensor) -> Tensor:
        found = cache[place].float().unflatten(0, (TILES_PER_STEP, KEY_TILE))
        return found.masked_fill_(hide, 0.0).transpose(1, 2).flatten(0, 1)

    seen = owned[:, None, :] & (position <= step.position[:, :, None])
    if sliding_window is not None:
        seen &= position > step.position[:, :, None] - sliding_window
    seen &= (step.token >= 0)[:, :, None]
    return tiles_of(key_cache), tiles_of(value_cache), seen
