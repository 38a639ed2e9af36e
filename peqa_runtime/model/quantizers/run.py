"""Quantizing block after block, each on what the quantized blocks before it give; resumed where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from peqa_kernels.products import FastLinears
from peqa_runtime.disk_space import require_space
from peqa_runtime.errors import InvalidCheckpoint, InvalidRequest
from peqa_runtime.model.loader import context_limit
from peqa_runtime.model.quantizers.block import Block, BlockOptions, BlockResult
from peqa_runtime.model.quantizers.calibration import Calibration, CalibrationText, read_calibration
from peqa_runtime.model.quantizers.float_source import FloatSource
from peqa_runtime.model.quantizers.plan import LinearPlan
from peqa_runtime.model.quantizers.skeleton import Skeleton, moved
from peqa_runtime.model.quantizers.workbench import HiddenStates, Workbench
from peqa_runtime.text import encode, load_tokenizer

Say = Callable[[str], None]


def calibrate(source: FloatSource, text: CalibrationText, model: Any) -> Calibration:
    """The calibration windows in the tokens of the source's tokenizer.

    Raises `InvalidData` for text that cannot be used, `InvalidRequest` for windows longer than the model's context,
    `InvalidCheckpoint` where there is no tokenizer that fits.
    """
    context = context_limit(model)
    if text.tokens > context:
        raise InvalidRequest(
            f"a calibration window of {text.tokens} tokens is longer than the model's context of {context}",
            param="calibration_tokens",
        )
    tokenizer = load_tokenizer(source.folder)
    found = read_calibration(
        text, lambda piece: encode(tokenizer, piece, add_special_tokens=False), tokenizer.eos_token_id
    )
    largest = max(int(window.max()) for window in found.windows)
    if largest >= model.get_input_embeddings().weight.shape[0]:
        raise InvalidCheckpoint(
            f"{source.folder}: its tokenizer gives token {largest}, which the model's embedding has not"
        )
    return found


class BlockRun:
    """Takes every block of a model in turn. `plans` says what becomes of each linear; `blocks` may end early."""

    def __init__(
        self,
        skeleton: Skeleton,
        source: FloatSource,
        plans: Mapping[str, LinearPlan | None],
        calibration: Calibration,
        options: BlockOptions,
        bench: Workbench,
        device: torch.device,
    ) -> None:
        self.skeleton = skeleton
        self.source = source
        self.plans = plans
        self.options = options
        self.bench = bench
        self.device = device
        self._windows = calibration.windows
        blockwise = [
            index
            for index, block in enumerate(skeleton.blocks)
            if any(
                (plan := plans[name]) and plan.method == "blockwise" for name in skeleton.linears_of(block)
            )
        ]
        self._last_blockwise = max(blockwise, default=-1)

    def finish(self, *, progress: bool, say: Say) -> None:
        """Do the blocks that are not done yet. Each is on disk before the next begins."""
        first = self._windows[0]
        calls = [moved(call, self.device) for call in self.skeleton.calls(first, self.source)]
        width = next(self.skeleton.entries([first], self.source)).shape[-1]
        shape = (len(self._windows), first.shape[1], width)
        streams = 4 if self._last_blockwise >= 0 else 2
        require_space(self.bench.folder, streams * 4 * shape[0] * shape[1] * shape[2])
        start = self.bench.finished()
        if start:
            say(f"going on after {start} of {len(self.skeleton.blocks)} finished blocks")
        else:
            for kind in ("quantized", "float") if self._last_blockwise >= 0 else ("quantized",):
                entries = self.skeleton.entries(self._windows, self.source)
                self._hidden(kind, 0, shape).write(entries)
        bar = tqdm(
            total=len(calls), initial=start, desc=f"quantize {self.source.folder.name}", unit="block",
            disable=not progress,
        )  # fmt: skip
        with bar, FastLinears():
            for index in range(start, len(calls)):
                result = self._one(index, calls[index], shape)
                bar.set_postfix_str(describe(result))
                bar.update()

    def _hidden(self, kind: str, block: int, shape: tuple[int, int, int]) -> HiddenStates:
        return self.bench.hidden(kind, block, *shape)

    def _one(self, index: int, call: Any, shape: tuple[int, int, int]) -> BlockResult:
        name = self.skeleton.blocks[index]
        inputs, targets = self._hidden("quantized", index, shape), None
        with self.skeleton.filled([name], self.source, self.device):
            block = Block(
                self.skeleton.model.get_submodule(name),
                self.skeleton.linears_of(name),
                self.plans,
                call,
                self.device,
            )
            if index <= self._last_blockwise:
                targets = self._hidden("float", index + 1, shape)
                targets.write(block.outputs(self._hidden("float", index, shape)))
            # A seed of its own: a resumed run draws what an uninterrupted one draws.
            options = replace(self.options, seed=self.options.seed * 1_000_003 + index)
            result = block.quantize(inputs, targets, options)
            if index + 1 < len(self.skeleton.blocks):
                outputs = block.outputs(inputs) if result.outputs is None else result.outputs.split(1)
                self._hidden("quantized", index + 1, shape).write(outputs)
        report = {
            "block": name,
            "errors": result.errors,
            "gain": asdict(result.gain) if result.gain else None,
        }
        self.bench.save_block(index, result.weights, report)
        for kind in ("quantized", "float"):
            self.bench.drop_hidden(kind, before=index + 1)
        return result


def describe(result: BlockResult) -> str:
    """One short line on a block, for a progress bar."""
    if result.gain:
        return f"block error {result.gain.before:.2e} -> {result.gain.after:.2e}"
    if not result.errors:
        return "left as floats"
    return f"output error {sum(result.errors.values()) / len(result.errors):.2e}"


def folder_of_run(destination: Path) -> Path:
    """Where a run keeps what it has done: beside the base that it makes."""
    return destination.absolute().parent / f".{destination.name}.unfinished"
