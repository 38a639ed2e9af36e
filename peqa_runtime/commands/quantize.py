"""`peqa quantize`: a model of floats becomes a base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from peqa_runtime.commands.options import AsJson, Device, NewBase, Quiet, Seed
from peqa_runtime.commands.terminal import base_said, quiet_libraries, reported, say, tell
from peqa_runtime.errors import InvalidRequest

if TYPE_CHECKING:
    from peqa_runtime.model.quantize import QuantizeReport


_FLAGS = {"windows": "--calibration-windows", "tokens": "--calibration-tokens"}
_FLAGS |= {"weight_rate": "--lr", "scale_rate": "--scale-lr"}
"""Options that are named otherwise than what they set."""


@reported
def quantize(
    source: Annotated[
        Path,
        typer.Argument(
            help="A Hugging Face folder of floats; a base or .gguf is decoded.", envvar="PEQA_SOURCE"
        ),
    ],
    output: NewBase,
    bits: Annotated[int, typer.Option(help="Bits of a code: 2, 3, 4 or 8.", envvar="PEQA_BITS")] = 4,
    group_size: Annotated[
        int, typer.Option(help="Inputs that share a scale; -1 = the whole row.", envvar="PEQA_GROUP_SIZE")
    ] = 64,
    method: Annotated[
        Literal["rtn", "gptq", "blockwise"],
        typer.Option(help="To nearest; by GPTQ; trained block by block from GPTQ.", envvar="PEQA_METHOD"),
    ] = "rtn",
    rules: Annotated[
        Path | None,
        typer.Option(help="JSON file: other bits, groups or methods for some linears.", envvar="PEQA_RULES"),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="gptq, blockwise: text (.txt, .md, .jsonl, .json, .parquet or a folder).",
            envvar="PEQA_CALIBRATION",
        ),
    ] = None,
    calibration_windows: Annotated[
        int | None,
        typer.Option(help="Windows drawn from it. Default: 128.", envvar="PEQA_CALIBRATION_WINDOWS"),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="Tokens of each. Default: 512.", envvar="PEQA_CALIBRATION_TOKENS")
    ] = None,
    act_order: Annotated[
        bool | None,
        typer.Option(
            "--act-order/--no-act-order",
            help="gptq: largest inputs first (default).",
            envvar="PEQA_ACT_ORDER",
        ),
    ] = None,
    static_groups: Annotated[
        bool | None,
        typer.Option(
            "--static-groups/--no-static-groups",
            help="gptq: ranges of the weights as they were. Default: with --act-order.",
            envvar="PEQA_STATIC_GROUPS",
        ),
    ] = None,
    damping: Annotated[
        float | None,
        typer.Option(help="gptq: part of the mean diagonal. Default: 0.01.", envvar="PEQA_DAMPING"),
    ] = None,
    zeros: Annotated[
        Literal["float", "integer"],
        typer.Option(help="integer: zeros are codes, as GPTQ files need.", envvar="PEQA_ZEROS"),
    ] = "float",
    epochs: Annotated[
        float | None,
        typer.Option(help="blockwise: times over the windows. Default: 4.", envvar="PEQA_BLOCKWISE_EPOCHS"),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(help="blockwise: windows of a step. Default: 4.", envvar="PEQA_BLOCKWISE_BATCH"),
    ] = None,
    weight_rate: Annotated[
        float | None,
        typer.Option(
            "--lr", help="blockwise: of weights, in steps. Default: 5e-3.", envvar="PEQA_BLOCKWISE_LR"
        ),
    ] = None,
    scale_rate: Annotated[
        float | None,
        typer.Option(
            "--scale-lr",
            help="blockwise: of scales, relative. Default: 1e-3.",
            envvar="PEQA_BLOCKWISE_SCALE_LR",
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a model into a base.

    gptq and blockwise go block by block and keep what is done: stopped, the same command goes on.

    Example: peqa quantize models/SmolLM2-135M -o bases/smollm2-3bit --bits 3 --method gptq --calibration wiki.txt
    """
    from peqa_runtime.model import read_manifest
    from peqa_runtime.model.quantize import QuantizeOptions, quantize_folder
    from peqa_runtime.model.quantizers.blockwise import TrainingOptions
    from peqa_runtime.model.quantizers.calibration import CalibrationText
    from peqa_runtime.model.quantizers.gptq import GptqOptions
    from peqa_runtime.model.quantizers.plan import read_rules

    text = _given(windows=calibration_windows, tokens=calibration_tokens)
    if static_groups is None and act_order is not None:
        static_groups = act_order
    gptq = _given(damping=damping, act_order=act_order, static_groups=static_groups)
    training = _given(epochs=epochs, batch=batch, weight_rate=weight_rate, scale_rate=scale_rate)
    read = read_rules(rules) if rules else ()
    methods = {method, *(rule.settings.get("method") for rule in read)}
    _refuse_unused(methods, calibration, text, gptq, training)
    options = QuantizeOptions(
        rules=read,
        calibration=CalibrationText(calibration, seed=seed, **text) if calibration else None,
        integer_zeros=zeros == "integer",
        gptq=GptqOptions(**gptq),
        training=TrainingOptions(**training),
        device=device,
    )
    quiet_libraries()
    report = quantize_folder(
        source, output, bits, group_size, method, options=options, progress=not quiet, say=say
    )
    manifest = read_manifest(output)
    if not as_json:
        _say_gains(report)
    made = {"output": str(output), "base_digest": manifest.base_digest, **vars(report)}
    tell(made, base_said(output, manifest), as_json=as_json)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _refuse_unused(
    methods: set[Any],
    calibration: Path | None,
    text: Mapping[str, Any],
    gptq: Mapping[str, Any],
    training: Mapping[str, Any],
) -> None:
    """Raise `InvalidRequest` for an option that nothing would read."""
    if text and calibration is None:
        raise InvalidRequest(f"{_flag(text)} means nothing without --calibration FILE")
    if gptq and not methods & {"gptq", "blockwise"}:
        raise InvalidRequest(f"{_flag(gptq)} is for --method gptq and blockwise")
    if training and "blockwise" not in methods:
        raise InvalidRequest(f"{_flag(training)} is for --method blockwise")


def _flag(given: Mapping[str, Any]) -> str:
    """The first option that was given."""
    name = next(iter(given))
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")


def _say_gains(report: QuantizeReport) -> None:
    """What training gained, block by block, and the mean error, for a person."""
    for block in report.blocks:
        if block["gain"]:
            gain = block["gain"]
            say(
                f"{block['block']:<24} error {gain['before']:.3e} -> {gain['after']:.3e}  {gain['steps']:>5} steps"
            )
    if report.output_error is not None:
        say(f"mean squared error of the linears' outputs, relative, by GPTQ: {report.output_error:.3e}")
    say(", ".join(f"{count} linears {what}" for what, count in report.linears.items()))
