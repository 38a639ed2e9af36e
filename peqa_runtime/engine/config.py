"""Settings of an engine, checked once and never written to again."""

from __future__ import annotations

from dataclasses import dataclass

ACTIVATION_BITS = (16, 8)
KV_CACHE_DTYPES = ("auto", "float16", "float32")


@dataclass(frozen=True)
class EngineConfig:
    """How much an engine does at once. Values out of range raise `ValueError` (they come from the operator).

    `num_blocks` None: as many as the memory allows (see `kv_cache.fitting_blocks`). `max_model_len` None: what
    the model was trained for. `max_prompt_logprob_rows` bounds the rows of logits that prompt log-probabilities
    may ask of one step: 256 rows of a 50 000-token vocabulary are 50 MB, and log-softmax holds them twice.
    New requests are refused while one would wait longer than `max_wait` seconds, as far as can be foreseen, or while
    `max_waiting` requests, or requests with together `max_waiting_tokens` tokens in their prompts, wait.
    `host_cache_bytes`: scale sets kept in host memory beyond those in use. `prefix_cache`: requests share what is
    computed of equal beginnings. `row_invariant`: on a GPU, too, a request's bits do not depend on what else runs; on
    the CPU they never do. Its tiles are small ones for batches of any size, so prompts take longer. `enforce_eager`:
    on a GPU, capture no CUDA graphs; decode steps then wait for Python, the start takes seconds less.
    `activation_bits`: on a CPU, products round their inputs to so many bits per block of 128: 16, finer than bfloat16,
    or 8, which is quicker and costs some quality. Banks and tasks are the same. `kv_cache_dtype`: in what keys and
    values are kept. "auto": on a CPU float16 where the compiled kernels read it, half the bytes of the float32 that
    they are computed in; on a GPU, which takes nothing else, and for 16-bit activations, what the model computes in.
    """

    block_size: int = 16
    num_blocks: int | None = None
    max_batch_tokens: int = 512
    max_sequences: int = 64
    max_model_len: int | None = None
    task_rows: int = 64
    group_rows: int = 4
    host_cache_bytes: int = 1 << 30
    max_wait: float = 20.0
    max_waiting: int = 1024
    max_waiting_tokens: int = 1 << 20
    max_prompt_logprob_rows: int = 256
    max_crashes: int = 3
    crash_window: float = 60.0
    prefix_cache: bool = True
    row_invariant: bool = False
    enforce_eager: bool = False
    activation_bits: int = 16
    kv_cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        """Every number is a count of at least one; rows include row 0, the base."""
        for name, value in vars(self).items():
            if value is not None and not isinstance(value, (bool, str)) and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        if self.activation_bits not in ACTIVATION_BITS:
            raise ValueError(f"activation_bits must be 16 or 8, got {self.activation_bits}")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ValueError(
                f"kv_cache_dtype must be {', '.join(KV_CACHE_DTYPES[:-1])} or {KV_CACHE_DTYPES[-1]}, "
                f"got {self.kv_cache_dtype!r}"
            )
