"""Compile the CPU kernels when the package is installed. Everything else stands in pyproject.toml."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

NATIVE = Path(__file__).parent / "kernels" / "native"


class BuildKernels(build_py):
    """Compiles into kernels/native/, from where an editable install loads and a wheel takes the libraries."""

    def run(self) -> None:
        """Compile, then go on; a missing or failing compiler is said in one line and stops nothing."""
        spec = importlib.util.spec_from_file_location("peqa_native_compile", NATIVE / "compile.py")
        assert spec is not None
        assert spec.loader is not None
        compiler = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(compiler)
        try:
            if compiler.is_current():  # an editable install may be repeated for an extra
                super().run()
                return
            made = compiler.compile_all()
            sys.stderr.write(f"peqa: compiled the CPU kernels: {', '.join(path.name for path in made)}\n")
        except (RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            sys.stderr.write(f"peqa: CPU kernels not compiled, torch's slower ones will be used: {reason}\n")
        super().run()


class WithKernels(Distribution):
    """Says that a wheel belongs to one platform; there is no extension module that would say so."""

    def has_ext_modules(self) -> bool:
        """Whether the wheel holds compiled code."""
        return True


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and every Python 3: the libraries use nothing of Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform of the wheel's name."""
        return "py3", "none", super().get_tag()[2]


setup(distclass=WithKernels, cmdclass={"build_py": BuildKernels, "bdist_wheel": PlatformWheel})
