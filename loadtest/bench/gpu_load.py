"""One mixed-task load over HTTP on a GPU, where there is one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from peqa_loadtest.bench.figure import Figure, figure
from peqa_loadtest.bench.process import ServerProcess
from peqa_loadtest.bench.session import failures, gaps, open_session, rate
from peqa_loadtest.report import percentile

STREAMS = 32
REQUESTS = 4 * STREAMS


def gpu_is_there() -> bool:
    """Whether NVIDIA's own tool lists a GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    done = subprocess.run([tool, "-L"], capture_output=True, check=False)
    return done.returncode == 0 and bool(done.stdout.strip())


async def mixed_load(
    server: ServerProcess, tasks: list[str], files: list[Path], prompt_tokens: int, output_tokens: int
) -> list[Figure]:
    """Tasks mixed over STREAMS streams on a server that has just been started."""
    session = await open_session(server, prompt_tokens, output_tokens)
    await session.put_tasks(tasks, files)
    await session.load(tasks, STREAMS, STREAMS)  # warm-up
    answers = await session.load(tasks, STREAMS, REQUESTS)
    await session.close()
    facts = {
        "streams": STREAMS,
        "tasks": len(tasks),
        "inter_token_p50_ms": percentile(gaps(answers), 50) * 1e3,
    }
    return [
        figure("served/gpu/mixed-load/throughput", rate(answers), "tokens/s", ">=", None, **facts),
        figure("served/gpu/mixed-load/failed", failures(answers), "requests", "<=", 0, **facts),
    ]
