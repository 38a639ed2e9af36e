"""PEP 517 hooks: setuptools, plus a C compiler from PyPI (`ziglang`) on machines that have none.

setup.py does the compiling; this file only decides what the isolated build environment must contain.
"""

from __future__ import annotations

import shutil

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403


def _compiler() -> list[str]:
    return [] if any(shutil.which(name) for name in ("cc", "gcc", "clang")) else ["ziglang"]


def get_requires_for_build_wheel(config_settings: dict[str, str] | None = None) -> list[str]:
    """Packages that building a wheel needs."""
    return _setuptools.get_requires_for_build_wheel(config_settings) + _compiler()


def get_requires_for_build_editable(config_settings: dict[str, str] | None = None) -> list[str]:
    """Packages that an editable install needs."""
    return _setuptools.get_requires_for_build_editable(config_settings) + _compiler()
