"""A `peqa serve` process: started on a free port, watched through /proc and /metrics, ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from peqa_loadtest.client import LoadTestError

READY_SECONDS = 600.0  # a first start may fetch and import the demo model
END_SECONDS = 60.0
LOG_TAIL = 2000  # characters of the log that an error shows


class ServerProcess:
    """One server and its log. A context: whatever still runs at the end is killed."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        """`arguments`: of `peqa serve`, without the port. Nothing runs yet."""
        self._arguments = arguments
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.start_seconds = 0.0  # until /ready

    def __enter__(self) -> ServerProcess:
        """Start, and wait until it is ready. Raises LoadTestError with the end of its log if it fails."""
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "peqa_server.cli", "serve", *self._arguments, "--port", str(port)]
        self._log.parent.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while time.monotonic() < begin + READY_SECONDS:
            if self._process.poll() is not None:
                raise LoadTestError(f"the server ended while it started:\n{self._tail()}")
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    self.start_seconds = time.monotonic() - begin
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        self.__exit__()
        raise LoadTestError(f"the server was not ready after {READY_SECONDS:.0f} s:\n{self._tail()}")

    def __exit__(self, *_: object) -> None:
        """End it, politely at first."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def signal(self, number: int) -> None:
        """Send a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def exit_status(self, timeout: float) -> int | None:
        """Wait for the end; None when it still runs after `timeout` seconds."""
        assert self._process is not None
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def memory_mb(self) -> float:
        """Resident memory of the process and its children, in MB; shared pages count in each."""
        return sum(_resident_bytes(pid) for pid in self._tree()) / 1e6

    def open_files(self) -> int:
        """File handles of the process and its children."""
        return sum(_handles(pid) for pid in self._tree())

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels. Raises LoadTestError when there is none of that name."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name]
        if not values:
            raise LoadTestError(f"the server reports no metric {name}")
        return sum(values)

    def _tree(self) -> list[int]:
        assert self._process is not None
        parents = {int(folder.name): _parent(folder) for folder in Path("/proc").glob("[0-9]*")}
        tree = [self._process.pid]
        for pid in tree:  # grows while it is walked
            tree += [child for child, parent in parents.items() if parent == pid]
        return tree

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-LOG_TAIL:]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _parent(folder: Path) -> int:
    try:
        return int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0  # it has ended meanwhile


def _resident_bytes(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _handles(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0
