"""A distributed pipeline for model-agnostic meta-learning, in the order of the data flow.

    task distribution ──sample──▶ task batch ──adapt (eq. 2)──▶ θ'_i
        p(T), eq. 1                worker/        maml/            │ query loss (eq. 3), maml/
                                                                  ▼
    checkpoint ◀── outer update (eq. 4) ◀── aggregate ◀──── meta-gradient per chunk
    MLflow     ◀──┘    driver                driver            Ray actor, or in process

Tasks to act in have no batch to sample: the worker collects trajectories instead; everything after
that is the same. The driver (`training.loop`) waits for the slowest chunk of an iteration; workers
wait for the driver's next θ, and sample the next tasks meanwhile. Nobody waits for MLflow. A wing
imports only from those before it: config, maml, rl, worker, cluster, runs, evaluation, training,
search, cli.

What `from pipeline import ...` offers, each loaded at its first use:

    load            a shipped name or a YAML file, and overrides -> an Experiment
    Experiment      everything that is asked for: tasks, model, settings; checks itself
    train           meta-trains an experiment and meta-tests it; leaves a run's folder
    run_search      tries many settings with Ray Tune, ranked by validation
    evaluate_run    meta-tests the parameters of a finished run
    compare_runs    compares finished runs on the same test tasks, task by task
    Adapter         a trained model at work: support set and queries -> answers

and the mathematics alone, for a training loop of your own:

    chunk_function  the function that computes the meta-gradient of a chunk of tasks
    Objective       the loss of a model under a task distribution
    Adaptation      what adapts, at which rates, by which optimiser
    Layout          named parameters <-> one flat vector
    Knobs           numbers that may change from call to call

`tasks.base` has the interface for task distributions of your own. Everything else may change.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Threads of torch that wait for each other spin, unless this is set before torch is imported. With
# other busy processes beside them, most of the time would go there.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from pipeline.config.experiment import Experiment
    from pipeline.config.loading import load
    from pipeline.config.version import __version__
    from pipeline.evaluation.comparison import compare_runs
    from pipeline.evaluation.meta_test import evaluate_run
    from pipeline.maml.adaptation import Adaptation
    from pipeline.maml.flat_vector import Layout
    from pipeline.maml.meta_gradient import Knobs, chunk_function
    from pipeline.maml.meta_loss import Objective
    from pipeline.runs.predictor import Adapter
    from pipeline.search.run import run_search
    from pipeline.training.loop import train

__all__ = [
    "Adaptation",
    "Adapter",
    "Experiment",
    "Knobs",
    "Layout",
    "Objective",
    "__version__",
    "chunk_function",
    "compare_runs",
    "evaluate_run",
    "load",
    "run_search",
    "train",
]

_HOMES = {
    "Adaptation": "pipeline.maml.adaptation",
    "Adapter": "pipeline.runs.predictor",
    "Experiment": "pipeline.config.experiment",
    "Knobs": "pipeline.maml.meta_gradient",
    "Layout": "pipeline.maml.flat_vector",
    "Objective": "pipeline.maml.meta_loss",
    "__version__": "pipeline.config.version",
    "chunk_function": "pipeline.maml.meta_gradient",
    "compare_runs": "pipeline.evaluation.comparison",
    "evaluate_run": "pipeline.evaluation.meta_test",
    "load": "pipeline.config.loading",
    "run_search": "pipeline.search.run",
    "train": "pipeline.training.loop",
}
"""Where the promised names are; importing all of it at once would take seconds."""


def __getattr__(name: str) -> Any:
    """Import a promised name at its first use (PEP 562). Raises AttributeError for any other."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
