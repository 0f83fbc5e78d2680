"""The wings of the house: who may import whom, so that the order of imports is that of the data."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.places import ROOT

PIPELINE = ROOT / "pipeline"

USES = {
    "config": "",
    "maml": "",
    "rl": "config maml",
    "worker": "config maml rl",
    "cluster": "config maml worker",
    "runs": "config maml worker",
    "evaluation": "config maml worker cluster runs",
    "training": "config maml worker cluster runs evaluation",
    "search": "config worker cluster runs evaluation training",
    "cli": "config maml cluster runs evaluation training search",
}
"""Every wing and the wings that it imports from; all of them may import from tasks/."""

ONLY_IN = {
    "ray": ("cluster/", "search/", "training/placement.py", "training/ray_train.py"),
    "mlflow": ("runs/", "search/"),
    "typer": ("cli/",),
    "rich": ("cli/",),
    "argparse": ("cli/",),
    "pyarrow": ("runs/checkpoint.py",),
}


def modules_imported(path: Path) -> set[str]:
    """The modules that a file imports anywhere, with dots."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}: a relative import"
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {each.value for each in node.args if isinstance(each, ast.Constant)}
    return found


def files(folder: Path) -> list[Path]:
    """The Python files below a folder; a rule that looked at none would hold for nothing."""
    found = sorted(folder.rglob("*.py"))
    assert found, folder
    return found


def test_every_file_stands_in_a_wing() -> None:
    folders = {path.name for path in PIPELINE.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == set(USES)
    assert [path.name for path in PIPELINE.glob("*.py")] == ["__init__.py"]
    for wing in USES:
        assert not [path for path in files(PIPELINE / wing) if path.parent.name != wing]


def test_wings_use_only_those_above_them() -> None:
    """The table has no way back: its own order is the order of the data flow."""
    above: list[str] = []
    for wing, used in USES.items():
        assert set(used.split()) <= set(above), wing
        above.append(wing)


@pytest.mark.parametrize("wing", USES)
def test_a_wing_imports_what_the_table_says(wing: str) -> None:
    found = {
        module.split(".")[1]
        for path in files(PIPELINE / wing)
        for module in modules_imported(path)
        if module.startswith("pipeline.")
    }
    assert found - {wing} == set(USES[wing].split())


@pytest.mark.parametrize("wing", USES)
def test_no_circle_within_a_wing(wing: str) -> None:
    graph = {
        f"pipeline.{wing}.{path.stem}": {
            module for module in modules_imported(path) if module.startswith(f"pipeline.{wing}.")
        }
        for path in files(PIPELINE / wing)
    }
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_nothing_imports_the_package_as_a_whole() -> None:
    """Its names are for users; inside, an import says which file it means."""
    for path in files(PIPELINE):
        assert "pipeline" not in modules_imported(path), path


def test_tasks_know_nothing_of_the_pipeline() -> None:
    for path in files(ROOT / "tasks"):
        for module in modules_imported(path):
            assert module.split(".")[0] not in {"pipeline", "ray", "mlflow"}, path


@pytest.mark.parametrize("package", ONLY_IN)
def test_packages_stay_where_they_belong(package: str) -> None:
    for path in files(PIPELINE):
        where = str(path.relative_to(PIPELINE))
        if package in {module.split(".")[0] for module in modules_imported(path)}:
            assert where.startswith(ONLY_IN[package]), f"{where} imports {package}"


def test_only_the_command_line_prints() -> None:
    for path in files(PIPELINE):
        if path.parent.name == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            said = ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""
            assert said not in ("print", "sys.stdout", "sys.stderr", "logging.StreamHandler"), path


def test_the_mathematics_needs_torch_and_numpy_alone() -> None:
    """From sampling to meta-gradient, so that it can be measured where nothing else is."""
    allowed = {"torch", "numpy", "tasks", "pipeline"} | set(sys.stdlib_module_names)
    for path in files(PIPELINE / "maml"):
        others = {module.split(".")[0] for module in modules_imported(path)} - allowed
        assert not others, f"{path} imports {others}"
    blocked = ["pydantic", "ray", "mlflow", "pyarrow", "yaml", "rich", "typer", "matplotlib"]
    names = [path.stem for path in files(PIPELINE / "maml") if path.stem != "__init__"]
    code = (
        "import sys\n"
        f"for name in {blocked}: sys.modules[name] = None\n"
        "import tasks.sinusoid, tasks.quadratic, tasks.glyphs, tasks.omniglot\n"
        + "".join(f"import pipeline.maml.{name}\n" for name in names)
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_an_experiment_is_checked_without_the_compiler() -> None:
    """Torch imports its compiler, for two seconds, where the first optimiser of a process is built;
    a command that only looks at an experiment builds none, unless it has a schedule to try out."""
    code = (
        "import sys; from pipeline.config.loading import load\n"
        "assert load('sinusoid').outer.scheduler is None\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("folder", ["pipeline", "tasks", "benchmarks"])
def test_functions_stay_short(folder: str) -> None:
    """A function of more than 60 lines needs a comment above it that says why: `# Long: ...`."""
    for path in files(ROOT / folder):
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            first = min(each.lineno for each in (node, *node.decorator_list))
            above = itertools.takewhile(
                lambda line: line.strip().startswith("#"), reversed(lines[: first - 1])
            )
            reason = any(line.strip().startswith("# Long: ") for line in above)
            where = f"{path}:{node.lineno}: {node.name}: {length} lines"
            assert length <= 60 or reason, where
            assert length > 60 or not reason, f"{where} need no reason"


@pytest.mark.parametrize("folder", ["pipeline", "tasks", "tests", "benchmarks"])
def test_files_stay_small(folder: str) -> None:
    for path in files(ROOT / folder):
        assert len(path.read_text().splitlines()) <= 400, path
