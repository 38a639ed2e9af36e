"""A model of floats -> base folder: rounded to nearest, by GPTQ or block by block, in bits that rules may mix.

Every nn.Linear but the output head becomes codes; embeddings, norms, biases and the head stay as they are (so do
mixture-of-experts weights, which are no nn.Linear). The floats of one block, or of one tensor where no calibration is
needed, are in memory at a time.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.disk_space import disk_full_named
from peqa_runtime.errors import InvalidCheckpoint, InvalidRequest
from peqa_runtime.model.base_checkpoint import PER_CHANNEL, QuantizationSpec
from peqa_runtime.model.base_writer import BaseWriter, staged_folder
from peqa_runtime.model.importers.gguf import import_gguf
from peqa_runtime.model.loader import pick_device
from peqa_runtime.model.quantizers.block import BlockOptions
from peqa_runtime.model.quantizers.blockwise import TrainingOptions
from peqa_runtime.model.quantizers.calibration import SUFFIXES, Calibration, CalibrationText
from peqa_runtime.model.quantizers.float_source import FloatSource, open_source
from peqa_runtime.model.quantizers.gptq import GptqOptions
from peqa_runtime.model.quantizers.plan import LinearPlan, Method, Rule, plan_linears
from peqa_runtime.model.quantizers.rounding import quantize_rtn
from peqa_runtime.model.quantizers.run import BlockRun, Say, calibrate, folder_of_run
from peqa_runtime.model.quantizers.skeleton import Skeleton, load_skeleton
from peqa_runtime.model.quantizers.workbench import Workbench
from peqa_runtime.model.threads import one_thread

__all__ = ["QuantizeOptions", "QuantizeReport", "quantize_folder", "quantize_rtn"]

RUN_VERSION = 1  # of what an unfinished run keeps: another version's is not gone on with


@dataclass(frozen=True)
class QuantizeOptions:
    """Everything but bits, group size and method.

    `rules`: linears that differ. `calibration`: text for gptq and blockwise. `integer_zeros`: zeros that are codes, as
    GPTQ files need. `gptq`, `training`: see there. `device`: where blocks run, auto, cpu or cuda.
    """

    rules: tuple[Rule, ...] = ()
    calibration: CalibrationText | None = None
    integer_zeros: bool = False
    gptq: GptqOptions = field(default_factory=GptqOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    device: str = "auto"


@dataclass(frozen=True)
class QuantizeReport:
    """What a run did: linears by bits, and of each block the error of its outputs, relative, before and after training.

    `output_error` is the mean over the linears that were calibrated (before block-wise training); None without.
    """

    linears: Mapping[str, int]
    output_error: float | None
    blocks: tuple[Mapping[str, Any], ...]


def quantize_folder(
    source: Path | str,
    destination: Path | str,
    bits: int = 4,
    group_size: int = 64,
    method: Method = "rtn",
    *,
    options: QuantizeOptions | None = None,
    model_id: str | None = None,
    progress: bool = True,
    say: Say = lambda line: None,
) -> QuantizeReport:
    """Write the base folder `destination` from a Hugging Face folder of floats, a base, or a GGUF file.

    `bits` 2, 3, 4 or 8; `group_size` -1 (one scale per row), 16, 32, 64, 128 or 256 and a divisor of every linear's
    inputs; `method` rtn, gptq or blockwise. A base or GGUF file is decoded first. `model_id`: name of the base
    (default: the folder's). `say` is told what a person should know. An interrupted run leaves nothing at
    `destination`; gptq and blockwise go on with the first unfinished block when called again with the same arguments.

    Raises `InvalidRequest` for an option that does not exist or means nothing here, `InvalidData` for calibration text
    that cannot be used, `InvalidCheckpoint` for a model that cannot be quantized or does not fit the group size (the
    message names the linear and the sizes that fit), `UnsupportedModel` for one that cannot be run block by block,
    `DiskFull` when there is no room.
    """
    source, destination = Path(source), Path(destination)
    options = options or QuantizeOptions()
    default = LinearPlan(bits, group_size, method)
    device = pick_device(options.device)
    with _no_other_run(destination), _opened(source, destination, progress) as opened:
        skeleton = load_skeleton(opened)
        plans = plan_linears(skeleton.linears, default, options.rules)
        calibrated = _check_methods(plans, options)
        calibration = calibrate(opened, calibrated, skeleton.model) if calibrated else None
        spec = _spec(opened, skeleton, plans, default, _note(default, options, calibration))
        spec = replace(spec, model_id=model_id or _model_id(opened, source))
        if calibration is None:
            with _new_base(destination, resumes=False) as folder:
                _write(opened, folder, spec, plans, options, None, progress)
            return _report(plans, [])
        if not skeleton.blocks:
            raise InvalidCheckpoint(f"{type(skeleton.model).__name__} has no list of blocks; use method rtn")
        request = _request(opened, spec, plans, device)
        bench = Workbench(folder_of_run(destination), request)
        settings = BlockOptions(options.gptq, options.training, options.integer_zeros, calibration.seed)
        BlockRun(skeleton, opened, plans, calibration, settings, bench, device).finish(
            progress=progress, say=say
        )
        with _new_base(destination, resumes=True) as folder:
            _write(opened, folder, spec, plans, options, _Finished(bench, skeleton), progress)
        reports = [bench.report(index) for index in range(len(skeleton.blocks))]
        bench.remove()
    return _report(plans, reports)


@contextmanager
def _no_other_run(destination: Path) -> Iterator[None]:
    """Raise `InvalidCheckpoint` when `destination` is there already or another process is making it."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise InvalidCheckpoint(f"{destination} exists already; remove it or choose another name")
    run = folder_of_run(destination)
    lock = FileLock(run.with_name(f"{run.name}.lock"), blocking=False)
    with disk_full_named(destination, resumes=False):  # nothing has begun
        destination.absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        with lock:
            try:
                yield
            finally:
                Path(lock.lock_file).unlink(missing_ok=True)
    except Timeout:
        raise InvalidCheckpoint(
            f"another process is making {destination}; wait for it or choose another name"
        ) from None


@contextmanager
def _new_base(destination: Path, *, resumes: bool) -> Iterator[Path]:
    with disk_full_named(destination, resumes=resumes), one_thread(), staged_folder(destination) as folder:
        yield folder


@contextmanager
def _opened(source: Path, destination: Path, progress: bool) -> Iterator[FloatSource]:
    """The source's floats; a GGUF file becomes a base beside the destination for the time being."""
    if source.suffix.lower() != ".gguf":
        with open_source(source) as opened:
            yield opened
        return
    run = folder_of_run(destination)
    imported = run.with_name(f"{run.name}.imported")
    shutil.rmtree(imported, ignore_errors=True)
    try:
        with disk_full_named(imported, resumes=False):  # decoding a file begins anew
            import_gguf(source, imported / source.stem, progress=progress)
        with open_source(imported / source.stem) as opened:
            yield opened
    finally:
        shutil.rmtree(imported, ignore_errors=True)


def _model_id(source: FloatSource, path: Path) -> str:
    return (source.spec.model_id if source.spec else "") or path.resolve().name


def _check_methods(
    plans: Mapping[str, LinearPlan | None], options: QuantizeOptions
) -> CalibrationText | None:
    """The calibration text, where a method needs one; raises `InvalidRequest` when options and methods do not agree."""
    methods = {plan.method for plan in plans.values() if plan}
    calibrated = sorted(methods - {"rtn"})
    if not calibrated:
        if options.calibration:
            raise InvalidRequest(
                "rounding to nearest reads no calibration text; use method gptq or blockwise",
                param="calibration",
            )
        return None
    if options.calibration is None:
        raise InvalidRequest(
            f"method {calibrated[0]} needs calibration text: a {', '.join(SUFFIXES)} file, or a folder, like what "
            "the model will read",
            param="calibration",
        )
    grouped = any(plan and plan.method != "rtn" and plan.group_size != PER_CHANNEL for plan in plans.values())
    if options.gptq.act_order and not options.gptq.static_groups and grouped:
        raise InvalidRequest(
            "act-order without static groups scatters the inputs of a group over the row, which a base cannot hold; "
            "use static groups with it, or one scale per row",
            param="static_groups",
        )
    return options.calibration


def _spec(
    source: FloatSource,
    skeleton: Skeleton,
    plans: Mapping[str, LinearPlan | None],
    default: LinearPlan,
    note: Mapping[str, Any],
) -> QuantizationSpec:
    """Embeddings and heads keep the codes that they have, if any."""
    overrides = {
        name: plan.precision for name, plan in plans.items() if plan and plan.precision != default.precision
    }
    for head in skeleton.heads:
        if source.spec and source.codes(head) is not None:
            overrides[head] = source.spec.of(head)
    return QuantizationSpec(
        default.bits,
        default.group_size,
        "",
        overrides=overrides,
        modules_to_not_convert=tuple(name for name, plan in plans.items() if plan is None),
        embeddings=tuple(sorted(skeleton.heads)),
        quantizer=note,
    )


def _note(default: LinearPlan, options: QuantizeOptions, calibration: Calibration | None) -> dict[str, Any]:
    """What the base's config records of how it was made."""
    methods = {default.method, *(rule.settings.get("method", default.method) for rule in options.rules)}
    note: dict[str, Any] = {"method": default.method, "integer_zeros": options.integer_zeros}
    if options.rules:
        note["rules"] = [rule.to_json() for rule in options.rules]
    if calibration:
        note |= {"calibration": calibration.to_json(), "gptq": asdict(options.gptq)}
    if "blockwise" in methods:
        note["training"] = asdict(options.training)
    return note


def _request(
    source: FloatSource,
    spec: QuantizationSpec,
    plans: Mapping[str, LinearPlan | None],
    device: torch.device,
) -> dict[str, Any]:
    """All that the result depends on: an unfinished run is gone on with when it is the same."""
    return {
        "version": RUN_VERSION,
        "source": source.stamp(),
        "spec": spec.to_json(),
        "plans": {name: asdict(plan) if plan else None for name, plan in plans.items()},
        "device": device.type,
    }


class _Finished:
    """The codes of finished blocks; one block is in memory at a time."""

    def __init__(self, bench: Workbench, skeleton: Skeleton) -> None:
        self._bench = bench
        self._block_of = {
            name: index for index, block in enumerate(skeleton.blocks) for name in skeleton.linears_of(block)
        }
        self._held: tuple[int, dict[str, QuantizedWeight]] = (-1, {})

    def get(self, name: str) -> QuantizedWeight | None:
        """The codes of a linear; None when it stands outside of the blocks."""
        index = self._block_of.get(name)
        if index is None:
            return None
        if self._held[0] != index:
            self._held = (index, self._bench.weights(index))
        return self._held[1][name]


def _write(
    source: FloatSource,
    folder: Path,
    spec: QuantizationSpec,
    plans: Mapping[str, LinearPlan | None],
    options: QuantizeOptions,
    finished: _Finished | None,
    progress: bool,
) -> None:
    source.copy_companions(folder)
    waiting = set(plans)
    title = f"{'write' if finished else 'quantize'} {source.folder.name}"
    with BaseWriter(folder, source.config, spec) as writer:
        for name in tqdm(source.names, title, disable=not progress):
            module = name.removesuffix(".weight")
            plan = plans.get(module)
            waiting.discard(module)
            weight = finished.get(module) if plan and finished else None
            kept = source.codes(module) if module in spec.embeddings else None
            if kept is not None:
                writer.add_codes(module, kept)
            elif plan is None:
                writer.add_float(name, source.tensor(name))
            else:
                writer.add_codes(module, weight or _rounded(source, name, plan, options))
    if waiting:
        raise InvalidCheckpoint(
            f"{source.folder} holds no weight for {', '.join(sorted(waiting)[:5])}: its tensor names are not those of "
            "the model; load it with transformers and save it again (save_pretrained)"
        )


def _rounded(source: FloatSource, name: str, plan: LinearPlan, options: QuantizeOptions) -> QuantizedWeight:
    try:
        return quantize_rtn(
            source.tensor(name), plan.bits, plan.group_size, integer_zeros=options.integer_zeros
        )
    except ValueError as error:
        raise InvalidCheckpoint(f"{source.folder}: {name}: {error}") from error


def _report(plans: Mapping[str, LinearPlan | None], blocks: Sequence[Mapping[str, Any]]) -> QuantizeReport:
    counts = Counter(f"{plan.bits} bit {plan.method}" if plan else "float" for plan in plans.values())
    errors = [error for block in blocks for error in block["errors"].values()]
    return QuantizeReport(dict(counts), sum(errors) / len(errors) if errors else None, tuple(blocks))
