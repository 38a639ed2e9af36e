"""Triton kernels compiled for GPUs that need not be there, and what their machine code says."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes that one program may have


def compile_for(
    arch: int,
    kernel: Any,
    constants: dict[str, Any],
    types: dict[str, str],
    options: dict[str, Any],
    unaligned: tuple[str, ...] = (),
) -> Any:
    """A kernel's machine code; arguments without a type are integers, and all but `unaligned` divide by 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if signature[name] != "constexpr" and name not in unaligned:
            aligned[(i,)] = [["tt.divisibility", 16]]  # as a launcher would see
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def tool(name: str, *arguments: str | Path) -> str:
    """What one of Triton's own binary tools prints."""
    import triton.backends.nvidia

    program = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def on_its_file(name: str, compiled: Any, *arguments: str) -> str:
    """What a tool prints of the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return tool(name, *arguments, file.name)


def machine_code(compiled: Any) -> str:
    """The kernel's SASS."""
    return on_its_file("nvdisasm", compiled, "-c")


def registers_and_stack(compiled: Any) -> tuple[int, int]:
    """Registers of a thread, and the bytes of stack that it takes: registers that did not suffice end there."""
    usage = on_its_file("cuobjdump", compiled, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) ", usage)
    assert found, usage
    return int(found[1]), int(found[2])


def assert_no_spill(compiled: Any, arch: int, what: object = "") -> None:
    """The stack of the machine code is empty, and the shared memory fits."""
    stack = registers_and_stack(compiled)[1]
    assert stack == 0, f"{what}: {stack} bytes of registers spilled"
    assert compiled.metadata.shared <= SHARED[arch], what
