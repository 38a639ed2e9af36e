"""The kernel threads: several callers at once, more threads than cores, and a forked child."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from peqa_kernels import native
from peqa_kernels.native import NativeOps, PackedWeight
from peqa_kernels.native.pool import Pool
from peqa_kernels.packing import pack_codes
from peqa_kernels.quant_matmul import QuantizedWeight


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ops() -> NativeOps:
    found = native.load()
    assert found is not None, "the C library is not built: python -m peqa_kernels.native.compile"
    return found


def a_weight() -> QuantizedWeight:
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (1024, 128), dtype=torch.uint8)
    return QuantizedWeight(pack_codes(codes, 4), torch.rand(1024, 4) + 0.1, torch.rand(1024, 4) * 15, 4, 128)


def multiply(ops: NativeOps, x: Tensor, packed: PackedWeight) -> Tensor:
    return ops.quant_matmul(x, packed, None, None, None, None, None, None)


@pytest.mark.usefixtures("four_threads")
def test_every_part_is_done_once_and_before_the_call_returns(ops: NativeOps) -> None:
    packed = ops.pack(a_weight())
    inputs = [torch.randn(1 + i % 7, 128) for i in range(50)]
    torch.set_num_threads(1)
    alone = [multiply(ops, x, packed) for x in inputs]
    torch.set_num_threads(4)
    for _ in range(40):
        for x, expected in zip(inputs, alone, strict=True):
            assert torch.equal(multiply(ops, x, packed), expected)


@pytest.mark.usefixtures("four_threads")
def test_callers_at_the_same_time_do_not_disturb_each_other(ops: NativeOps) -> None:
    packed = ops.pack(a_weight())
    inputs = [torch.randn(3, 128) for _ in range(6)]
    expected = [multiply(ops, x, packed) for x in inputs]

    def call(i: int) -> bool:
        torch.set_num_threads(4)  # OpenMP keeps it per thread
        return all(torch.equal(multiply(ops, inputs[i], packed), expected[i]) for _ in range(300))

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(call, range(6)))


@pytest.mark.usefixtures("four_threads")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own(ops: NativeOps) -> None:
    packed = ops.pack(a_weight())
    x = torch.randn(5, 128)
    expected = multiply(ops, x, packed)
    child = os.fork()
    if child == 0:
        same = all(torch.equal(multiply(ops, x, packed), expected) for _ in range(50))
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_while_threads_are_being_started_leaves_the_child_free_to_start_its_own() -> None:
    pool = Pool(lambda _: None)
    held, release = threading.Event(), threading.Event()

    def starts() -> None:
        with pool._lock:
            held.set()
            release.wait()

    other = threading.Thread(target=starts)
    other.start()
    held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends the child if it waits for a lock that nobody there will ever open
        pool.at_least(3)
        os._exit(0 if pool._helpers == 2 else 1)
    release.set()
    other.join()
    assert os.waitpid(child, 0)[1] == 0


def test_threads_that_cannot_be_started_are_tried_again_at_the_next_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool = Pool(lambda _: None)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", full)
        assert pool.at_least(3) == pool.address
        assert pool._helpers == 0
    pool.at_least(3)
    assert pool._helpers == 2
