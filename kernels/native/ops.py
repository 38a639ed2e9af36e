"""The C library as Python calls: tensors in, tensors out, a few microseconds a call."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from peqa_kernels.native import huge_pages
from peqa_kernels.native.isa import Isa
from peqa_kernels.native.kv_layout import layout_of
from peqa_kernels.native.packed import PackedWeight
from peqa_kernels.native.pool import Pool
from peqa_kernels.quant_matmul.checks import check_panel, check_range, check_task_scales
from peqa_kernels.quant_matmul.weight import QuantizedWeight

ABI = 12  # peqa_abi() of the C sources; raised with every change of a signature or of a layout

EXPORTS = (
    "peqa_decode_misfit",
    "peqa_row_best",
    "peqa_column_dot",
    "peqa_attention_weights",
    "peqa_losses",
    "peqa_gate",
    "peqa_norm",
)  # of functions that are bound elsewhere: decoder.py, training.py, peqa_kernels.sampling


class StaleLibrary(Exception):
    """A library that was built from other sources than these."""


class NoRegisters(Exception):
    """The operating system does not let this process use the registers that a build needs."""


class _Scratch(threading.local):
    """Working memory of the calling thread; grows to the largest call and goes with the thread."""

    def __init__(self) -> None:
        self.tensor = torch.empty(0)
        self.pointer = 0
        self.floats = 0

    def at_least(self, floats: int) -> int:
        """Address of `floats` floats."""
        if floats > self.floats:
            self.tensor = huge_pages.zeros(4 * floats).view(torch.float32)
            self.pointer = self.tensor.data_ptr()
            self.floats = floats
        return self.pointer


class NativeOps:
    """The kernels of one build of the library. Safe to call from several threads."""

    def __init__(self, path: Path, isa: Isa) -> None:
        """Load the library at `path`.

        Raises OSError when it does not load, StaleLibrary when its ABI is another, NoRegisters when this process may
        not use what it needs.
        """
        self.isa = isa
        self._library = ctypes.CDLL(str(path))
        try:
            abi = self._library.peqa_abi
            abi.restype = c_int64
            found = abi()
        except AttributeError:
            found = -1
        if found != ABI:
            raise StaleLibrary(f"{path.name} has ABI {found}, these sources want {ABI}")
        missing = [name for name in EXPORTS if not hasattr(self._library, name)]
        if missing:
            raise StaleLibrary(f"{path.name} has no {missing[0]}: it was built before these sources")
        if self.function("peqa_ask_for_registers", c_int64)() != 0:
            raise NoRegisters(f"{path.name} needs registers that this system does not grant")
        serve = self._library.peqa_pool_serve
        serve.argtypes = (c_void_p,)
        serve.restype = None
        self._pool = Pool(serve)
        self._scratch = _Scratch()
        self._matmul_scratch = self._library.peqa_quant_matmul_scratch
        self._matmul_scratch.argtypes = (c_void_p, c_int64)
        self._matmul_scratch.restype = c_int64
        self._matmul = self._library.peqa_quant_matmul
        self._matmul.argtypes = (
            *(c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p),
            *(c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p),
        )
        self._matmul.restype = None
        self._tile_products = self.function(
            "peqa_tile_products", c_int64, c_void_p, c_void_p, c_int64, c_int64
        )
        self._first_outside = self.function("peqa_first_outside", c_int64, c_void_p, c_int64, c_int64)
        halves = self._library.peqa_halves
        halves.restype = c_int64
        self.halves = bool(halves())
        """Whether this build reads fp16: scales and offsets of weights, banks, and caches of keys and values."""
        self._attention_scratch = self._library.peqa_attention_scratch
        self._attention_scratch.argtypes = (c_int64,) * 5
        self._attention_scratch.restype = c_int64
        self._attention = self._library.peqa_paged_attention
        self._attention.argtypes = (
            *(c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p),
            *(c_int64,) * 3,
            *(c_void_p, c_int64, c_void_p, c_void_p),
            *(c_int64,) * 7,
            *(c_float, c_int64, c_float, c_void_p),
        )
        self._attention.restype = None
        self._attention_misfit = _symbol(self._library, path, "peqa_attention_misfit")
        self._attention_misfit.argtypes = (c_void_p, c_int64, c_void_p, c_void_p, *(c_int64,) * 6)
        self._attention_misfit.restype = c_int64
        self._dequantize = _symbol(self._library, path, "peqa_dequantize")
        self._dequantize.argtypes = (
            *(c_void_p, c_int64, c_void_p, c_int64),
            *(c_void_p,) * 6,
            *(c_int64,) * 9,
        )
        self._dequantize.restype = None

    def pack(self, weight: QuantizedWeight, segments: tuple[int, ...] | None = None) -> PackedWeight:
        """Lay a weight out for `quant_matmul`; `segments` are the output sizes of fused siblings."""
        return PackedWeight(weight, segments, halves=self.halves)

    def function(self, name: str, result: type | None, *arguments: type) -> Callable[..., Any]:
        """One more function of the library, with the ctypes of its result and its arguments."""
        found = getattr(self._library, name)
        found.restype, found.argtypes = result, arguments
        return cast(Callable[..., Any], found)

    def working_memory(self, threads: int, floats: int) -> tuple[int, int]:
        """Addresses of the pool with `threads` threads, and of `floats` floats of the calling thread's."""
        return self._pool.at_least(threads), self._scratch.at_least(floats)

    def quant_matmul(
        self,
        x: Tensor,  # float32 [M, K], rows may have a stride
        packed: PackedWeight,
        bias: Tensor | None,  # float32 [N]
        out_scale: Tensor | None,  # float32 or float16 [rows, N]
        in_scale: Tensor | None,  # the same [rows, segments, K]
        group_scale: Tensor | None,  # the same [group_rows, G, N]
        row: Tensor | None,  # int32 [M]
        group_row: Tensor | None,  # int32 [M]
    ) -> Tensor:
        """Multiply each row under its own task's scales: float32 [M, N].

        The scales are of one dtype, float16 only where `halves`. Where `row` is None, out_scale and in_scale are not
        read; where `group_row` is, group_scale is not. Banks, bias and row indices are contiguous. A row's bits depend
        on nothing but that row, its scales and this build. Raises QuantMatmulInputError for a row that a bank does not
        have.
        """
        rows = x.shape[0]
        y = torch.empty((rows, packed.out_features))
        if rows == 0:
            return y
        if bias is not None and bias.dtype != torch.float32:
            bias = bias.float()
        assert x.dtype == torch.float32, x.dtype
        assert x.stride(1) == 1, x.stride()
        n, k = packed.out_features, packed.in_features
        assert x.shape[1] == k, (x.shape, k)
        assert bias is None or (bias.shape == (n,) and bias.is_contiguous()), bias.shape
        for numbers in (row, group_row):
            assert numbers is None or (numbers.shape == (rows,) and numbers.is_contiguous()), numbers.shape
        assert row is None or row.dtype == torch.int32, row.dtype
        assert group_row is None or group_row.dtype == torch.int32, group_row.dtype
        dtype = None
        for bank in (out_scale, in_scale, group_scale):
            if bank is not None:
                assert bank.is_contiguous(), bank.stride()
                assert dtype is None or bank.dtype == dtype, bank.dtype
                dtype = bank.dtype
        assert dtype in (None, torch.float32, torch.float16), dtype
        half = dtype == torch.float16
        assert self.halves or not half, f"{self.isa.name} reads no fp16"
        if row is not None:
            if out_scale is not None:
                self._check_rows("row", row, out_scale)
            if in_scale is not None:
                self._check_rows("row", row, in_scale)
        if group_row is not None and group_scale is not None:
            self._check_rows("group_row", group_row, group_scale)
        threads = torch.get_num_threads()
        pointer = packed.pointer
        self._matmul(
            pointer,
            self._pool.at_least(threads),
            threads,
            self._scratch.at_least(self._matmul_scratch(pointer, rows)),
            x.data_ptr(),
            x.stride(0),
            rows,
            y.data_ptr(),
            None if bias is None else bias.data_ptr(),
            None if out_scale is None else out_scale.data_ptr(),
            None if in_scale is None else in_scale.data_ptr(),
            None if group_scale is None else group_scale.data_ptr(),
            half,
            None if row is None else row.data_ptr(),
            None if group_row is None else group_row.data_ptr(),
        )
        return y

    def tile_products(self, packed: PackedWeight, rounds: int) -> int:
        """Multiply one register tile of many rows by the first inputs of `packed`, `rounds` times on each thread.

        All of it lies in the first cache level. Returns how many products that were; 0 for a build with matrix tiles,
        which has no such tile.
        """
        threads = torch.get_num_threads()
        return int(self._tile_products(packed.pointer, self._pool.at_least(threads), threads, rounds))

    def _check_rows(self, name: str, row: Tensor, bank: Tensor) -> None:
        limit = bank.shape[0]
        check_range(self._first_outside(row.data_ptr(), row.shape[0], limit), name, row, limit)

    def reads_caches(self, dtype: torch.dtype) -> bool:
        """Whether this build attends over keys and values of that dtype."""
        return dtype == torch.float32 or (dtype == torch.float16 and self.halves)

    def paged_attention(
        self,
        q: Tensor,  # float32 [tokens, heads, d], strides free but for the last
        key_cache: Tensor,  # float32 or float16 [blocks, block_size, kv_heads, d], in a layout of kv_layout.py
        value_cache: Tensor,  # the same [blocks, block_size, kv_heads, d_v]
        block_tables: Tensor,  # int32 [seqs, max_blocks]
        query_starts: Tensor,  # int32 [seqs + 1]
        seq_lens: Tensor,  # int32 [seqs]
        scaling: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,  # [heads]
    ) -> Tensor:
        """Attend from packed queries to each sequence's own blocks: float32 [tokens, heads, d_v].

        Float16 caches only where `halves`; what they hold is taken exactly, and computed with in float32. A token's
        bits depend on its position, its sequence's keys and values and this build only. Raises
        AttentionInputError for block tables, lengths or query starts that point outside of the tensors.
        """
        tokens, heads, d = q.shape
        _, block_size, kv_heads, d_v = value_cache.shape
        out = torch.empty((tokens, heads, d_v))
        if q.stride(2) != 1:
            q = q.contiguous()
        if sinks is not None:
            sinks = sinks.float().contiguous()
        assert q.dtype == torch.float32, q.dtype
        assert self.reads_caches(key_cache.dtype), (self.isa.name, key_cache.dtype)
        assert value_cache.dtype == key_cache.dtype, (value_cache.dtype, key_cache.dtype)
        layout = layout_of(key_cache, value_cache)
        assert layout is not None, (key_cache.stride(), value_cache.stride())
        assert block_tables.stride(1) == 1, block_tables.stride()
        misfit = self._attention_misfit(
            block_tables.data_ptr(),
            block_tables.stride(0),
            query_starts.data_ptr(),
            seq_lens.data_ptr(),
            seq_lens.shape[0],
            block_tables.shape[1],
            block_size,
            key_cache.shape[0],
            tokens,
            sliding_window or 0,
        )
        if misfit >= 0:
            # Imported here, since that package imports this one.
            from peqa_kernels.paged_attention.checks import refuse_sequence

            refuse_sequence(misfit, tokens, key_cache.shape[0], block_tables.shape[1])
        threads = torch.get_num_threads()
        self._attention(
            self._pool.at_least(threads),
            threads,
            self._scratch.at_least(self._attention_scratch(threads, heads, kv_heads, d, d_v)),
            out.data_ptr(),
            q.data_ptr(),
            q.stride(0),
            q.stride(1),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            key_cache.stride(0),
            value_cache.stride(0),
            key_cache.dtype == torch.float16,
            block_tables.data_ptr(),
            block_tables.stride(0),
            query_starts.data_ptr(),
            seq_lens.data_ptr(),
            seq_lens.shape[0],
            heads,
            kv_heads,
            d,
            d_v,
            block_size,
            layout,
            scaling,
            sliding_window or 0,
            softcap or 0.0,
            None if sinks is None else sinks.data_ptr(),
        )
        return out

    def dequantize(
        self,
        weight: QuantizedWeight,
        panel: Tensor,  # float32 or bfloat16 [rows, columns], contiguous
        row: int,
        column: int,  # a multiple of 8
        out_scale: Tensor | None = None,  # float32 [N]
        in_scale: Tensor | None = None,  # float32 [K]
        group_scale: Tensor | None = None,  # float32 [G, N]
    ) -> None:
        """Fill `panel`, whose first element is weight element [row, column], with s0 * (q - z) under the scales.

        Raises QuantMatmulInputError for a panel that does not lie within the weight, and for scales of other shapes.
        """
        check_panel(weight, panel, row, column)
        check_task_scales(weight, panel.device, out_scale, in_scale, group_scale)
        tensors = (weight.qweight, weight.scales, weight.zeros, out_scale, in_scale, group_scale)
        held = tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)
        threads = torch.get_num_threads()
        self._dequantize(
            self._pool.at_least(threads),
            threads,
            panel.data_ptr(),
            panel.dtype == torch.bfloat16,
            *(None if tensor is None else tensor.data_ptr() for tensor in held),
            weight.bits,
            weight.qweight.shape[1],
            weight.out_features,
            weight.groups,
            weight.group_size,
            row,
            panel.shape[0],
            column,
            panel.shape[1],
        )


def _symbol(library: ctypes.CDLL, path: Path, name: str) -> Any:
    """A function of the library; StaleLibrary where an older one lacks it."""
    try:
        return library[name]
    except AttributeError:
        raise StaleLibrary(f"{path.name} has no {name}, which these sources want") from None
