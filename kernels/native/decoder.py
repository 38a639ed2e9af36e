"""A whole decoder step as one call into the C library (decoder.c): tensors described once, pointers per step."""

from __future__ import annotations

import ctypes
import time
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from peqa_kernels.native.kv_layout import layout_of
from peqa_kernels.native.ops import NativeOps
from peqa_kernels.native.packed import PackedWeight
from peqa_kernels.paged_attention.checks import refuse_sequence
from peqa_kernels.quant_matmul.checks import check_range
from peqa_kernels.quant_matmul.weight import LinearBank, QuantizedWeight

KINDS = ("matmul", "attention", "elementwise", "head")
"""What a step's time is spent on, in the order of decoder.h."""

_NO_LIMIT = 1 << 31  # of rows of group scales that are not there
_CALIBRATION = 0.02  # seconds: the counter runs at a fixed rate, which nothing else tells


class _Linear(ctypes.Structure):
    """decoder_linear of decoder.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "bias", "out_scale", "in_scale", "group_scale")),
        ("half_bank", c_int64),
    )


class _Layer(ctypes.Structure):
    """decoder_layer of decoder.h."""

    _fields_ = (
        *((name, _Linear) for name in ("qkv", "out", "gate_up", "down")),
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm", "keys", "values")),
        *((name, c_int64) for name in ("key_block", "value_block", "window")),
    )


class _Embedding(ctypes.Structure):
    """decoder_embedding of decoder.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("floats", "codes", "scales", "zeros")),
        ("bits", c_int64),
        ("groups", c_int64),
    )


class _Decoder(ctypes.Structure):
    """peqa_decoder of decoder.h."""

    _fields_ = (
        ("embedding", _Embedding),
        ("layers", ctypes.POINTER(_Layer)),
        ("norm", c_void_p),
        ("head", _Linear),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        *((name, c_int64) for name in ("layer_count", "hidden", "intermediate")),
        *((name, c_int64) for name in ("heads", "kv_heads", "d", "block_size", "layout", "half_caches")),
        *((name, c_int64) for name in ("vocab", "positions", "blocks")),
        ("eps", c_float),
        ("scaling", c_float),
    )


class _Step(ctypes.Structure):
    """decoder_step of decoder.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("ids", "positions", "slots", "outputs")),
        *((name, c_void_p) for name in ("block_tables", "query_starts", "seq_lens")),
        *((name, c_void_p) for name in ("row", "group_row", "result", "ticks")),
        *((name, c_int64) for name in ("tokens", "sequences", "output_count", "table_stride")),
    )


@dataclass(frozen=True)
class DecoderLinear:
    """One matmul: its laid out weight, and its bias float32 [N]."""

    packed: PackedWeight
    bias: Tensor | None = None


@dataclass(frozen=True)
class DecoderLayer:
    """One layer: norm, q/k/v fused, attention, out, norm, gate/up fused, silu(gate) * up, down; both halves added."""

    qkv: DecoderLinear  # [(heads + 2 kv_heads) * d, hidden]
    out: DecoderLinear
    gate_up: DecoderLinear  # [2 intermediate, hidden]
    down: DecoderLinear
    attention_norm: Tensor  # float32 [hidden]
    mlp_norm: Tensor  # float32 [hidden]
    q_norm: Tensor | None = None  # float32 [d], of each query head before it is turned
    k_norm: Tensor | None = None
    window: int | None = None  # positions that a query sees, its own included; None = all

    @property
    def linears(self) -> tuple[DecoderLinear, ...]:
        """Its matmuls in the order in which `NativeDecoder.bind_bank` counts them."""
        return self.qkv, self.out, self.gate_up, self.down


@dataclass(frozen=True)
class DecoderSpec:
    """What a decoder computes. Every tensor is contiguous, float32 and on the CPU."""

    layers: tuple[DecoderLayer, ...]
    embedding: Tensor | QuantizedWeight  # [vocab, hidden]
    norm: Tensor  # [hidden]
    head: DecoderLinear | None  # None: a step gives the normed hidden states
    cosines: Tensor  # [positions, d / 2]
    sines: Tensor  # [positions, d / 2]
    heads: int
    kv_heads: int
    d: int
    eps: float
    scaling: float


class NativeDecoder:
    """A decoder that runs in the C library. One step at a time."""

    def __init__(self, ops: NativeOps, spec: DecoderSpec) -> None:
        """Describe `spec` to the library; its tensors stay alive with this object.

        Caches must be bound (`bind_caches`) before the first step.
        """
        self._ops = ops
        self._spec = spec
        self._decode = ops.function("peqa_decode", None, c_void_p, c_void_p, c_int64, c_void_p, c_void_p)
        self._misfit = ops.function("peqa_decode_misfit", c_int64, c_void_p, c_void_p)
        self._misplaced = ops.function(
            "peqa_attention_misfit", c_int64, c_void_p, c_int64, c_void_p, c_void_p, *(c_int64,) * 6
        )
        self._scratch_floats = ops.function(
            "peqa_decode_scratch", c_int64, c_void_p, c_int64, c_int64, c_int64
        )
        self._first_outside = ops.function("peqa_first_outside", c_int64, c_void_p, c_int64, c_int64)
        self._bank_rows: dict[tuple[int, int], tuple[int, int]] = {}
        self._limits = (0, 0)  # rows of the smallest bank, and of its group scales
        self._layers = (_Layer * len(spec.layers))(*(_layer_struct(layer) for layer in spec.layers))
        intermediate = spec.layers[0].down.packed.in_features
        for layer in spec.layers:
            assert layer.qkv.packed.out_features == (spec.heads + 2 * spec.kv_heads) * spec.d
            assert layer.gate_up.packed.out_features == 2 * intermediate
        self._decoder = _Decoder(
            embedding=_embedding_struct(spec.embedding),
            layers=self._layers,
            norm=spec.norm.data_ptr(),
            head=_linear_struct(spec.head) if spec.head else _Linear(),
            cosines=spec.cosines.data_ptr(),
            sines=spec.sines.data_ptr(),
            layer_count=len(spec.layers),
            hidden=len(spec.norm),
            intermediate=intermediate,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            d=spec.d,
            vocab=_rows(spec.embedding),
            positions=len(spec.cosines),
            eps=spec.eps,
            scaling=spec.scaling,
        )
        windows = [layer.window or 0 for layer in spec.layers]
        self._window = (
            max(windows) if all(windows) else 0
        )  # how far back some layer reads; 0: to the beginning
        self._address = ctypes.addressof(self._decoder)
        self._result_width = spec.head.packed.out_features if spec.head else len(spec.norm)
        self._ticks = (c_int64 * len(KINDS))()
        self._read_counter = ops.function("peqa_ticks", c_int64)
        self._step = _Step(ticks=ctypes.addressof(self._ticks))
        self._step_address = ctypes.addressof(self._step)

    def bind_caches(self, layer: int, key_cache: Tensor, value_cache: Tensor) -> None:
        """Use these caches from now on; they stay the caller's.

        [blocks, block_size, kv_heads, d], all layers' in the same layout of kv_layout.py and of the same dtype, float32
        or, where the library has `halves`, float16. Keys and values are rounded to it, see half_numbers.h.
        """
        layout = layout_of(key_cache, value_cache)
        assert layout is not None, (key_cache.stride(), value_cache.stride())
        for cache in (key_cache, value_cache):
            assert self._ops.reads_caches(cache.dtype), cache.dtype
            assert cache.dtype == key_cache.dtype, (cache.dtype, key_cache.dtype)
            assert cache.shape[2:] == (self._spec.kv_heads, self._spec.d), cache.shape
            assert cache.shape[:2] == key_cache.shape[:2], cache.shape
        self._layers[layer].keys = key_cache.data_ptr()
        self._layers[layer].values = value_cache.data_ptr()
        self._layers[layer].key_block = key_cache.stride(0)
        self._layers[layer].value_block = value_cache.stride(0)
        self._decoder.blocks, self._decoder.block_size = key_cache.shape[:2]
        self._decoder.layout = layout
        self._decoder.half_caches = key_cache.dtype == torch.float16

    def bind_bank(self, layer: int, linear: int, bank: LinearBank) -> None:
        """Use these scales for linear number `linear` of the layer where a step has rows; they stay the caller's."""
        struct = getattr(self._layers[layer], _Layer._fields_[linear][0])
        struct.half_bank = bank.out_scale.dtype == torch.float16
        assert self._ops.halves or not struct.half_bank
        for name in ("out_scale", "in_scale", "group_scale"):
            scales = getattr(bank, name)
            assert scales is None or (scales.dtype == bank.out_scale.dtype and scales.is_contiguous()), name
            setattr(struct, name, None if scales is None else scales.data_ptr())
        own = len(bank.out_scale) if bank.in_scale is None else min(len(bank.out_scale), len(bank.in_scale))
        self._bank_rows[layer, linear] = own, _NO_LIMIT if bank.group_scale is None else len(bank.group_scale)
        rows, group_rows = zip(*self._bank_rows.values(), strict=True)
        self._limits = min(rows), min(group_rows)

    def ticks(self) -> tuple[int, ...]:
        """What all steps so far spent on each of KINDS, in ticks of the processor's counter."""
        return tuple(self._ticks)

    def seconds_per_tick(self) -> float:
        """Measured for a moment; 0 where the processor has no counter to read."""
        started, before = time.perf_counter(), self._read_counter()
        time.sleep(_CALIBRATION)
        ticks = self._read_counter() - before
        return (time.perf_counter() - started) / ticks if ticks else 0.0

    def run(
        self,
        ids: Tensor,  # int64 [tokens]
        positions: Tensor,  # int64 [tokens]
        slots: Tensor,  # int64 [tokens], block * block_size + offset of each token in the caches; -1 = not written
        outputs: Tensor,  # int64 [R], tokens whose result is wanted; no token twice
        block_tables: Tensor,  # int32 [sequences, max_blocks]
        query_starts: Tensor,  # int32 [sequences + 1]
        seq_lens: Tensor,  # int32 [sequences]
        row: Tensor | None,  # int32 [tokens] or None: all base
        group_row: Tensor | None,  # int32 [tokens] or None
    ) -> Tensor:
        """Compute a step of packed tokens: float32 [R, vocab], or the normed hidden states [R, hidden] without a head.

        A row's bits depend on its sequence, its position and its scales, on nothing else in the step. Raises
        AttentionInputError when tables, lengths or query starts point outside of the caches, QuantMatmulInputError when
        a row is none of a bank's, before anything is done.
        """
        tokens, count, sequences = len(ids), len(outputs), len(seq_lens)
        whole = (ids, positions, slots, outputs)
        words = (block_tables, query_starts, seq_lens, row, group_row)
        if (
            count > tokens
            or any(len(each) != tokens for each in (positions, slots, row, group_row) if each is not None)
            or (sequences == 0 and tokens > 0)
            or not len(block_tables) == sequences == len(query_starts) - 1
            or any(each.dtype != torch.int64 or not each.is_contiguous() for each in whole)
            or any(each is not None and each.dtype != torch.int32 for each in words)
            or any(each is not None and not each.is_contiguous() for each in words[1:])
            or (block_tables.shape[1] > 1 and block_tables.stride(1) != 1)
        ):
            shapes = [None if each is None else (each.dtype, tuple(each.shape)) for each in (*whole, *words)]
            raise AssertionError(f"a step's tensors do not go together: {shapes}")
        for name, numbers, limit in zip(("row", "group_row"), (row, group_row), self._limits, strict=True):
            if numbers is not None and self._bank_rows:
                check_range(self._first_outside(numbers.data_ptr(), tokens, limit), name, numbers, limit)
        result = torch.empty((count, self._result_width))
        threads = torch.get_num_threads()
        step = self._step
        step.ids = ids.data_ptr()
        step.positions = positions.data_ptr()
        step.slots = slots.data_ptr()
        step.outputs = outputs.data_ptr()
        step.block_tables = block_tables.data_ptr()
        step.table_stride = block_tables.stride(0)
        step.query_starts = query_starts.data_ptr()
        step.seq_lens = seq_lens.data_ptr()
        step.row = None if row is None else row.data_ptr()
        step.group_row = None if group_row is None else group_row.data_ptr()
        step.result = result.data_ptr()
        step.tokens = tokens
        step.sequences = len(seq_lens)
        step.output_count = count
        self._check(step, block_tables.shape[1])
        floats = self._scratch_floats(self._address, threads, tokens, count)
        pool, scratch = self._ops.working_memory(threads, floats)
        self._decode(self._address, pool, threads, scratch, self._step_address)
        return result

    def _check(self, step: _Step, table_width: int) -> None:
        """Nothing points outside of its tensor: a microsecond, where a slip would be a write into foreign memory."""
        token = self._misfit(self._address, self._step_address)
        if token != -1:
            raise AssertionError(
                f"token {token} of {step.tokens} has an id, position or slot out of range, or a wanted token is none"
            )
        decoder = self._decoder
        sequence = self._misplaced(
            *(step.block_tables, step.table_stride, step.query_starts, step.seq_lens, step.sequences),
            *(table_width, decoder.block_size, decoder.blocks, step.tokens, self._window),
        )
        if sequence >= 0:
            refuse_sequence(sequence, step.tokens, decoder.blocks, table_width)


def _rows(embedding: Tensor | QuantizedWeight) -> int:
    return len(embedding) if isinstance(embedding, Tensor) else embedding.out_features


def _linear_struct(linear: DecoderLinear) -> _Linear:
    return _Linear(weight=linear.packed.pointer, bias=_address(linear.bias))


def _layer_struct(layer: DecoderLayer) -> _Layer:
    return _Layer(
        *(_linear_struct(linear) for linear in layer.linears),
        attention_norm=_address(layer.attention_norm),
        mlp_norm=_address(layer.mlp_norm),
        q_norm=_address(layer.q_norm),
        k_norm=_address(layer.k_norm),
        window=layer.window or 0,
    )


def _embedding_struct(embedding: Tensor | QuantizedWeight) -> _Embedding:
    if isinstance(embedding, Tensor):
        return _Embedding(floats=_address(embedding))
    assert embedding.qweight.is_contiguous()
    return _Embedding(
        codes=embedding.qweight.data_ptr(),
        scales=_address(embedding.scales),
        zeros=_address(embedding.zeros),
        bits=embedding.bits,
        groups=embedding.groups,
    )


def _address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.dtype == torch.float32, tensor.dtype
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu", tensor.device
    return tensor.data_ptr()
