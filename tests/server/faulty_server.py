"""`peqa serve` with faults built in: a program for subprocesses. A request asks for a fault by its first token.

    faulty_server.py BASE STORE PORT DRAIN_SECONDS

A forward that computes NAN gives NaN in that token's row of logits (it must be the whole prompt), and one that
computes RAISE raises. After it has
computed CRASH, or CRASHES, the next forward raises, or all do for ever, whatever they compute. SLOW makes every forward
after it take 30 ms, until FAST.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

from peqa_runtime.engine.async_engine import AsyncEngine
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.engine import Engine
from peqa_server.app import create_loading_app
from peqa_server.services import ServedModel, Services
from peqa_server.settings import ServerSettings
from peqa_server.start.run import listen, run

NAN, RAISE, CRASH, CRASHES, SLOW, FAST = range(290, 296)


def inject(model: Any) -> None:
    """Wrap the model's forward."""
    forward = model.forward
    state = {"crashes": 0.0, "seconds": 0.0}

    def faulty(context: Any, input_ids: Any, positions: Any, logits_at: Any) -> Any:
        ids = set(input_ids[positions == 0].tolist())  # the model may say these words, too
        time.sleep(state["seconds"])
        if RAISE in ids:
            raise RuntimeError("injected")
        if state["crashes"] and CRASH not in ids:
            # A crash is noticed by a second forward, the probe, which must raise too.
            state["crashes"] -= 0.5
            raise RuntimeError("injected crash")
        if CRASH in ids:
            state["crashes"] = 1.0
        if CRASHES in ids:
            state["crashes"] = float("inf")
        if SLOW in ids:
            state["seconds"] = 0.03
        if FAST in ids:
            state["seconds"] = 0.0
        logits = forward(context, input_ids, positions, logits_at)
        logits[(input_ids[logits_at] == NAN) & (positions[logits_at] == 0)] = float("nan")
        return logits

    model.forward = faulty


def load(base: str, store: str) -> Services:
    """A small engine whose model has the faults, and what a server needs besides."""
    config = EngineConfig(num_blocks=200, task_rows=4, max_sequences=8)
    engine = Engine(base, store, device="cpu", config=config)
    inject(engine.model)
    model = ServedModel(
        engine.model.manifest, engine.model.tokenizer, engine.max_model_len, engine.model.vocab_size
    )
    return Services(AsyncEngine(engine), engine.tasks, model, Path(store) / "unfinished")


def main(base: str, store: str, port: str, drain_seconds: str) -> int:
    """Serve until told to stop; the exit status."""
    logging.basicConfig(level="INFO", format="%(levelname)s %(name)s %(message)s")
    settings = ServerSettings(drain_seconds=float(drain_seconds))
    listener = listen("127.0.0.1", int(port))
    return run(create_loading_app(settings), listener, lambda: load(base, store), float(drain_seconds))


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
