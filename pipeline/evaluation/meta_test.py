"""Meta-test: measures how well new tasks are learned, after each number of gradient steps.

The tasks of a split are the same for every run. Every number is a mean over tasks with its 95 %
confidence interval, 1.96·sd/√n over the tasks, and comes with its protocol. The interval says
nothing of the spread over training seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.cluster.group import InProcess, WorkerGroup
from pipeline.config import json_text
from pipeline.config.experiment import Experiment
from pipeline.config.loading import ConfigError, absolute_path
from pipeline.maml.confidence import interval, mean_and_ci95
from pipeline.maml.flat_vector import FlatVector, flat_vector
from pipeline.runs.files import write_atomically
from pipeline.runs.folder import Which, parameters_of
from pipeline.worker.jobs import Evaluated, EvaluationJob, in_chunks
from pipeline.worker.learner import initial_parameters
from tasks.base import SPLITS, TaskDistribution

_NORMALISATION = {
    "batch": "statistics of the current batch, support and query apart",
    "batch-affine": "statistics of the current batch, support and query apart; scale and bias",
    "none": "none",
}
_OF_POLICIES = ("estimator", "discount", "gae_lambda", "update")
"""Settings of `reinforcement` that the protocol contains, where the experiment has that section."""
TRAINED, RANDOM = "trained", "random init"
ORACLE, CENTROID = "oracle", "nearest centroid"
BASELINES = (RANDOM, ORACLE, CENTROID)
_EVALUATED: dict[str, Evaluated] = {ORACLE: "oracle", CENTROID: "nearest centroid"}


@dataclass(frozen=True)
class Curve:
    """Metrics of a set of tasks after each of `steps` gradient steps."""

    who: str
    """'trained', or a baseline: 'random init', 'oracle', 'nearest centroid'."""
    variant: str
    """Name of the changed task settings (`evaluation.variants`), or ''."""
    steps: tuple[int, ...]
    mean: dict[str, list[float]]
    """By metric, one value per step; the tasks' `primary_metric` is always there."""
    ci95: dict[str, list[float]]
    """Half the width of the confidence interval, like `mean`."""
    protocol: dict[str, Any]
    """What the numbers mean: split, tasks and their settings, steps trained, normalisation."""

    @property
    def title(self) -> str:
        """The curve's name in a table or a legend."""
        if not self.variant:
            return self.who
        return self.variant if self.who == TRAINED else f"{self.variant}, {self.who}"

    def by_step(self, prefix: str) -> dict[str, float]:
        """Every value under a name of its own for a tracker: METRIC_stepS, METRIC_stepS_ci95."""
        return {
            f"{prefix}{name}_step{step}{suffix}": values[position]
            for suffix, table in (("", self.mean), ("_ci95", self.ci95))
            for name, values in table.items()
            for position, step in enumerate(self.steps)
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class EvaluationSpec(NamedTuple):
    """What θ is evaluated on: tasks 0 .. num_tasks - 1 of a split, after some gradient steps."""

    split: str
    num_tasks: int
    steps: tuple[int, ...]
    """Gradient steps after which metrics are reported, ascending."""
    variant: str = ""
    """Name of the changed task settings (`evaluation.variants`), or ''."""

    def changes(self, experiment: Experiment) -> dict[str, Any]:
        """The task settings that differ from the experiment's."""
        return experiment.evaluation.variants[self.variant] if self.variant else {}


def adaptation_curve_of(
    workers: WorkerGroup,
    experiment: Experiment,
    theta: FlatVector,
    spec: EvaluationSpec,
    who: str = TRAINED,
) -> Curve:
    """Evaluate θ (flat, [D]): means over the tasks, with their confidence intervals."""
    by_task = task_by_task(workers, experiment, theta, spec, _EVALUATED.get(who, "model"))
    return curve_of(experiment, by_task, spec, who)


def task_by_task(
    workers: WorkerGroup,
    experiment: Experiment,
    theta: FlatVector,
    spec: EvaluationSpec,
    evaluated: Evaluated = "model",
) -> dict[str, npt.NDArray[Any]]:
    """Metrics of single tasks by name, [steps, tasks]."""
    jobs = [
        EvaluationJob(spec.split, first, count, spec.steps, spec.changes(experiment), evaluated)
        for first, count in in_chunks(experiment, theta.size, spec.num_tasks)
    ]
    results = workers.run(theta, jobs)
    return {
        name: np.concatenate([result.metrics[name] for result in results], axis=1)
        for name in results[0].metrics
    }


def curve_of(
    experiment: Experiment,
    by_task: Mapping[str, npt.NDArray[Any]],
    spec: EvaluationSpec,
    who: str = TRAINED,
) -> Curve:
    """The curve of metrics of single tasks [steps, tasks]: means with confidence intervals."""
    estimates = {name: mean_and_ci95(values) for name, values in by_task.items()}
    return Curve(
        who,
        spec.variant,
        spec.steps,
        {name: mean.tolist() for name, (mean, _) in estimates.items()},
        {name: ci95.tolist() for name, (_, ci95) in estimates.items()},
        protocol(experiment, spec),
    )


def meta_test(
    workers: WorkerGroup,
    experiment: Experiment,
    theta: FlatVector,
    *,
    split: str = "test",
    num_tasks: int | None = None,
    steps: tuple[int, ...] | None = None,
    on_curve: Callable[[Curve], None] = lambda curve: None,
) -> list[Curve]:
    """Curves of the trained parameters and of the baselines, for every variant of the tasks.

    `num_tasks` and `steps` default to those of the experiment. `on_curve` is called with each curve
    as soon as it is complete.
    """
    baselines = [name.replace("-", " ") for name in experiment.evaluation.baselines]
    starting_points = {TRAINED: theta, ORACLE: theta, CENTROID: theta}
    if RANDOM in baselines:
        # Not the initial θ of the training, but another draw.
        fresh = initial_parameters(experiment, seed=experiment.seed + 1)
        starting_points[RANDOM] = flat_vector(fresh)
    curves = []
    for variant in experiment.evaluation.variants or ("",):
        spec = EvaluationSpec(
            split,
            num_tasks or experiment.evaluation.tasks,
            steps or experiment.report_steps,
            variant,
        )
        for who in (TRAINED, *baselines):
            curve = adaptation_curve_of(workers, experiment, starting_points[who], spec, who)
            on_curve(curve)
            curves.append(curve)
    return curves


def evaluate_run(
    experiment: Experiment,
    run_dir: str | Path,
    *,
    split: str = "test",
    num_tasks: int | None = None,
    steps: tuple[int, ...] | None = None,
    checkpoint: Which = "final",
) -> list[Curve]:
    """Meta-test the parameters of a finished run, in this process.

    `experiment` is that of the run, with settings changed where the test is to be another
    (`load(RUN_DIR/config.yaml, overrides)`); `run_dir` is its folder. `split` names the tasks:
    train, validation or test. `num_tasks` of them are adapted to, and metrics are reported after
    each number of gradient steps in `steps`; None: as the experiment's evaluation section says.
    `checkpoint` chooses the parameters: "final", those of the last iteration, or "best", those of
    the best validation.

    Returns a curve for each variant of the tasks and for each baseline on it. Raises
    CheckpointError if the parameters cannot be read or do not fit the model, ValueError or
    StoreError if such tasks cannot be sampled.
    """
    theta = parameters_of(experiment, absolute_path(run_dir), checkpoint)
    check_tasks(experiment, (split,))
    with InProcess(experiment, compile=False, warm_up=False) as workers:
        return meta_test(
            workers,
            experiment,
            flat_vector(theta),
            split=split,
            num_tasks=num_tasks,
            steps=steps,
        )


def check_tasks(experiment: Experiment, splits: Sequence[str] = SPLITS) -> None:
    """Check before a run what its tasks would only fail at later: data, classes, baselines.

    Raises ValueError naming the setting, or an error of the data.
    """
    task = experiment.build_task()
    for split in splits:
        task.check(split)
    if ORACLE in experiment.evaluation.baselines and not task.has_oracle(splits[-1]):
        raise ValueError(
            f"evaluation.baselines: {experiment.task.kind} tasks have no oracle; leave it out"
        )
    if CENTROID.replace(" ", "-") in experiment.evaluation.baselines and not task.has_classes:
        raise ValueError(
            f"evaluation.baselines: {experiment.task.kind} tasks have no classes, and so no "
            "nearest-centroid; leave it out"
        )
    for name, changes in experiment.evaluation.variants.items():
        variant = experiment.build_task(**changes)
        if (variant.input_shape, variant.output_size) != (task.input_shape, task.output_size):
            raise ValueError(
                f"evaluation.variants.{name}: its tasks need a model with other inputs or outputs"
            )
        variant.check(splits[-1])


def set_by_all(variants: Sequence[Mapping[str, Any]]) -> set[str]:
    """The task settings that every one of these variants sets: the experiment's do not count."""
    return set.intersection(*map(set, variants)) if variants else set()


def refuse_overridden(variants: Mapping[str, Mapping[str, Any]], overrides: Sequence[str]) -> None:
    """Raise ConfigError for an override of a task setting that every variant sets by itself."""
    given = [override.partition("=")[0].strip().split(".") for override in overrides]
    shadowed = set_by_all(list(variants.values()))
    ignored = [keys[1] for keys in given if keys[0] == "task" and keys[1:2] and keys[1] in shadowed]
    if ignored:
        raise ConfigError(
            "",
            [
                f"--set task.{name}: changes nothing, every meta-test of evaluation.variants "
                f"({', '.join(variants)}) sets {name}; add --set 'evaluation.variants={{}}' to "
                "test without them"
                for name in dict.fromkeys(ignored)
            ],
        )


def protocol(experiment: Experiment, spec: EvaluationSpec) -> dict[str, Any]:
    """What a reader must know to compare these numbers with others, as plain values."""
    inner, settings = experiment.inner, experiment.flat()
    special: dict[str, Any] = {}
    if inner.later_lr_factor != 1:
        special["inner_later_lr_factor"] = inner.later_lr_factor
    for name in _OF_POLICIES:
        if (path := f"reinforcement.{name}") in settings:
            special[name] = settings[path]
    return {
        **experiment.build_task(**spec.changes(experiment)).protocol(),
        "task_kind": experiment.task.kind,
        "split": spec.split,
        "tasks": spec.num_tasks,
        "algorithm": experiment.algorithm_name,
        "inner_lr": inner.lr
        if inner.rates == "fixed"
        else f"learned {inner.rates}, from {inner.lr}",
        "inner_optimizer": inner.optimizer,
        "inner_batch_size": inner.batch_size,
        "adapted": list(inner.adapted),
        "not_adapted": list(inner.not_adapted),
        "inner_steps_trained": inner.steps,
        **special,
        "normalisation": _NORMALISATION.get(
            experiment.model.settings.get("normalisation", ""), "as the model does"
        ),
        "ci95": "1.96 sd / sqrt(tasks)",
    }


def write_results(run_dir: Path, curves: Sequence[Curve]) -> None:
    """Write the curves of a meta-test to results.json."""
    content = json_text.write([curve.to_json() for curve in curves])
    write_atomically(run_dir / "results.json", content)


def as_series(curves: Sequence[Curve], metric: str) -> dict[str, dict[str, Any]]:
    """Curves as the plots take them: {title: {steps, mean, ci95}}."""
    return {
        curve.title: {
            "steps": list(curve.steps),
            "mean": curve.mean[metric],
            "ci95": curve.ci95[metric],
        }
        for curve in curves
        if metric in curve.mean
    }


def metric_label(task: TaskDistribution, metric: str) -> tuple[str, bool]:
    """The metric's name for people, and whether it is shown in percent."""
    if metric == "loss":
        return task.loss_name, False
    return metric, metric == "accuracy"


def cell(curve: Curve, metric: str, position: int, percent: bool) -> str:
    """One value of a curve for people: mean ± CI95."""
    return interval(curve.mean[metric][position], curve.ci95[metric][position], percent)
