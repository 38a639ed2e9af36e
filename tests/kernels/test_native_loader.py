"""Which build is loaded, and what happens where none can be."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from peqa_kernels import native
from peqa_kernels.native import compile as compile_module
from peqa_kernels.native import isa
from peqa_kernels.native.compile import SOURCES, compile_all, compilers, is_current
from peqa_kernels.native.isa import builds, cpu_flags, usable

AVX2 = frozenset({"sse2", "avx", "avx2", "fma", "f16c"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
AMX = AVX512 | {"avx512_vnni", "amx_tile", "amx_int8"}


@pytest.mark.parametrize(
    ("machine", "flags", "names"),
    [
        ("x86_64", AMX, ["amx", "avx512vnni", "avx512", "avx2", "generic"]),
        ("x86_64", AMX - {"amx_int8"}, ["avx512vnni", "avx512", "avx2", "generic"]),
        ("x86_64", AVX512, ["avx512", "avx2", "generic"]),
        ("x86_64", AVX512 - {"avx512vl"}, ["avx2", "generic"]),
        ("x86_64", AVX2, ["avx2", "generic"]),
        ("AMD64", AVX2 - {"fma"}, ["generic"]),
        ("x86_64", frozenset(), ["generic"]),
        ("aarch64", frozenset(), ["arm64"]),
        ("riscv64", AVX512, []),
    ],
)
def test_only_builds_whose_every_feature_is_listed_are_usable(
    machine: str, flags: frozenset[str], names: list[str]
) -> None:
    assert [build.name for build in usable(machine, flags)] == names


def test_a_feature_counts_only_if_every_core_has_it(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: avx2 fma avx512f\n\nprocessor\t: 1\nflags\t\t: avx2 fma\n")
    assert cpu_flags(cpuinfo) == {"avx2", "fma"}
    assert cpu_flags(tmp_path / "missing") == frozenset()


def test_a_missing_library_is_said_and_gives_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert native.load(folder=tmp_path) is None
        assert native.load(folder=tmp_path) is None
    assert len(caplog.records) == 1
    assert "peqa_kernels.native.compile" in caplog.records[0].getMessage()


def test_what_is_no_library_of_ours_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for build in builds():
        (tmp_path / build.file_name).write_bytes(b"not a library")
    assert native.load(folder=tmp_path) is None


needs_compiler = pytest.mark.skipif(not list(compilers()), reason="no C compiler")


@needs_compiler
def test_a_library_of_other_sources_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(Path(native.__file__).parent / "isa.py", tmp_path)
    for name in SOURCES:
        (tmp_path / name).write_text("typedef int nothing;\n")
    export = '__attribute__((visibility("default")))'
    (tmp_path / SOURCES[0]).write_text(f"{export} long long peqa_abi(void) {{ return 1; }}\n")
    assert len(compile_all(tmp_path)) == len(builds())
    assert native.load(folder=tmp_path) is None
    assert "ABI 1" in caplog.records[-1].getMessage()


@needs_compiler
@pytest.mark.slow
def test_the_installed_sources_compile_for_every_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The installation has made all builds of these very sources; the last, which is made quickest, is made again."""
    home = Path(native.__file__).parent
    assert is_current(), "`python -m peqa_kernels.native.compile` makes the builds of changed sources"
    assert [build.name for build in builds() if not (home / build.file_name).is_file()] == []
    last = builds()[-1]
    monkeypatch.setattr(compile_module, "_isa", lambda _folder: SimpleNamespace(builds=lambda: (last,)))
    assert [path.name for path in compile_all(output=tmp_path)] == [last.file_name]
    loaded = native.load(folder=tmp_path)
    assert loaded is not None
    assert loaded.isa == last


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86 has a build that compilers may not know")
def test_a_compiler_that_knows_no_matrix_tiles_makes_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "old-cc"
    made = 'while [ "$1" != -o ]; do shift; done; echo library > "$2"'
    old.write_text(f'#!/bin/sh\ncase "$*" in *-mamx*) echo unknown option >&2; exit 1;; esac\n{made}\n')
    old.chmod(0o755)
    monkeypatch.setenv("CC", str(old))
    (tmp_path / "_peqa_amx.so").write_text("of earlier sources")
    assert [path.name for path in compile_all(output=tmp_path)] == [
        build.file_name for build in builds() if build.name != "amx"
    ]
    assert not (tmp_path / "_peqa_amx.so").exists()


@pytest.mark.parametrize("breaks", [f"*{SOURCES[3]}*", "*-shared*"], ids=["a file", "the link"])
def test_what_cannot_be_compiled_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: str
) -> None:
    compiler, output = tmp_path / "cc", tmp_path / "made"
    made = 'while [ "$1" != -o ]; do shift; done; echo library > "$2"'
    compiler.write_text(f'#!/bin/sh\ncase "$*" in {breaks}) echo it is broken >&2; exit 1;; esac\n{made}\n')
    compiler.chmod(0o755)
    output.mkdir()
    for build in builds():
        (output / build.file_name).write_text("of earlier sources")
    monkeypatch.setattr("peqa_kernels.native.compile.compilers", lambda: iter([[str(compiler)]]))
    with pytest.raises(RuntimeError, match="cc: it is broken"):
        compile_all(output=output)
    assert {path.read_text() for path in output.iterdir()} == {"of earlier sources"}
    assert len(list(output.iterdir())) == len(builds())


def test_without_a_compiler_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peqa_kernels.native.compile.compilers", lambda: iter(()))
    with pytest.raises(RuntimeError, match="no C compiler"):
        compile_all(output=tmp_path)
    monkeypatch.setattr("peqa_kernels.native.compile.compilers", lambda: iter([["/nowhere/cc"]]))
    with pytest.raises(RuntimeError, match="/nowhere/cc"):
        compile_all(output=tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_up_to_date_is_not_compiled_again(tmp_path: Path) -> None:
    shutil.copy(Path(isa.__file__), tmp_path)
    (tmp_path / "kernel.c").write_text("int x;")
    assert not is_current(tmp_path), "nothing is made yet"
    later = time.time() + 10
    for build in builds():
        if build.wanted:
            (tmp_path / build.file_name).write_text("library")
            os.utime(tmp_path / build.file_name, (later, later))
    assert is_current(tmp_path), "a build that a compiler may not know need not be there"
    os.utime(tmp_path / "kernel.c", (later + 1, later + 1))
    assert not is_current(tmp_path)
