"""What several test files need: small experiments, a Ray of our own, the real data sets."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from tests.places import REAL_DATA

# No test joins a Ray that runs on this machine already.
os.environ["RAY_ADDRESS"] = "local"
# As the pipeline does where it starts Ray: or workers get nothing beside three processes of tests.
os.environ.setdefault("RAY_worker_niceness", "0")
# Nobody looks at what Ray measures of itself here, and each start of it would set that up.
os.environ.setdefault("RAY_enable_metrics_collection", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from pipeline.config.experiment import Experiment
from pipeline.config.loading import from_dict

pytest_plugins = ["tests.allowed_skips"]


def pytest_configure() -> None:
    """A shell that starts the tests in the background has them ignore Ctrl-C; some send it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: the one begun last would keep a single process busy in the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture
def quick() -> dict[str, Any]:
    """A small sinusoid experiment in process, without compilation or tracking; change at will."""
    return {
        "name": "quick",
        "task": {"kind": "sinusoid", "shots": 5, "queries": 5},
        "model": {"kind": "mlp", "hidden": [8]},
        "inner": {"lr": 0.01, "steps": 2},
        "outer": {"lr": 0.01, "iterations": 6, "tasks_per_batch": 10, "tasks_per_chunk": 3},
        "compute": {"compile": "never", "device": "cpu", "threads": 1},
        "cluster": {"workers": 0, "cpus_per_worker": 0.5},
        "evaluation": {"tasks": 6, "validation_tasks": 5, "steps": [0, 1, 3]},
        "tracking": {"enabled": False},
    }


@pytest.fixture
def moving(quick: dict[str, Any]) -> dict[str, Any]:
    """A small navigation experiment. TRPO solves for its direction in three steps instead of ten,
    which are most of an iteration; whoever wants another update replaces the whole section."""
    return {
        **quick,
        "task": {"kind": "navigation", "trajectories": 8, "horizon": 10},
        "model": {"kind": "gaussian-policy", "hidden": [8]},
        "inner": {"lr": 0.1, "steps": 1},
        "outer": {"iterations": 4, "tasks_per_batch": 6, "tasks_per_chunk": 4},
        "reinforcement": {"cg_iterations": 3},
        "evaluation": {
            "tasks": 6,
            "validation_tasks": 5,
            "steps": [0, 1, 2],
            "baselines": ["random-init", "oracle"],
        },
    }


@pytest.fixture(params=["quick", "moving"])
def either(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Supervised and reinforcement learning tasks: what holds for both."""
    settings: dict[str, Any] = request.getfixturevalue(request.param)
    return settings


def experiment_of(settings: dict[str, Any], **sections: dict[str, Any]) -> Experiment:
    """The experiment of these settings, with sections changed: `outer={"iterations": 9}`."""
    changed = {k: dict(v) if isinstance(v, dict) else v for k, v in settings.items()}
    for name, values in sections.items():
        changed[name] = {**changed.get(name, {}), **values}
    return from_dict(changed)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One local Ray for all tests that take it; started here, so stopped here."""
    import ray

    start_local_ray()
    yield
    ray.shutdown()


@pytest.fixture
def no_ray() -> Iterator[None]:
    """No Ray in this process; that of other tests comes back afterwards."""
    import ray

    there = ray.is_initialized()
    ray.shutdown()
    yield
    ray.shutdown()
    if there:
        start_local_ray()


def start_local_ray() -> None:
    """Four CPUs, nothing printed."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    """Tests share two cores; results must not depend on the number found in the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, in order."""
    figures: list[Figure] = []
    original = Figure.savefig

    def remember(self: Figure, *args: object, **settings: object) -> None:
        figures.append(self)
        original(self, *args, **settings)

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the real data sets; tests that need it are skipped where it is missing."""
    if not (REAL_DATA / "omniglot" / "images_background.zip").exists():
        pytest.skip(f"no data sets in {REAL_DATA} (MAML_TEST_DATA names another folder)")
    return REAL_DATA
