"""The house keeps its floors: who may import whom, what stays free of torch, and names that must not clash."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "kernels": "peqa_kernels",
    "peqa_runtime": "peqa_runtime",
    "server": "peqa_server",
    "loadtest": "peqa_loadtest",
}
MAY_IMPORT = {
    "kernels": {"peqa_kernels"},
    "peqa_runtime": {"peqa_kernels", "peqa_runtime"},
    "server": {"peqa_runtime", "peqa_server"},
    "loadtest": {"peqa_loadtest"},
}
FORBIDDEN = {  # outside packages that a floor must not know
    "kernels": {"transformers", "safetensors", "fastapi", "pydantic", "uvicorn", "typer", "rich"},
    "peqa_runtime": {"fastapi", "pydantic", "uvicorn", "prometheus_client"},
    "server": {"torch", "triton"},
    "loadtest": {"torch", "transformers", "pydantic"},
}
WITHOUT_TORCH = [
    "peqa_runtime/core.py",
    "peqa_runtime/errors.py",
    "peqa_runtime/scales/task_registry.py",
    "peqa_runtime/engine/bank_rows.py",
    "peqa_runtime/engine/batch.py",
    "peqa_runtime/engine/block_manager.py",
    "peqa_runtime/engine/fair_queue.py",
    "peqa_runtime/engine/giving_way.py",
    "peqa_runtime/engine/prefix_cache.py",
    "peqa_runtime/engine/scheduler.py",
    "peqa_runtime/engine/sequence.py",
]
# room of peqa_runtime -> rooms that it must not import
ROOMS_APART = {
    "model": {"engine", "training", "evaluation", "cli", "commands", "bench"},
    "scales": {"engine", "model", "training", "evaluation", "cli", "commands", "bench"},
    "engine": {"training", "evaluation", "cli", "commands", "bench"},
    "training": {"engine", "evaluation", "cli", "commands", "bench"},
    "evaluation": {"cli", "commands", "bench"},
}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full dotted names that a file imports anywhere, type-checking imports included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name, not relatively"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("folder", PACKAGES)
def test_imports_go_down_only(folder: str) -> None:
    ours = set(PACKAGES.values())
    for path in sources(folder):
        tops = {name.split(".")[0] for name in imported(path)}
        assert not (tops & ours) - MAY_IMPORT[folder], f"{path} imports an upper floor"
        assert not tops & FORBIDDEN[folder], f"{path} imports {tops & FORBIDDEN[folder]}"


@pytest.mark.parametrize("file", WITHOUT_TORCH)
def test_policy_is_free_of_torch(file: str) -> None:
    done: set[str] = set()
    todo = [file]
    while todo:  # follow our own imports too
        path = todo.pop()
        done.add(path)
        names = imported(ROOT / path)
        assert "torch" not in {name.split(".")[0] for name in names}, f"{file} reaches torch through {path}"
        for name in names:
            candidate = name.replace(".", "/") + ".py"
            if (ROOT / candidate).is_file() and candidate not in done:
                todo.append(candidate)


@pytest.mark.parametrize("room", ROOMS_APART)
def test_rooms_of_the_runtime_stay_apart(room: str) -> None:
    for path in sources(f"peqa_runtime/{room}"):
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "peqa_runtime" and len(parts) > 1:
                assert parts[1] not in ROOMS_APART[room], f"{path} imports {name}"


def test_server_uses_public_names_of_the_runtime_only() -> None:
    for path in sources("server"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peqa_runtime"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, f"{path} imports private names {private}"


def test_local_kernels_do_not_look_like_the_hub_package() -> None:
    code = (
        "import kernels, peqa_kernels, transformers.utils.import_utils as u; "
        "assert not hasattr(kernels, '__version__'); assert not u.is_kernels_available()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_kernels_import_neither_triton_nor_transformers() -> None:
    code = (
        "import sys, peqa_kernels.quant_matmul, peqa_kernels.paged_attention, peqa_kernels.packing, "
        "peqa_kernels.elementwise; "
        "assert not {'triton', 'transformers', 'pydantic', 'fastapi'} & set(sys.modules), 'imported too much'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_runtime_imports_no_server_package() -> None:
    code = (
        "import sys, peqa_runtime, peqa_runtime.model, peqa_runtime.scales, peqa_runtime.engine; "
        "assert not {'pydantic', 'fastapi', 'uvicorn'} & set(sys.modules), 'imported too much'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_package_marker_under_tests() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_package_is_listed_in_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for folder, name in PACKAGES.items():
        for marker in (ROOT / folder).rglob("__init__.py"):
            dotted = ".".join([name, *marker.parent.relative_to(ROOT / folder).parts])
            assert f'"{dotted}"' in text, f"{dotted} is missing from [tool.setuptools] packages"


@pytest.mark.parametrize("gpu", [True, False])
def test_make_installs_the_torch_that_fits_the_machine(gpu: bool, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\n" + ("echo 'GPU 0: NVIDIA'\n" if gpu else "exit 9\n"))
    smi.chmod(0o755)
    planned = subprocess.run(
        ["make", "-n", "setup", f"VENV={tmp_path}/venv"],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MAKEFLAGS": ""},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert ("for CUDA" in planned) is gpu
    assert ('[ -n "yes" ]' in planned) is gpu  # the branch without "+cpu"


def test_the_kernels_bench_runs_without_set_up() -> None:
    """On a machine that has torch and triton, and no network."""

    def dry(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            "make",
            "-n",
            *arguments,
            "SETUP=0",
            "PYTHON=python3.x",
            "ARGS=--device cuda",
            "OUT=rows.json",
        ]
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | {"MAKEFLAGS": ""}, capture_output=True, text=True
        )

    done = dry("bench-kernels")
    assert done.returncode == 0, done.stderr
    assert (
        "PYTHONPATH=build/types python3.x -m peqa_kernels.bench --out rows.json --device cuda" in done.stdout
    )
    assert "pip" not in done.stdout
    refused = dry("bench-engine")
    assert refused.returncode != 0
    assert "SETUP=0 goes with bench-kernels only" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "status", "sentence"),
    [
        (["peqa_kernels.bench", "--help"], 0, "--device"),
        (["peqa_kernels.bench", "--device", "cuda"], 2, "no CUDA device"),
        (["peqa_kernels.quant_matmul.cli", "--rows", "16"], 2, "torch sees none"),
        (["peqa_runtime.bench", "--help"], 0, "--only"),
        (["peqa_runtime.bench", "no-such-base", "--only", "gpu"], 2, "no CUDA device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_gpu_benches_start_without_the_servers_packages(
    command: list[str], status: int, sentence: str, tmp_path: Path
) -> None:
    """As far as they come without a GPU."""
    missing = ("fastapi", "pydantic", "uvicorn", "starlette", "prometheus_client", "llguidance")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({missing}))\n")
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr[-2000:]
    assert sentence in done.stdout + done.stderr


@pytest.mark.parametrize(
    "document", [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md"], ids=lambda p: p.name
)
def test_every_row_of_a_table_has_its_heads_cells(document: Path) -> None:
    """One more, and what follows stands under a foreign head."""
    cells = 0
    for number, line in enumerate(document.read_text().splitlines(), 1):
        if not line.startswith("|"):
            cells = 0
            continue
        found = re.sub(r"`[^`]*`", "", line).replace("\\|", "").count("|")
        cells = cells or found
        assert found == cells, f"{document.name}, line {number}: {found - 1} cells, the head has {cells - 1}"
