"""From what the operator named to services that are ready: find or make the base, open the store, load, seed.

Heavy imports (torch, transformers) happen inside the functions, so that the server can answer /health meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peqa_runtime.errors import InvalidCheckpoint, PeqaError
from peqa_server.services import ServedModel, Services

if TYPE_CHECKING:
    from peqa_runtime.core import BaseManifest
    from peqa_runtime.engine.engine import Engine
    from peqa_runtime.scales.task_library import TaskLibrary

log = logging.getLogger("peqa.server")

Say = Callable[[str], None]

SEEDED = "demo-tasks-seeded"
"""Names the demo's tasks that a store has got once: what its owner deletes afterwards stays deleted."""


@dataclass(frozen=True)
class ServeOptions:
    """What `peqa serve` was asked for. `base` None: the demo. `engine`: fields of `EngineConfig` that were given.

    `watch_seconds`: how often to look for changes that other processes make in the store; 0: never.
    """

    base: Path | None
    home: Path
    store: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    bits: int = 4
    group_size: int = 64
    engine: Mapping[str, Any] = field(default_factory=dict)
    watch_seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """What the start found, for the table."""

    model: str
    base: str
    base_digest: str
    quantization: str
    device: str
    dtype: str
    kernels: str
    activation_bits: int  # to which a product on a CPU rounds them
    max_model_len: int
    kv_blocks: int
    kv_tokens: int
    kv_cache_dtype: str
    task_rows: int
    store: str
    tasks: tuple[str, ...]
    unusable: tuple[str, ...]


def load_services(options: ServeOptions, say: Say) -> tuple[Services, Report]:
    """Load everything. Raises `PeqaError`, `ValueError` or `OSError` with a sentence for the operator."""
    from peqa_runtime.commands.terminal import quiet_libraries

    quiet_libraries()
    base, sets = find_base(options, say)
    from peqa_runtime.engine.async_engine import AsyncEngine
    from peqa_runtime.engine.config import EngineConfig
    from peqa_runtime.engine.engine import Engine
    from peqa_runtime.model import read_manifest
    from peqa_runtime.scales.scale_store import default_store

    manifest = read_manifest(base)
    store = options.store or default_store(options.home, manifest.base_digest)
    engine = Engine(
        base, store, device=options.device, dtype=options.dtype, config=EngineConfig(**options.engine)
    )
    if sets:
        seed_tasks(engine.tasks, store, sets)
    report = _report(base, store, engine)
    model = ServedModel(
        manifest=engine.model.manifest,
        tokenizer=engine.model.tokenizer,
        max_model_len=min(report.max_model_len, report.kv_tokens),
        vocab_size=engine.model.vocab_size,
        description={"device": report.device, "dtype": report.dtype, "quantization": report.quantization},
    )
    if options.watch_seconds:
        engine.tasks.watch(options.watch_seconds)
    spool = engine.tasks.store.spool_folder()
    return Services(AsyncEngine(engine), engine.tasks, model, spool, store / "owners"), report


def find_base(options: ServeOptions, say: Say) -> tuple[Path, tuple[Path, ...]]:
    """The base folder to serve and the scale sets that a new store starts with.

    No name: the demo. A .gguf file, a quantized checkpoint or a folder of floats is turned into a base in the home
    folder, once.
    """
    source = options.base
    if source is None:
        from peqa_runtime.demo import ensure_demo

        demo = ensure_demo(options.home, say=say)
        return demo.base, tuple(demo.sets)
    if not source.exists():
        raise InvalidCheckpoint(
            f"{source} does not exist; name a base folder, a Hugging Face model folder or a .gguf file on this machine"
        )
    if source.is_dir() and _is_base(source):
        return source, ()
    if source.is_file() and source.suffix.lower() != ".gguf":
        raise InvalidCheckpoint(f"{source} is a file but not a .gguf; name a .gguf file or a model folder")
    return _converted(source, options, say), ()


def _is_base(folder: Path) -> bool:
    """True for a peqa base, also a damaged one; False for a folder of floats."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidCheckpoint(
            f"{folder} is no model folder: its config.json cannot be read ({error})"
        ) from None
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == "peqa"


def _converted(source: Path, options: ServeOptions, say: Say) -> Path:
    """The base made from `source`, in the home folder; made now when it is not there yet."""
    from peqa_runtime.model import import_checkpoint, import_gguf, is_quantized, quantize_folder

    source = source.resolve()
    coded = source.is_dir() and is_quantized(source)
    made_from = (
        [source] if source.is_file() else [*sorted(source.glob("*.safetensors")), source / "config.json"]
    )
    if source.is_file():
        how = "gguf"
    elif coded:
        how = "imported"
    else:
        how = f"{options.bits}bit-{'channel' if options.group_size < 0 else f'g{options.group_size}'}"
    stamp = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in made_from]
    key = hashlib.sha256(repr((stamp, how)).encode()).hexdigest()[:12]
    base = options.home / "bases" / f"{source.stem if source.is_file() else source.name}-{how}-{key}"
    if base.exists():
        return base
    try:
        if source.is_file():
            say(f"importing {source.name} into {base} (once)")
            import_gguf(source, base)
        elif coded:
            say(f"importing {source.name} into {base} (once)")
            import_checkpoint(source, base, model_id=source.name)
        else:
            say(f"quantizing {source.name} into {base} (once)")
            quantize_folder(source, base, options.bits, options.group_size)
    except InvalidCheckpoint:
        if not base.exists():  # else another start made it meanwhile
            raise
    return base


def seed_tasks(tasks: TaskLibrary, store: Path, sets: tuple[Path, ...]) -> None:
    """Put each of the demo's sets into the store once. Interrupted, the next start goes on."""
    mark = store / SEEDED
    done = set(mark.read_text(encoding="utf-8").split()) if mark.exists() else set()
    for path in sets:
        if path.stem in done:
            continue
        if tasks.registry.peek(path.stem) is None:
            try:
                tasks.upload(path.stem, path)
            except PeqaError as error:
                log.warning("the demo's task %s cannot be used: %s", path.stem, error)
                continue
        with mark.open("a", encoding="utf-8") as file:
            file.write(f"{path.stem}\n")


def _report(base: Path, store: Path, engine: Engine) -> Report:
    model, config = engine.model, engine.config
    blocks = engine.scheduler.blocks.num_blocks
    return Report(
        model=model.manifest.model_id,
        base=str(base),
        base_digest=model.manifest.base_digest,
        quantization=_quantization(base, model.manifest),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        kernels=model.linears[0].module.prepare().backend,
        activation_bits=config.activation_bits,
        max_model_len=engine.max_model_len,
        kv_blocks=blocks,
        kv_tokens=blocks * config.block_size,
        kv_cache_dtype=str(engine.kv_cache.dtype).removeprefix("torch."),
        task_rows=config.task_rows,
        store=str(store),
        tasks=tuple(engine.tasks.registry.tasks()),
        unusable=tuple(f"{task}: {reason}" for task, reason in engine.tasks.unusable().items()),
    )


def _quantization(base: Path, manifest: BaseManifest) -> str:
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    group = config["group_size"]
    size = "one scale per channel" if group == -1 else f"groups of {group}"
    return f"{config['bits']} bits, {size}, {len(manifest.linears)} linears"
