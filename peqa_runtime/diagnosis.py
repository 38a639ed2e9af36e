"""Facts about a machine, a base and a store, as one JSON object: `python -m peqa_runtime.diagnosis machine`.

A program of its own, because what it touches may crash or hang (a GPU's driver, a library of other instructions, a disk
that is away): who asks can end it. It only reads: a store may belong to a running server.

    machine
    served HOME BASE STORE      what a server would start from; "" for BASE: the demo, for STORE: the one in the home
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

Facts = dict[str, Any]

MAX_REASONS = 20
READ_SECONDS = 5.0  # for reading sets against their digests; the others are judged by their size


def machine_facts() -> Facts:
    """Torch, the devices that it sees, the C library's builds, and the compilers at hand."""
    import torch

    from peqa_kernels import native
    from peqa_kernels.native import compile as compiling
    from peqa_kernels.native import isa

    devices = []
    problem = None
    try:
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            capability = f"{found.major}.{found.minor}"
            devices.append(
                {"name": found.name, "capability": capability, "free_bytes": free, "total_bytes": total}
            )
    except RuntimeError as error:
        problem = str(error).strip().splitlines()[0]
    usable = [build.name for build in isa.usable()]
    library = native.load()
    return {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "devices": devices,
        "device_problem": problem,
        "builds_usable": usable,
        "build": None if library is None else library.isa.name,
        "compilers": [" ".join(command) for command in compiling.compilers()],
    }


def base_facts(source: Path) -> Facts:
    """What a server would start from: `kind` "base" with identity and size; "floats" or "gguf", which become one first.

    Raises `InvalidCheckpoint`.
    """
    from peqa_runtime.errors import InvalidCheckpoint
    from peqa_runtime.model import read_manifest

    if not source.exists():
        raise InvalidCheckpoint(f"{source} does not exist")
    if source.is_file():
        return {"kind": "gguf", "bytes": source.stat().st_size}
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    try:
        config = json.loads((source / "config.json").read_bytes())
        method = config["quantization_config"]["quant_method"]
    except (OSError, ValueError) as error:
        raise InvalidCheckpoint(
            f"{source} is no model folder: its config.json cannot be read ({error})"
        ) from None
    except (KeyError, TypeError):
        method = None
    if method != "peqa":
        return {"kind": "floats", "bytes": size}
    manifest = read_manifest(source)
    return {
        "kind": "base",
        "model": manifest.model_id,
        "base_digest": manifest.base_digest,
        "linears": len(manifest.linears),
        "bytes": size,
    }


def store_facts(store: Path, base: Path, *, read_seconds: float = READ_SECONDS) -> Facts:
    """The tasks of a store, and why some of them cannot be used on `base`. Writes nothing, takes no lock.

    Raises `InvalidCheckpoint`, `OSError`.
    """
    from peqa_runtime.errors import InvalidScaleSet, WrongBase
    from peqa_runtime.model import read_manifest
    from peqa_runtime.scales.set_layout import SetLayouts
    from peqa_runtime.scales.task_folder import TaskFolders

    manifest = read_manifest(base)
    folders = TaskFolders(
        store / "tasks",
        SetLayouts(manifest),
        unfinished=store / "unfinished",
        quarantine=store / "quarantine",
        manifest=manifest,
        durable=False,
    )
    unusable: dict[str, str] = {}
    tasks = read = size = 0
    latest = 0.0
    deadline = time.monotonic() + read_seconds
    for task, stamp in folders.tasks() if folders.root.is_dir() else ():
        if stamp is None:
            continue
        tasks += 1
        try:
            history = folders.history(task)
            assert history is not None
            entry = history.current
            size += entry.num_bytes
            latest = max(latest, entry.created)
            if entry.base_digest != manifest.base_digest:
                unusable[task] = f"belongs to base {entry.base_digest[:12]}, not to this one"
            elif time.monotonic() < deadline:
                folders.load(task, entry)
                read += 1
            elif not folders.has_size(task, entry.revision, entry.num_bytes):
                unusable[task] = "its file is damaged"
        except FileNotFoundError:
            unusable[task] = "its file is missing"
        except (InvalidScaleSet, WrongBase, ValueError) as error:
            unusable[task] = f"its file is damaged ({error})"
    return {
        "tasks": tasks,
        "read": read,
        "bytes": size,
        "latest": latest,
        "unusable": dict(sorted(unusable.items())[:MAX_REASONS]),
        "num_unusable": len(unusable),
        "set_aside": _entries(store / "quarantine"),
    }


def _entries(folder: Path) -> int:
    return len(os.listdir(folder)) if folder.is_dir() else 0


def served_facts(home: Path, base: Path | None, store: Path | None) -> Facts:
    """What a server would start from: `base` and `store`, each with an "error" where it cannot be read.

    No `base`: the demo, which may not be "there" yet. `store` is missing where no base can be read.
    """
    from peqa_runtime.demo.setup import SMOLLM2
    from peqa_runtime.errors import PeqaError
    from peqa_runtime.scales.scale_store import default_store

    source = base or home / "bases" / SMOLLM2.name
    facts: Facts = {"source": str(source)}
    if base is None and not source.exists():
        return facts | {"base": {"kind": "demo"}}
    try:
        facts["base"] = base_facts(source)
    except (PeqaError, OSError) as error:
        return facts | {"base": {"error": str(error)}}
    if facts["base"]["kind"] == "base":
        folder = store or default_store(home, facts["base"]["base_digest"])
        facts["folder"] = str(folder)
        try:
            facts["store"] = store_facts(folder, source)
        except (PeqaError, OSError) as error:
            facts["store"] = {"error": str(error)}
    return facts


def main(arguments: list[str]) -> int:
    """Print the facts that were asked for."""
    match arguments:
        case ["machine"]:
            facts = machine_facts()
        case ["served", home, base, store]:
            facts = served_facts(Path(home), Path(base) if base else None, Path(store) if store else None)
        case _:
            sys.stderr.write(f"{__doc__}\n")
            return 2
    sys.stdout.write(json.dumps(facts) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
