"""The public surface: complete, sorted, importable, documented, and cheap until it is used."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import peqa_runtime
from peqa_runtime import errors

SOURCE = Path(peqa_runtime.__file__)


def isort_key(name: str) -> tuple[int, str]:
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_names_are_sorted_and_unique() -> None:
    assert peqa_runtime.__all__ == sorted(set(peqa_runtime.__all__), key=isort_key)


@pytest.mark.parametrize("name", peqa_runtime.__all__)
def test_every_name_can_be_had_and_says_what_it_is(name: str) -> None:
    value = getattr(peqa_runtime, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__name__ == name
        assert inspect.getdoc(value)


def test_type_checkers_see_the_same_names() -> None:
    imported = {
        alias.name
        for node in ast.walk(ast.parse(SOURCE.read_text()))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert imported == set(peqa_runtime.__all__)


def test_every_error_is_public_and_in_the_drawn_tree() -> None:
    classes = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.PeqaError)
    }
    assert classes <= set(peqa_runtime.__all__)
    assert errors.__doc__
    assert all(name in errors.__doc__ for name in classes)


def test_what_a_program_needs_is_there() -> None:
    needed = "Engine AsyncEngine EngineConfig Request SamplingParams TokenOutput load TaskLibrary ScaleStore ScaleSet"
    assert set(needed.split()) <= set(peqa_runtime.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        peqa_runtime.nonsense  # noqa: B018


def test_importing_is_cheap() -> None:
    code = (
        "import sys, peqa_runtime; from peqa_runtime import Request, UnknownTask, EngineConfig; "
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
