"""A whole tuning run: files in, one scale set file out, with a note on how it came about."""

from __future__ import annotations

import importlib.metadata
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from peqa_runtime.errors import InvalidData
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.training.data import EncodedData, TooLong, encode_file, file_digest, split_held_out
from peqa_runtime.training.trainer import TuneConfig, TuneResult, prepare_folder, tune
from peqa_runtime.training.tuning import TunableModel

Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainingFiles:
    """What a run reads and writes. `held_out` is a file; `held_out_fraction` splits off rows instead.

    `prompt_format` is filled with each prompt and noted in the set; empty means the prompt alone.
    """

    data: Path
    output: Path
    held_out: Path | None = None
    held_out_fraction: float = 0.0
    prompt_format: str = ""
    max_tokens: int | None = None  # None: 1024, or the model's context where that is less
    too_long: TooLong = "drop"
    dtype: Literal["float16", "float32"] = "float16"

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        if self.held_out is not None and self.held_out_fraction:
            raise InvalidData("give a file of held-out rows or a fraction to split off, not both")
        if self.output.suffix != ".safetensors":
            raise InvalidData(f"a scale set is a .safetensors file, not {self.output.name!r}")
        if self.output.is_dir():
            raise InvalidData(f"{self.output} is a folder; name the scale set file to write")

    @property
    def checkpoints(self) -> Path:
        """Folder of an unfinished run, beside the output."""
        return self.output.with_name(f"{self.output.name}.checkpoints")


@dataclass(frozen=True)
class FinishedRun:
    """The saved set and what the run measured."""

    scale_set: ScaleSet
    result: TuneResult
    rows: int
    dropped_lines: tuple[int, ...]


def steps_for(rows: int, batch_rows: int, epochs: float) -> int:
    """Optimizer steps that go `epochs` times over `rows`."""
    if not epochs > 0:
        raise InvalidData(f"epochs must be above 0, got {epochs}")
    return max(1, math.ceil(epochs * math.ceil(rows / batch_rows)))


def row_limit(tunable: TunableModel, files: TrainingFiles) -> int:
    """Most tokens of a row, window of plain text."""
    return min(1024, tunable.max_tokens) if files.max_tokens is None else files.max_tokens


def read_training_data(
    tunable: TunableModel, files: TrainingFiles, seed: int
) -> tuple[EncodedData, EncodedData | None]:
    """(rows to train on, held-out rows or None). Raises `InvalidData`."""
    max_tokens = row_limit(tunable, files)
    if not 2 <= max_tokens <= tunable.max_tokens:
        raise InvalidData(f"a row may have 2 to {tunable.max_tokens} tokens here, not {max_tokens}")

    def encoded(path: Path) -> EncodedData:
        return encode_file(
            path,
            tunable.encode,
            tunable.eos_token_id,
            encode_prompt=tunable.encode_prompt,
            prompt_format=files.prompt_format,
            max_tokens=max_tokens,
            too_long=files.too_long,
        )

    data = encoded(files.data)
    if files.held_out is not None:
        return data, encoded(files.held_out)
    if files.held_out_fraction:
        return split_held_out(data, files.held_out_fraction, seed)
    return data, None


def train_file(
    tunable: TunableModel,
    files: TrainingFiles,
    config_of: Callable[[int], TuneConfig],
    *,
    resume: bool | None = None,
    progress: bool = True,
    say: Say = lambda line: None,
) -> FinishedRun:
    """Tune on `files.data` and save the set. `config_of(rows)` gives the settings once the rows are counted.

    `resume`: None goes on with an unfinished run of the same settings, if there is one; True demands one; False starts
    anew. Checkpoints are removed when the set is saved. Raises `InvalidData`, `TrainingInterrupted`.
    """
    config = config_of(0)  # settings are checked before time is spent
    data, held_out = read_training_data(tunable, files, config.seed)
    config = config_of(len(data.examples))
    digest = file_digest(files.data)
    if data.dropped_lines:
        shown = ", ".join(map(str, data.dropped_lines[:5])) + (" …" if len(data.dropped_lines) > 5 else "")
        limit = row_limit(tunable, files)
        say(f"{len(data.dropped_lines)} rows of more than {limit} tokens are left out (lines {shown})")
    say(
        f"{len(data.examples)} rows ({data.num_loss_tokens} tokens in the loss), "
        f"{len(held_out.examples) if held_out else 0} held out, {config.steps} steps of {config.batch_rows} rows"
    )
    fingerprint = {
        **asdict(config),
        "data_digest": digest,
        "held_out_digest": file_digest(files.held_out) if files.held_out else None,
        "held_out_fraction": files.held_out_fraction,
        "prompt_format": files.prompt_format,
        "max_tokens": row_limit(tunable, files),
        "base_digest": tunable.manifest.base_digest,
    }
    checkpoint = prepare_folder(files.checkpoints, fingerprint, resume=resume)
    if checkpoint is not None:
        say(f"going on from {checkpoint}")
    result = tune(
        tunable, config, data, held_out, folder=files.checkpoints, resume_from=checkpoint, progress=progress
    )
    scale_set = ScaleSet.build(
        config.kind,
        result.scales,
        tunable.manifest,
        task=config.task,
        prompt_format=files.prompt_format,
        note=_note(files, config, data, held_out, digest, result),
        dtype=torch.float16 if files.dtype == "float16" else torch.float32,
    )
    files.output.parent.mkdir(parents=True, exist_ok=True)
    scale_set.save(files.output)
    shutil.rmtree(files.checkpoints, ignore_errors=True)
    return FinishedRun(scale_set, result, len(data.examples), data.dropped_lines)


def _note(
    files: TrainingFiles,
    config: TuneConfig,
    data: EncodedData,
    held_out: EncodedData | None,
    digest: str,
    result: TuneResult,
) -> dict[str, Any]:
    settings = asdict(config)
    for key in ("task", "kind"):
        del settings[key]
    return {
        "data": files.data.name,
        "data_digest": digest,
        "rows": len(data.examples),
        "dropped_rows": len(data.dropped_lines),
        "held_out_rows": len(held_out.examples) if held_out else 0,
        **settings,
        "train_loss": _finite(result.train_loss),
        "held_out_loss": _finite(result.held_out_loss),
        "best_step": result.best_step,
        "tokens": result.tokens,
        "seconds": round(result.seconds, 1),
        "versions": {
            name: importlib.metadata.version(name) for name in ("peqa-serve", "torch", "transformers")
        },
    }


def _finite(value: float | None) -> float | None:
    return round(value, 5) if value is not None and math.isfinite(value) else None
