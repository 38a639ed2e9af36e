"""Which build is loaded, and what happens where none can be."""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import subprocess
import sys
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


ON_OLDER_CPUS = """
from pathlib import Path

import torch
from native_cases import make_weight, rows_of

from peqa_kernels import native
from peqa_kernels.native import isa
from peqa_kernels.quant_matmul import LinearBank, prepare, quant_matmul, quant_matmul_reference

def powers(*shape):
    scales = 2.0 ** torch.randint(-1, 2, shape)
    scales[0] = 1.0
    return scales

def multiply(bits, rows):
    weight = make_weight(70, 96, bits, 32, whole_zeros=True)
    weight.scales[:] = 2.0 ** torch.randint(-2, 2, weight.scales.shape)
    prepared = prepare(weight, segments=(30, 40))
    assert prepared.backend == "native", prepared.backend
    bank = LinearBank((30, 40), powers(5, 70), powers(5, 2, 96), powers(5, 3, 70))
    x, row, group_row = torch.randint(-8, 9, (rows, 96)).float(), rows_of(rows), rows_of(rows)
    got = quant_matmul(x, prepared, bank=bank, row=row, group_row=group_row)
    assert torch.equal(got, quant_matmul_reference(x, weight, None, bank, row, group_row)), (bits, rows)

here, seen = isa.cpu_flags(), set()
masks = {
    "generic": ("amx", "avx", "fma", "f16c"),
    "avx2": ("amx", "avx512"),
    "avx512": ("amx", "avx512_vnni"),
    "avx512vnni": ("amx",),
}
for name, missing in masks.items():
    if name not in {build.name for build in isa.usable(flags=here)}:
        continue
    isa.cpu_flags = lambda: frozenset(flag for flag in here if not flag.startswith(missing))
    native.load.cache_clear()
    assert native.load().isa.name == name, (native.load().isa.name, name)
    for bits in (2, 3, 4, 8):
        for rows in (1, 9, 200):
            multiply(bits, rows)
    seen.add(name)
    maps = Path("/proc/self/maps").read_text()
    assert {build.name for build in isa.builds() if build.file_name in maps} == seen, (maps, seen)
print(*seen)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86 has builds for several kinds of CPU")
def test_where_features_are_masked_off_a_build_without_them_is_loaded_and_computes() -> None:
    """The whole op, from the oldest CPU up, in a process of its own: no other build is even mapped into it."""
    found = subprocess.run(
        [sys.executable, "-c", ON_OLDER_CPUS],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert found.returncode == 0, found.stderr
    assert "generic" in found.stdout.split()


PREFIXES = {"26", "2e", "36", "3e", "64", "65", "66", "67", "f0", "f2", "f3", *(f"4{i:x}" for i in range(16))}
SSE3 = re.compile("addsubp|haddp|hsubp|lddqu|movddup|movs[hl]dup")
COUNTS = {"lzcnt", "popcnt", "tzcnt"}
BMI = re.compile("andn$|bextr|bls|bzhi|mulx$|pdep|pext|rorx|sarx|sh[lr]x")


def features_of(library: Path) -> dict[str, str]:
    """Instruction set extensions that a library has instructions of, each with one of them, disassembled.

    In 64-bit code a first byte 62 is EVEX (AVX-512), C4 or C5 is VEX (AVX, AVX2, FMA, F16C and some more).
    """
    listing = subprocess.run(
        ["objdump", "-d", "-w", library], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, str] = {}
    for line in listing.splitlines():
        _, _, rest = line.partition(":\t")
        codes, _, text = rest.partition("\t")
        octets = codes.split()
        name = next((word for word in text.split() if "{" not in word), "")
        while octets and octets[0] in PREFIXES:
            octets.pop(0)
        if not text or not octets:
            continue
        if name.startswith("vpdp"):
            found.setdefault("vnni", line)
        if name.startswith(("tdp", "tile", "ldtilecfg")):
            found.setdefault("amx", line)
        if octets[0] == "62" or "%zmm" in text:
            found.setdefault("avx512", line)
        elif octets[0] in ("c4", "c5"):
            found.setdefault("avx", line)
            if re.search(r"%k[0-7]", text):
                found.setdefault("avx512", line)
            if BMI.match(name):
                found.setdefault("bmi", line)
        elif octets[0] == "d5":
            found.setdefault("apx", line)
        elif octets[:2] in (["0f", "38"], ["0f", "3a"]) or SSE3.match(name):
            found.setdefault("sse3 to sse4", line)
        elif name in COUNTS:
            found.setdefault("popcnt", line)
    return found


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86 has builds for several kinds of CPU")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
@pytest.mark.parametrize(
    ("name", "has", "may_have"),
    [
        ("generic", set(), set()),
        ("avx2", {"avx"}, {"sse3 to sse4", "popcnt"}),
        ("avx512", {"avx", "avx512"}, {"sse3 to sse4", "popcnt"}),
        ("avx512vnni", {"avx", "avx512", "vnni"}, {"sse3 to sse4", "popcnt"}),
    ],
)
def test_a_build_has_no_instructions_but_those_it_is_chosen_for(
    name: str, has: set[str], may_have: set[str]
) -> None:
    found = features_of(Path(native.__file__).parent / f"_peqa_{name}.so")
    assert {feature: line for feature, line in found.items() if feature not in has | may_have} == {}
    assert has <= set(found)


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
