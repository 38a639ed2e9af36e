"""The package's front: every public name is there, and asking for none of them imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

import peqa_runtime


@pytest.mark.parametrize("name", peqa_runtime.__all__)
def test_a_public_name_is_there(name: str) -> None:
    value = getattr(peqa_runtime, name)
    assert getattr(value, "__name__", name) == name


def test_public_names_are_sorted_and_each_has_a_home() -> None:
    assert set(peqa_runtime.__all__) == set(peqa_runtime._HOMES)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = peqa_runtime.no_such_name


def test_the_package_itself_imports_no_torch() -> None:
    code = (
        "import sys, peqa_runtime, peqa_runtime.errors; print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
