"""One task's scales as an immutable value, with every check that a file from outside has to pass.

All scales are relative to the base (1.0 = the base) and positive, `in_scale` too: training starts at 1 and
moves by small steps, so a scale that is zero or negative is a fault of whoever wrote it, and one sign rule
leaves nothing to reason about in the kernels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from peqa_runtime.core import SCALE_KINDS, BaseManifest, ScaleKind, check_task_name
from peqa_runtime.errors import InvalidData, InvalidScaleSet, InvalidTaskName, WrongBase
from peqa_runtime.scales.atomic_file import write_atomic
from peqa_runtime.scales.set_file import (
    SetHeader,
    content_digest,
    header_end,
    header_limit,
    parse_header,
    parse_json_object,
    write_set_file,
)
from peqa_runtime.scales.set_layout import SUFFIXES, SetLayout, SetLayouts, expected_shapes

FORMAT = "peqa-scale-set"
FORMAT_VERSION = "1"
DEFAULT_MAX_RATIO = 16.0
"""A scale further than this factor from the base's is no tuning result: such a set is refused."""

_METADATA_KEYS = ("format", "format_version", "kind", "task", "base_digest", "prompt_format", "note")
_DTYPE_NAMES = {torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True, eq=False)
class ScaleSet:
    """One task's tensors and metadata. Two sets with equal tensors have the same `revision` (a hex SHA-256).

    `flat` holds all tensors as `layout` says, on the CPU, float16 or float32; nobody may change it. `task` is the name
    noted by whoever saved the set (it may be empty, and an upload may use another); `prompt_format` and `note` are
    passed on as they are.
    """

    kind: ScaleKind
    base_digest: str
    flat: Tensor  # [sum of layout.sizes]
    layout: SetLayout
    revision: str
    task: str = ""
    prompt_format: str = ""
    note: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Views by name: `<linear>.out_scale` [N], `<linear>.in_scale` [K] or `<linear>.group_scale` [N, G]."""
        parts = self.flat.split(self.layout.sizes)
        named = zip(self.layout.names, parts, self.layout.shapes, strict=True)
        return MappingProxyType({name: part.view(shape) for name, part, shape in named})

    @property
    def num_bytes(self) -> int:
        """Bytes that the tensors take in host memory."""
        return self.flat.numel() * self.flat.element_size()

    @classmethod
    def parse(
        cls,
        data: bytes | Path,
        manifest: BaseManifest,
        *,
        max_ratio: float = DEFAULT_MAX_RATIO,
        layouts: SetLayouts | None = None,
    ) -> ScaleSet:
        """Return the set in `data` (a file's bytes, or its path) after checking all of it against `manifest`.

        `layouts`: the base's, where many sets share them. Raises `InvalidScaleSet` with what is wrong and what would
        be right, `WrongBase` when the set was tuned on another base.
        """
        if isinstance(data, Path):
            try:
                content, header = read_set_file(data, manifest)
            except OSError as error:
                raise InvalidScaleSet(f"cannot read {data}: {error.strerror or error}") from None
        else:
            content, header = data, check_header(data, len(data), manifest)
        try:
            tensors = safetensors.torch.load(content)
        except safetensors.SafetensorError as error:
            raise InvalidScaleSet(f"not a readable safetensors file: {str(error)[:200]}") from None
        kind = _kind_of(header.metadata)
        layout = (layouts or SetLayouts(manifest))[kind]
        flat = torch.cat([tensors[name].reshape(-1) for name in layout.names] or [torch.empty(0)])
        _check_values(flat, layout, max_ratio)
        metadata = header.metadata
        return cls(
            kind=kind,
            base_digest=metadata["base_digest"],
            flat=flat,
            layout=layout,
            revision=content_digest(header, content),
            task=metadata.get("task", ""),
            prompt_format=metadata.get("prompt_format", ""),
            note=MappingProxyType(parse_json_object(metadata.get("note") or "{}", "the metadata's note")),
        )

    @classmethod
    def from_checked_file(
        cls, data: bytearray, kind: ScaleKind, manifest: BaseManifest, layouts: SetLayouts, revision: str
    ) -> ScaleSet:
        """Return the set in a file that is known, by its digest, to have passed `parse` and to hold its tensors in
        the order of their names: no name is read, and the bytes are not copied. Its metadata are left out.
        """
        layout = layouts[kind]
        start = 8 + int.from_bytes(data[:8], "little")
        width = (len(data) - start) // sum(layout.sizes)
        flat = torch.frombuffer(data, dtype={2: torch.float16, 4: torch.float32}[width], offset=start)
        return cls(kind, manifest.base_digest, flat, layout, revision)

    @classmethod
    def build(
        cls,
        kind: ScaleKind,
        tensors: Mapping[str, Tensor],
        manifest: BaseManifest,
        *,
        task: str = "",
        prompt_format: str = "",
        note: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float16,
        max_ratio: float = DEFAULT_MAX_RATIO,
    ) -> ScaleSet:
        """Make a set for `manifest`'s base from `<linear>.<out_scale|in_scale|group_scale>` tensors, saved as `dtype`.

        The result has gone through the very checks of `parse`, and holds the rounded values that a file of it has.
        """
        if dtype not in _DTYPE_NAMES:
            raise InvalidScaleSet(f"a scale set is saved as float16 or float32, not {dtype}")
        rounded = {
            name: tensor.detach().to(device="cpu", dtype=dtype).contiguous()
            for name, tensor in tensors.items()
        }
        metadata = _metadata(kind, task, manifest.base_digest, prompt_format, note or {})
        return cls.parse(_file_bytes(metadata, rounded), manifest, max_ratio=max_ratio)

    def to_bytes(self, *, task: str | None = None) -> bytes:
        """Return the safetensors file; the same set gives the same bytes. `task` replaces the noted name."""
        task = self.task if task is None else task
        metadata = _metadata(self.kind, task, self.base_digest, self.prompt_format, self.note)
        return _file_bytes(metadata, self.tensors)

    def save(self, path: Path | str) -> None:
        """Write the file to `path`: a reader sees the file that was there before or all of this one."""
        write_atomic(Path(path), self.to_bytes())


def check_set_path(path: Path) -> None:
    """Raise `InvalidData` unless a set can be written to `path`: a .safetensors file, no folder."""
    if path.suffix != ".safetensors":
        raise InvalidData(f"a scale set is a .safetensors file, not {path.name!r}")
    if path.is_dir():
        raise InvalidData(f"{path} is a folder; name the scale set file to write")


def refuse_existing_set(path: Path) -> None:
    """Raise `InvalidData` where a file is already: a tuned set is hours of work, and bases are not replaced either."""
    if path.exists():
        raise InvalidData(f"{path} exists already; remove it or choose another name")


def max_file_bytes(manifest: BaseManifest) -> int:
    """Return the size in bytes that no valid scale set file for this base exceeds, whatever its kind."""
    most = max(sum(prod(shape) for shape in expected_shapes(kind, manifest).values()) for kind in SCALE_KINDS)
    return 8 + header_limit(_expected_tensors(manifest)) + 4 * most


def read_set_file(path: Path, manifest: BaseManifest) -> tuple[bytes, SetHeader]:
    """Return the bytes of the file at `path` and its checked header; no more is read than a sound header promises.

    Raises `InvalidScaleSet` as `check_header` does, and `OSError` when the file cannot be read.
    """
    with open(path, "rb") as file:
        total = os.fstat(file.fileno()).st_size
        head = file.read(8)
        end = header_end(head, total, header_limit(_expected_tensors(manifest)))
        head += file.read(end - 8)
        header = check_header(head, total, manifest)
        data = head + file.read(total - end)
    if len(data) != total:
        raise InvalidScaleSet(f"{path.name} became shorter while it was read")
    return data, header


def check_header(data: bytes, total_bytes: int, manifest: BaseManifest) -> SetHeader:
    """Check everything that the header of a file of `total_bytes` says; `data` must reach to the header's end.

    Order: lengths, JSON and offsets, metadata, base, names, dtypes and shapes. No tensor is touched.
    Raises `InvalidScaleSet` / `WrongBase`.
    """
    end = header_end(data[:8], total_bytes, header_limit(_expected_tensors(manifest)))
    header = parse_header(data[:end], total_bytes)
    _check_metadata(header.metadata)
    base_digest = header.metadata["base_digest"]
    if base_digest != manifest.base_digest:
        raise WrongBase(
            f"the set was tuned on base {_short(base_digest)}, this base is {_short(manifest.base_digest)} "
            f"({manifest.model_id}); tune it on this base, or serve the base that it belongs to"
        )
    kind = _kind_of(header.metadata)
    expected = expected_shapes(kind, manifest)
    missing = [name for name in expected if name not in header.tensors]
    extra = [name for name in header.tensors if name not in expected]
    if missing:
        raise InvalidScaleSet(
            f"the set lacks {len(missing)} of the {len(expected)} tensors of kind {kind!r}: {_some(missing)}"
        )
    if extra:
        raise InvalidScaleSet(
            f"the set has {len(extra)} tensors that kind {kind!r} does not have on this base: {_some(extra)}"
        )
    wrong = [
        f"{name} is {list(header.tensors[name].shape)}, must be {list(shape)}"
        for name, shape in expected.items()
        if header.tensors[name].shape != shape
    ]
    if wrong:
        raise InvalidScaleSet(f"{len(wrong)} tensors have the wrong shape: {_some(wrong)}")
    if len({entry.dtype for entry in header.tensors.values()}) > 1:
        raise InvalidScaleSet("some tensors are F16 and some F32; save all tensors of a set in the same one")
    return header


def _check_metadata(metadata: Mapping[str, str]) -> None:
    unknown = sorted(set(metadata) - set(_METADATA_KEYS))
    if unknown:
        raise InvalidScaleSet(f"unknown metadata: {_some(unknown)}; known: {', '.join(_METADATA_KEYS)}")
    if metadata.get("format") != FORMAT:
        raise InvalidScaleSet(
            f"the metadata's format is {metadata.get('format', '')[:40]!r}, a scale set has {FORMAT!r}"
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        raise InvalidScaleSet(
            f"format_version {metadata.get('format_version', '')[:40]!r} is not supported, "
            f"this version reads {FORMAT_VERSION!r}"
        )
    _kind_of(metadata)
    if not metadata.get("base_digest"):
        raise InvalidScaleSet("the metadata has no base_digest: it says which base the set was tuned on")
    if metadata.get("task"):
        try:
            check_task_name(metadata["task"])
        except InvalidTaskName as error:
            raise InvalidScaleSet(f"the metadata's {error}") from None
    parse_json_object(metadata.get("note") or "{}", "the metadata's note")


def _kind_of(metadata: Mapping[str, str]) -> ScaleKind:
    for kind in get_args(ScaleKind):
        if metadata.get("kind") == kind:
            return kind
    raise InvalidScaleSet(
        f"the metadata's kind is {metadata.get('kind', '')[:40]!r}, must be one of {', '.join(SCALE_KINDS)}"
    )


def _check_values(flat: Tensor, layout: SetLayout, max_ratio: float) -> None:
    if (
        flat.numel() == 0 or _reason(flat.float(), max_ratio) is None
    ):  # one pass is much cheaper than one per tensor
        return
    wrong = [
        f"{name} {reason}"
        for name, part in zip(layout.names, flat.split(layout.sizes), strict=True)
        if (reason := _reason(part.float(), max_ratio)) is not None
    ]
    raise InvalidScaleSet(
        f"{len(wrong)} tensors have values that cannot be scales: {_some(wrong)}; every scale is relative to the "
        f"base (1.0 = the base), finite, greater than 0 and within [1/{max_ratio:g}, {max_ratio:g}]"
    )


def _reason(values: Tensor, max_ratio: float) -> str | None:
    if not bool(torch.isfinite(values).all()):
        return "has NaN or Inf"
    smallest, largest = float(values.min()), float(values.max())
    if smallest <= 0:
        return f"has {smallest:g}"
    if smallest < 1 / max_ratio or largest > max_ratio:
        return f"reaches from {smallest:g} to {largest:g}"
    if largest > torch.finfo(torch.float16).max or float(values.min().half()) == 0:
        return f"reaches from {smallest:g} to {largest:g}, which float16 cannot hold"
    return None


def _expected_tensors(manifest: BaseManifest) -> int:
    return len(manifest.linears) * max(len(suffixes) for suffixes in SUFFIXES.values())


def _metadata(
    kind: ScaleKind, task: str, base_digest: str, prompt_format: str, note: Mapping[str, Any]
) -> dict[str, str]:
    try:
        note_text = json.dumps(dict(note), sort_keys=True, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise InvalidScaleSet(f"the note must be JSON (numbers finite, keys strings): {error}") from None
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "task": task,
        "base_digest": base_digest,
        "prompt_format": prompt_format,
        "note": note_text,
    }


def _file_bytes(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bytes:
    return write_set_file(
        metadata,
        (
            (name, _DTYPE_NAMES[t.dtype], tuple(t.shape), t.contiguous().numpy().tobytes())
            for name, t in tensors.items()
        ),
    )


def _short(digest: str) -> str:
    return f"{digest[:12]}…" if len(digest) > 13 else digest


def _some(names: list[str]) -> str:
    """At most five of the names, so that an error stays readable whatever the file holds."""
    shown = ", ".join(name if len(name) <= 120 else name[:117] + "..." for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
