"""The engine: `step` is schedule, run, update. One thread at a time; `AsyncEngine` gives it one of its own."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Collection
from collections.abc import Sequence as Items
from pathlib import Path
from typing import TYPE_CHECKING

from peqa_runtime.core import BASE_REVISION, BASE_TASK, Lease, Request, TokenOutput
from peqa_runtime.engine.allocation import attached_bank, bound_kv_cache
from peqa_runtime.engine.block_manager import BlockManager
from peqa_runtime.engine.canary import Canary
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.graph_setup import capture_graphs
from peqa_runtime.engine.guidance import Form, Guidance
from peqa_runtime.engine.model_runner import ModelRunner
from peqa_runtime.engine.prefix_cache import PrefixCache
from peqa_runtime.engine.readiness import make_ready
from peqa_runtime.engine.request_check import check_request
from peqa_runtime.engine.rescue import CrashLimit, Outcome, RowLost, run_step
from peqa_runtime.engine.sampler import Sampler
from peqa_runtime.engine.scheduler import Scheduler
from peqa_runtime.engine.sequence import Sequence
from peqa_runtime.engine.sources import open_model, open_tasks
from peqa_runtime.engine.tally import Tally
from peqa_runtime.errors import EngineDead, InvalidRequest
from peqa_runtime.sampling_params import SamplingParams
from peqa_runtime.scales.task_library import TaskLibrary

if TYPE_CHECKING:
    from peqa_runtime.engine.offline import Choice, Completion
    from peqa_runtime.model.loader import LoadedModel

logger = logging.getLogger(__name__)

REQUEST_FAILED = "this request could not be computed (others can); the server's log has the reason"
ENGINE_RESTARTED = (
    "the engine failed while it worked on this request and has restarted; send the request again"
)


class Engine:
    """Continuous batching of requests on one model. Tokens in, tokens out: it knows no text.

    It owns a lease of its own for every request it works on, from `add_request` until the request's last output.
    """

    def __init__(
        self,
        base: LoadedModel | Path | str,
        tasks: TaskLibrary | Path | str | None = None,
        config: EngineConfig | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
    ) -> None:
        """Load `base` and allocate KV cache and scale bank for it.

        base: a base folder (or a model that `load` gave, which then belongs to this engine). tasks: the folder of a
        scale store; None: no tasks but those that are uploaded or given as files, gone with `close`. device: "auto",
        "cpu" or "cuda"; dtype, of activations: "auto", "float32", "bfloat16" or "float16"; both for a folder only.
        Raises `InvalidCheckpoint`, `UnsupportedModel`, `StoreError`, and `ValueError` when the configuration does
        not fit the model, the memory or the registry's rows.
        """
        self.config = config = config or EngineConfig()
        self.model = model = open_model(base, device=device, dtype=dtype)
        self.tasks, self._own = open_tasks(tasks, model.manifest, config)
        self.max_model_len = min(config.max_model_len or model.max_model_len, model.max_model_len)
        counts = self.tasks.registry.counts()
        if (counts.rows + 1, counts.group_rows + 1) != (config.task_rows, config.group_rows):
            raise ValueError(
                f"the task registry has {counts.rows + 1} rows and {counts.group_rows + 1} group rows, the engine "
                f"{config.task_rows} and {config.group_rows}; give both the same numbers"
            )
        self.bank = attached_bank(model, config)
        self.kv_cache = bound_kv_cache(model, config, self.max_model_len)  # takes of what is left
        self.tasks.arrange = self.bank.arranged
        self.guidance = Guidance(model.tokenizer, model.vocab_size, model.eos_token_ids)
        self.scheduler = self._new_scheduler()
        self.runner = ModelRunner(
            model,
            self.bank,
            self.tasks.scale_set,
            Sampler(model.eos_token_ids, self.guidance),
            config.block_size,
            row_invariant=config.row_invariant,
        )
        self.canary = Canary(
            self.runner,
            self.bank,
            self.tasks.registry,
            self.tasks.scale_set,
            vocab_size=model.vocab_size,
            blocks=self.kv_cache.spare,
            max_sequences=config.max_sequences,
            max_batch_tokens=config.max_batch_tokens,
        )
        make_ready(model, config)
        self.runner.graphs = capture_graphs(
            self.runner, model, self.bank, self.kv_cache, config, self.max_model_len
        )
        self._leases: dict[
            str, Lease | None
        ] = {}  # of every request in work; None: the base, without a lease
        self._crashes = CrashLimit(config.max_crashes, config.crash_window)
        self._planning_crashed = False  # and no step has been computed since
        self._tally = Tally()

    @property
    def has_work(self) -> bool:
        """True while a request waits or runs."""
        return self.scheduler.has_work

    @property
    def step_tokens(self) -> int:
        """Tokens computed in steps so far."""
        return self._tally.step_tokens

    def check(self, request: Request) -> Form | None:
        """Raise `InvalidRequest` (or `PromptTooLong`) when the request can never be served. Thread-safe.

        The form of its answer is compiled here, unless it is known (see `Guidance.compile_carefully`), and returned.
        """
        blocks = self.scheduler.blocks
        check_request(request, self.model, min(self.max_model_len, blocks.num_blocks * blocks.block_size))
        structured = request.params.structured
        return None if structured is None else self.guidance.compile(structured)

    def pin(self, request: Request) -> Lease | None:
        """A lease on the request's revision, which somebody holds one on; None for the base. Thread-safe."""
        if request.revision == BASE_REVISION:
            return None
        return self.tasks.registry.retain(Lease(request.task, request.revision, request.kind))

    def unpin(self, lease: Lease | None) -> None:
        """Give a request's lease back. Thread-safe."""
        if lease is not None:
            self.tasks.release(lease)

    def add_request(self, request: Request, lease: Lease | None = None) -> None:
        """Queue a request. `lease` becomes the engine's, also when this raises; without one the caller holds a
        lease on the revision during the call, and the engine takes another.

        Raises `InvalidRequest` when it can never be served, or its id is in use.
        """
        own = lease or self.pin(request)
        try:
            form = self.check(request)
        except BaseException:
            self.unpin(own)
            raise
        self._queue(request, own, form)

    def admit(self, request: Request, lease: Lease | None, form: Form | None) -> list[TokenOutput]:
        """Queue a request that has passed `check`, which gave `form`; `lease` becomes the engine's.

        An error ends this request alone, by the output that is returned. Raises `EngineDead` as `step` does.
        """
        try:
            self._queue(request, lease, form)
        except EngineDead:
            raise
        except Exception as error:
            logger.error(
                "request %s of task %r cannot be queued", request.request_id, request.task, exc_info=error
            )
            failed = TokenOutput(
                request.request_id, finish_reason="error", error=REQUEST_FAILED, error_code="request_failed"
            )
            self._tally.request(request)
            self._tally.outputs([failed])
            return [failed]
        return []

    def abort(self, request_id: str) -> bool:
        """End a request at once: no further output, its blocks are free for the next step. False when unknown."""
        if request_id not in self._leases:
            return False
        self.scheduler.abort(request_id)
        self._tally.count("aborted_total")
        self.unpin(self._leases.pop(request_id))
        return True

    def abort_all(self) -> list[str]:
        """End every request; return their ids."""
        ids = list(self._leases)
        for request_id in ids:
            self.abort(request_id)
        return ids

    def step(self) -> list[TokenOutput]:
        """Compute one batch: at most one new token per request. A request's last output has a `finish_reason`.

        A request whose computing raises ends with an error output, the others of the step do not notice. When no
        single request is to blame, the step's requests end with an error output, and the engine starts anew with
        those that waited; with all, where only a bank row was lost. `EngineDead` is raised when that happens
        `max_crashes` times within `crash_window` seconds, or at once when the device is lost.
        """
        started = time.perf_counter()
        planned: Collection[Sequence] | None = None
        crash: Exception | None = None
        try:
            batch = self.scheduler.schedule().by_group_row()
            if not batch.scheduled:
                return []
            planned = [item.sequence for item in batch.scheduled]
            outcome = run_step(self.canary.run, batch)
            outputs = self._refused(outcome)
            outputs += self.scheduler.update(outcome.batch, outcome.results)
            self._tally.count("row_writes_total", len(outcome.batch.bank_writes))
            self._tally.count("step_tokens_total", outcome.batch.num_tokens)
            self._planning_crashed = False
        except Exception as error:  # noqa: BLE001  the top of the engine's loop: one bad step must not end it
            crash = error
            outputs = self._restart(() if isinstance(error, RowLost) else planned)
        self._book(outputs, time.perf_counter() - started)
        if crash is not None:
            self._note(crash)
        return outputs

    def judge(self) -> None:
        """Try the next uploaded set by a forward of its own, between two steps. Raises `EngineDead` as `step` does."""
        try:
            self.canary.judge()
        except RowLost as error:
            self._restart(())
            self._note(error)

    def stats(self) -> dict[str, float]:
        """Numbers for metrics, by name; counters end in `_total`. Callable from any thread, never blocks long."""
        blocks, rows = self.scheduler.blocks, self.tasks.registry.counts()
        return {
            "requests_running": len(self.scheduler.running),
            "requests_waiting": len(self.scheduler.waiting),
            "kv_blocks_used": blocks.num_used,
            "kv_blocks": blocks.num_blocks,
            "kv_block_tokens": blocks.block_size,
            "task_rows_used": rows.rows_used,
            "task_rows": rows.rows,
            "group_rows_used": rows.group_rows_used,
            "group_rows": rows.group_rows,
            "preemptions_total": self.scheduler.num_preemptions,
            "tasks_quarantined": len(self.tasks.registry.quarantined()),
            **(blocks.cache.stats() if blocks.cache else {}),
            **self.tasks.stats(),
            **self._tally.stats(),
        }

    def generate(
        self,
        prompts: Items[str] | Items[Items[int]],
        params: SamplingParams | Items[SamplingParams] | None = None,
        task: Choice | Items[Choice] = BASE_TASK,
        *,
        progress: bool = False,
    ) -> list[Completion]:
        """Complete each prompt (texts or lists of token ids) and return the results in the same order.

            Engine("bases/smollm2").generate(["2 + 2 ="], SamplingParams(max_tokens=4, temperature=0.0))
            Engine(base, store).generate(prompts, task=["sql", "base", Path("mine.safetensors"), {"a": 0.5, "b": 0.5}])

        `params` and `task` are one for all, or one per prompt. A task is a name in the store, a `ScaleSet` or the
        path of its file, or the weights of a blend, which sum to 1. `progress` shows a bar. Log-probabilities come
        with `SamplingParams(logprobs=…, prompt_logprobs=…)`. A request that fails has `finish_reason` "error" and says
        why in `error`; the others are not affected.

        Raises `InvalidRequest`, `UnknownTask`, `TaskUnusable`, `TaskQuarantined`, `InvalidScaleSet`, `EngineDead`.
        """
        from peqa_runtime.engine.offline import generate

        return generate(self, prompts, params or SamplingParams(), task, progress=progress)

    def close(self) -> None:
        """End all requests and free what is not memory. Safe to call twice."""
        self.abort_all()
        self._own.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _new_scheduler(self) -> Scheduler:
        """A scheduler with nothing in it, all blocks free and nothing cached."""
        config, model = self.config, self.model
        prefixes = PrefixCache(model.manifest.base_digest, config.block_size) if config.prefix_cache else None
        return Scheduler(
            BlockManager(self.kv_cache.num_blocks, config.block_size, prefixes),
            self.tasks.registry,
            max_batch_tokens=config.max_batch_tokens,
            max_sequences=config.max_sequences,
            max_prompt_logprob_rows=config.max_prompt_logprob_rows,
            eos_token_ids=model.eos_token_ids,
        )

    def _refused(self, outcome: Outcome) -> list[TokenOutput]:
        """End the requests whose computing raised."""
        if outcome.failed:
            self._tally.count("step_failures_total")
        outputs: list[TokenOutput] = []
        for item, error in outcome.failed:
            request = item.sequence.request
            logger.error("request %s of task %r fails", request.request_id, request.task, exc_info=error)
            outputs += self.scheduler.fail([item.sequence], REQUEST_FAILED, "request_failed")
        return outputs

    def _queue(self, request: Request, lease: Lease | None, form: Form | None) -> None:
        """Queue a checked request. `lease` becomes the engine's; when this raises, nothing of the request is left."""
        try:
            assert lease is None or lease.revision == request.revision, "the lease is of another revision"
            if request.request_id in self._leases:
                raise InvalidRequest(f"request id {request.request_id!r} is in use", param="request_id")
            seed = secrets.randbits(63) if request.params.seed is None else request.params.seed
            sequence = Sequence(request, list(request.prompt_token_ids), seed=seed, form=form)
        except BaseException:
            self.unpin(lease)
            raise
        try:
            self.scheduler.add(sequence)
        except Exception as error:
            self.unpin(lease)
            self._restart(())  # it may be left halfway
            self._note(error)
            raise
        self._leases[request.request_id] = lease
        self._tally.request(request)

    def _note(self, crash: Exception) -> None:
        """Count a crash. Raises `EngineDead` when nothing goes on after it."""
        try:
            self._crashes.note(crash)
        except EngineDead:
            self.abort_all()
            raise

    def _restart(self, planned: Collection[Sequence] | None) -> list[TokenOutput]:
        """Begin with a new scheduler, free blocks and unwritten rows; return the last outputs of who does not survive.

        The step's requests end (`planned` None, the planning itself crashed: all that run, and when it crashes again
        at once, all). The others that were queued begin anew with the tokens that they have.
        """
        self._tally.count("restarts_total")
        self._tally.count("step_failures_total")
        before, everyone = self.scheduler, [*self.scheduler.running, *self.scheduler.waiting]
        if planned is None:
            planned = everyone if self._planning_crashed else before.running
            self._planning_crashed = True
        lost = set(planned)
        survivors = [
            s for s in everyone if s.request_id in self._leases and s not in lost and s.status != "finished"
        ]
        self.tasks.registry.mark_unwritten()
        self.scheduler = self._new_scheduler()
        self.scheduler.inherit_counts(before)
        for sequence in sorted(survivors, key=lambda s: s.arrival):
            sequence.forget_place()
            self.scheduler.add(sequence)
        kept = {s.request_id for s in survivors}
        return [
            TokenOutput(name, finish_reason="error", error=ENGINE_RESTARTED, error_code="engine_restarted")
            for name in self._leases
            if name not in kept
        ]

    def _strike(self, request_id: str, lease: Lease | None) -> None:
        """A request ended with NaN or infinity: after some its revision is set aside. The base cannot be."""
        self._tally.count("numerical_errors_total")
        if lease is None or lease.revision == BASE_REVISION:
            logger.error("request %s, on the base, ended with NaN or infinity", request_id)
            return
        logger.error(
            "request %s of task %r, revision %s, ended with NaN or infinity",
            request_id,
            lease.task,
            lease.revision,
        )
        for name in self.tasks.strike(lease.revision):
            logger.error("task %r, revision %s, is in quarantine", name, lease.revision)

    def _book(self, outputs: Items[TokenOutput], seconds: float) -> None:
        """Release what ended, and count."""
        for output in outputs:
            if output.finish_reason is not None:
                lease = self._leases.pop(output.request_id)
                if output.error_code == "numerical_error":
                    self._strike(output.request_id, lease)
                self.unpin(lease)
        self._tally.step(outputs, seconds)
