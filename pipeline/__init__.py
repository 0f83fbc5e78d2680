"""A distributed pipeline for model-agnostic meta-learning, in the order of the data flow.

    worker, a Ray actor or this process, for every chunk of the meta-batch:
        sample tasks (eq. 1) ─▶ adapt to each (eq. 2) ─▶ query losses (eq. 3) ─▶ meta-gradient
    driver:
        mean of the meta-gradients ─▶ outer update (eq. 4) ─▶ checkpoint, MLflow record

In reinforcement learning the worker collects trajectories instead of sampling a task batch;
everything after that is the same. The driver (`training.loop`) waits for the slowest chunk of an
iteration; workers wait for the driver's next θ, and sample the next tasks meanwhile. Nobody waits
for MLflow. A wing imports only from those before it: config, maml, rl, worker, cluster, runs,
evaluation, training, search, cli.

What `from pipeline import ...` offers, each loaded at its first use:

    load            a shipped name or a YAML file, and overrides -> an Experiment
    Experiment      everything that is asked for: tasks, model, settings; completes, checks itself
    train           meta-trains an experiment and meta-tests it; leaves a run's folder
    run_search      tries many settings with Ray Tune, ranked by validation
    evaluate_run    meta-tests the parameters of a finished run
    compare_runs    compares finished runs on the same test tasks, task by task
    Adapter         a trained model at work: support set and queries -> answers
    Curve           metrics after each number of gradient steps: what train and evaluate_run return
    Watcher         base class of those who want to be told how a training gets on
    ReportedError   base of all errors whose message is for a person; has an `exit_code`

and the mathematics alone, for a training loop of your own:

    chunk_function  the function that computes the meta-gradient of a chunk of tasks
    Objective       the loss of a model under a task distribution
    Adaptation      which parameters adapt, at which rates, by which inner optimiser
    Layout          named parameters <-> one flat vector
    Knobs           numbers that may change from call to call

For task distributions of your own, `tasks.base` has the interface, `tasks.random` the random
numbers of a task, `tasks.sinusoid` an example. Everything else may change.

Importing `pipeline` sets OMP_WAIT_POLICY=PASSIVE for this process and those that it starts, unless
the variable is set: torch's threads then sleep while they wait for each other, and leave the CPUs
to other workers. Without effect if torch was imported before.
"""

from importlib import import_module
from os import environ
from typing import TYPE_CHECKING, Any

environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from pipeline.config.experiment import Experiment
    from pipeline.config.loading import load
    from pipeline.config.version import __version__
    from pipeline.evaluation.comparison import compare_runs
    from pipeline.evaluation.meta_test import Curve, evaluate_run
    from pipeline.maml.adaptation import Adaptation
    from pipeline.maml.flat_vector import Layout
    from pipeline.maml.meta_gradient import Knobs, chunk_function
    from pipeline.maml.meta_loss import Objective
    from pipeline.runs.predictor import Adapter
    from pipeline.search.run import run_search
    from pipeline.training.loop import train
    from pipeline.training.session import Watcher
    from tasks.errors import ReportedError

__all__ = [
    "Adaptation",
    "Adapter",
    "Curve",
    "Experiment",
    "Knobs",
    "Layout",
    "Objective",
    "ReportedError",
    "Watcher",
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
    "Curve": "pipeline.evaluation.meta_test",
    "Experiment": "pipeline.config.experiment",
    "Knobs": "pipeline.maml.meta_gradient",
    "Layout": "pipeline.maml.flat_vector",
    "Objective": "pipeline.maml.meta_loss",
    "ReportedError": "tasks.errors",
    "Watcher": "pipeline.training.session",
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
    return sorted(__all__)
