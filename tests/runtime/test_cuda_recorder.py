"""Capturing on a GPU: the order of things on a CPU that plays one, and the real thing where there is a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peqa_runtime.engine import cuda_recorder
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.cuda_recorder import CudaRecorder
from peqa_runtime.engine.engine import Engine
from peqa_runtime.sampling_params import SamplingParams


class FakeCuda:
    """What `torch.cuda` is asked for, and the state that work finds when it runs."""

    def __init__(self) -> None:
        self.mode: int | str = 0
        self.streams = ["default"]
        self.capturing: dict[str, Any] | None = None
        self.replayed = 0
        self.CUDAGraph = lambda: SimpleNamespace(replay=self._replay)
        self.Stream = lambda device: SimpleNamespace(wait_stream=lambda _: None, synchronize=lambda: None)
        pools = itertools.count()
        self.graph_pool_handle = lambda: next(pools)
        self.pools: list[int] = []
        self.current_stream = lambda: self.streams[-1]
        self.fails = False
        self.get_sync_debug_mode = lambda: self.mode

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.mode = mode

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        self.streams.append("own")
        yield
        self.streams.pop()

    @contextmanager
    def graph(self, graph: object, **how: Any) -> Iterator[None]:
        self.capturing = how
        self.pools.append(how["pool"])
        self.streams.append("capturing")
        yield
        if self.fails:  # as torch's own: the stream is not put back
            raise RuntimeError("operation not permitted when stream is capturing")
        self.capturing = None
        self.streams.pop()

    def set_stream(self, stream: str) -> None:
        self.streams = [stream]

    def _replay(self) -> None:
        self.replayed += 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(cuda_recorder, "torch", SimpleNamespace(cuda=fake))
    return fake


def recorded(cuda: FakeCuda, seen: list[tuple[Any, ...]]) -> Callable[[], None]:
    return lambda: seen.append((cuda.streams[-1], cuda.mode, cuda.capturing is not None))


def test_work_is_compiled_and_proven_not_to_wait_before_it_is_captured(cuda: FakeCuda) -> None:
    seen: list[tuple[Any, ...]] = []
    replay = CudaRecorder(torch.device("cuda", 1)).capture(recorded(cuda, seen))
    assert seen == [("own", 0, False), ("own", "error", False), ("capturing", 0, True)]
    assert cuda.replayed == 0
    replay()
    replay()
    assert (cuda.replayed, len(seen)) == (2, 3)


def test_work_that_waits_is_never_captured(cuda: FakeCuda) -> None:
    def waits() -> None:
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    cuda.mode = 1
    with pytest.raises(RuntimeError, match="synchronizing"):
        CudaRecorder(torch.device("cuda")).capture(waits)
    assert cuda.mode == 1, "as it was"
    assert cuda.capturing is None


def test_graphs_share_a_pool_until_they_are_forgotten(cuda: FakeCuda) -> None:
    recorder = CudaRecorder(torch.device("cuda"))
    for forgets in (False, False, True):
        if forgets:
            recorder.forget()
        recorder.capture(lambda: None)
    assert cuda.pools == [0, 0, 1]


def test_a_capture_that_fails_leaves_the_stream_as_it_was(cuda: FakeCuda) -> None:
    cuda.fails = True
    with pytest.raises(RuntimeError, match="not permitted"):
        CudaRecorder(torch.device("cuda")).capture(lambda: None)
    assert cuda.current_stream() == "default"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_on_a_gpu_give_the_answers_of_eager_steps(tiny_base: Path, dtype: str) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.0, logprobs=0, ignore_eos=True)
    prompts = [f"the cat and {i} dogs" for i in range(11)]
    answers = []
    for eager in (True, False):
        config = EngineConfig(num_blocks=96, max_sequences=7, row_invariant=True, enforce_eager=eager)
        with Engine(tiny_base, device="cuda", dtype=dtype, config=config) as engine:
            answers.append(engine.generate(prompts, params))
            assert (engine.runner.graphs is None) is eager
    assert engine.runner.graphs is not None
    assert engine.runner.graphs.replays > 20
    assert answers[0] == answers[1]
