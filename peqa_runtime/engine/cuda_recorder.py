"""What captures a decode step on a GPU: torch's CUDA graphs, in one memory pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch


class CudaRecorder:
    """Captures on a stream of its own. All graphs share one pool, so only one may run at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder.capture`. RuntimeError when `run` waits for the device, which no graph can."""
        with torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            self._stream.wait_stream(before)
            with torch.cuda.stream(self._stream):
                run()  # compiles and loads kernels, and proves their tiles, which waits
                with _no_waiting():
                    run()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may use CUDA meanwhile; by default that would spoil the capture.
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    run()
            finally:
                torch.cuda.set_stream(before)  # a capture that fails leaves its own
        return partial(self._replay, graph)

    def forget(self) -> None:
        """See `Recorder.forget`."""
        self._pool = torch.cuda.graph_pool_handle()  # torch takes no pool twice whose graphs are gone

    def _replay(self, graph: torch.cuda.CUDAGraph) -> None:
        with torch.cuda.device(self._device):
            graph.replay()


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Make operations that wait for the device raise RuntimeError: sooner than in a capture, which they would break."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
