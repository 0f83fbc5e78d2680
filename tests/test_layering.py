"""The floors of the house: a file imports only from files below it, so imports follow the data."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = [
    "components",
    "estimates",
    "settings",
    "search_section",
    "config",
    "config_errors",
    "algorithms",
    "phases",
    "schedulers",
    "experiments",
    "search_space",
    "parameters",
    "models",
    "meta_loss",
    "update_rules",
    "adaptation",
    "compilation",
    "inner_loop",
    "meta_gradient",
    "learning_curve",
    "diagnostics",
    "representations",
    "policies",
    "advantages",
    "policy_gradient",
    "experience",
    "natural_gradient",
    "chunk_jobs",
    "domain",
    "task_supply",
    "supervised",
    "programs",
    "control",
    "learner",
    "chunk",
    "adapter",
    "exported_model",
    "workers",
    "chunk_actor",
    "ray_cluster",
    "ray_workers",
    "aggregation",
    "outer_update",
    "policy_update",
    "placement",
    "health",
    "files",
    "checkpoint",
    "mlflow_sender",
    "tracking",
    "mlflow_ui",
    "runs",
    "run_folder",
    "evaluation",
    "comparison",
    "analysis",
    "export",
    "figures",
    "plots",
    "control_plots",
    "health_plots",
    "analysis_report",
    "report",
    "endings",
    "session",
    "opening",
    "pretraining",
    "train_workers",
    "training",
    "search_trial",
    "search_plots",
    "search_report",
    "search_runs",
    "search_tune",
    "search",
    "job_package",
    "jobs",
    "console",
    "search_console",
    "cli_errors",
    "cli_data",
    "cli_search",
    "cli_jobs",
    "cli_results",
    "cli_runs",
    "cli",
]
# Imported where it is called, because it needs what stands above it: a model builder is named by
# the configuration.
BY_NAME = {("components", "models")}
LIGHT = [
    "parameters",
    "models",
    "meta_loss",
    "update_rules",
    "adaptation",
    "compilation",
    "inner_loop",
    "meta_gradient",
]


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports anywhere, as 'tasks' or 'pipeline.NAME'."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in ("pipeline", "tasks"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_every_file_has_a_floor() -> None:
    files = {path.stem for path in (ROOT / "pipeline").glob("*.py")} - {"__init__"}
    assert files == set(FLOORS)


@pytest.mark.parametrize("name", FLOORS)
def test_imports_go_down(name: str) -> None:
    floor = FLOORS.index(name)
    for module in imported(ROOT / "pipeline" / f"{name}.py"):
        package, _, other = module.partition(".")
        if package == "pipeline" and other and (name, other) not in BY_NAME:
            assert FLOORS.index(other) < floor, f"{name} imports {other}, which stands above it"


def test_tasks_know_nothing_of_the_pipeline() -> None:
    files = list((ROOT / "tasks").rglob("*.py"))
    assert files
    for path in files:
        for module in imported(path):
            assert module.split(".")[0] not in {"pipeline", "ray", "mlflow"}, path


def test_only_the_command_line_parses_or_prints() -> None:
    for path in (ROOT / "pipeline").glob("*.py"):
        if path.stem in {"cli", "cli_data", "cli_jobs", "cli_results", "cli_runs", "console"}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            assert not (isinstance(called, ast.Name) and called.id == "print"), path


def test_only_stores_and_checkpoints_import_pyarrow() -> None:
    users = {
        path.stem
        for folder in ("pipeline", "tasks")
        for path in (ROOT / folder).rglob("*.py")
        if any(module.split(".")[0] == "pyarrow" for module in imported(path))
    }
    assert users == {"image_store", "store_cache", "checkpoint"}


def test_the_computation_needs_torch_and_numpy_alone() -> None:
    """From sampling to meta-gradient, so that it can be measured where nothing else is."""
    blocked = ["pydantic", "ray", "mlflow", "pyarrow", "yaml", "rich", "typer", "matplotlib"]
    code = (
        "import sys\n"
        f"for name in {blocked}: sys.modules[name] = None\n"
        "import tasks.sinusoid, tasks.quadratic, tasks.glyphs, tasks.omniglot\n"
        + "".join(f"import pipeline.{name}\n" for name in LIGHT)
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_files_stay_small() -> None:
    for folder in ("pipeline", "tasks", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 420, path
