"""What `from pipeline import ...` promises: the names, their documentation, that they load late."""

from __future__ import annotations

import ast
import inspect
import os
import pydoc
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

import pipeline
from tests.places import ROOT
from tests.readme import README, blocks

NAMES = sorted(set(pipeline.__all__) - {"__version__"})


def imported_names(code: str) -> set[str]:
    """The X of every `from pipeline import X`."""
    return {
        alias.name
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ImportFrom) and node.module == "pipeline"
        for alias in node.names
    }


def test_the_table_is_what_is_promised() -> None:
    assert set(pipeline._HOMES) == set(pipeline.__all__)
    assert len(set(pipeline.__all__)) == len(pipeline.__all__)
    assert dir(pipeline) == sorted(pipeline.__all__)


def test_checkers_see_the_same_names() -> None:
    """The imports under TYPE_CHECKING, which nothing runs, against the table."""
    tree = ast.parse((ROOT / "pipeline" / "__init__.py").read_text())
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == pipeline._HOMES


def test_tasks_that_readmes_import_from_are_promised() -> None:
    trees = [ast.parse(code) for code in blocks("python")]
    modules = {
        node.module
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tasks")
    }
    assert modules
    for text in (pipeline.__doc__ or "", README.read_text()):
        assert not [module for module in modules if f"`{module}`" not in text]


def test_no_name_hides_a_wing() -> None:
    wings = {path.name for path in (ROOT / "pipeline").iterdir() if path.is_dir()}
    assert not wings & set(pipeline.__all__)


def test_readmes_name_what_is_promised() -> None:
    shown = {name for code in blocks("python") for name in imported_names(code)}
    assert shown
    assert shown <= set(pipeline.__all__)
    text = README.read_text()
    assert not [name for name in NAMES if not re.search(rf"\b{name}\b", text)]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there_and_documented(name: str) -> None:
    value = getattr(pipeline, name)
    assert value.__name__ == name
    assert value.__module__ == pipeline._HOMES[name]
    assert inspect.getdoc(value)
    assert re.search(rf"^    {name} +\S", pipeline.__doc__ or "", flags=re.M), "in help(pipeline)"
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        assert signature.return_annotation is not inspect.Signature.empty
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, parameter
            assert f"`{parameter.name}" in (value.__doc__ or ""), f"{parameter} is not explained"


def documented() -> list[tuple[str, Callable[..., object]]]:
    """The promised functions, and the methods of promised classes that are written in this project,
    by name."""
    found: list[tuple[str, Callable[..., object]]] = []
    for name in NAMES:
        value = getattr(pipeline, name)
        if inspect.isfunction(value):
            found.append((name, value))
            continue
        for method, each in inspect.getmembers(value, inspect.isroutine):
            written_here = str(getattr(each, "__module__", "")).startswith("pipeline")
            if written_here and not method.startswith("_"):
                found.append((f"{name}.{method}", each))
    return found


def test_defaults_have_names_that_read_well() -> None:
    shown = {name: str(inspect.signature(function)) for name, function in documented()}
    assert "Adaptation.of" in shown
    assert "should_stop: 'Callable[[], bool]' = <function never " in shown["train"]
    assert not [name for name, signature in shown.items() if "lambda" in signature]


def test_help_is_an_introduction() -> None:
    shown = pydoc.plain(pydoc.render_doc(pipeline))
    first, last = shown.index("model-agnostic meta-learning"), shown.index("Everything else may")
    assert first < shown.index("outer update (eq. 4)") < last < shown.index("PACKAGE CONTENTS")


def test_the_version_is_that_of_the_project() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", pipeline.__version__)


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'nothing'"):
        _ = pipeline.nothing
    with pytest.raises(ImportError, match="nothing"):
        exec("from pipeline import nothing")


def test_importing_the_package_loads_nothing_slow() -> None:
    code = (
        "import sys, pipeline\n"
        "dir(pipeline), pipeline.__version__\n"
        "slow = {'torch', 'numpy', 'ray', 'mlflow', 'pydantic', 'tasks'} & set(sys.modules)\n"
        "assert not slow, slow\n"
        "from pipeline import Layout\n"
        "assert 'torch' in sys.modules\n"
        "assert not {'ray', 'mlflow', 'pydantic'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(("given", "then"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep(given: str | None, then: str) -> None:
    """Set before torch is there, which reads it once; a person's own choice stays."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if given:
        environment["OMP_WAIT_POLICY"] = given
    code = "import os, sys, pipeline; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.stdout.split() == [then, "False"]
