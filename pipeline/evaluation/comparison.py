"""Compares runs on the same test tasks: adaptation curves and paired differences.

The difference of two runs is taken task by task, so that the difficulty of a task cancels. Its
confidence interval is much narrower than the intervals of the two means suggest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.cluster.group import InProcess
from pipeline.config.experiment import Experiment
from pipeline.config.loading import ConfigError, absolute_path, load_run
from pipeline.evaluation.meta_test import (
    Curve,
    EvaluationSpec,
    check_tasks,
    curve_of,
    refuse_overridden,
    set_by_all,
    task_by_task,
)
from pipeline.maml.confidence import mean_and_ci95
from pipeline.maml.flat_vector import Params, flat_vector
from pipeline.runs.folder import Which, parameters_of


@dataclass(frozen=True)
class Difference:
    """The metric of one run minus that of another, over the same tasks."""

    one: str
    other: str
    mean: list[float]
    """One value per step of the curves."""
    ci95: list[float]
    """Half the width of the interval of `mean`, from the differences of single tasks."""
    p: list[float]
    """Two-sided p-values of a paired z-test, which needs about 30 tasks or more."""


@dataclass(frozen=True)
class PairedComparison:
    """Runs on one kind of test tasks."""

    variant: str
    """Name of the changed task settings (`evaluation.variants`), or ''."""
    metric: str
    steps: tuple[int, ...]
    curves: list[Curve]
    """One per run; `who` is the run."""
    differences: list[Difference]
    """Every later run minus every earlier one."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def compare_runs(
    run_dirs: Sequence[str | Path],
    *,
    split: str = "test",
    num_tasks: int | None = None,
    steps: tuple[int, ...] | None = None,
    checkpoint: Which = "final",
    overrides: Sequence[str] = (),
) -> list[PairedComparison]:
    """Evaluate finished runs on the same tasks, in this process.

    `run_dirs` are the folders of two or more runs. `split` names the tasks: train, validation or
    test. `num_tasks` of them are adapted to, by default the fewest that one of the runs asks for;
    metrics are reported after each number of gradient steps in `steps`, by default all that one of
    the runs reports. `checkpoint` chooses the parameters of every run: "final", those of the last
    iteration, or "best", those of the best validation. `overrides` change settings of all runs,
    such as `inner.lr=0.002`.

    Returns one comparison per variant of the tasks that all runs have: a curve per run, and the
    differences of each pair of runs with confidence intervals and p-values. Raises ConfigError if
    a folder holds no run, the tasks of the runs differ or all variants set what an override sets,
    CheckpointError if parameters cannot be
    read, ValueError or StoreError if such tasks cannot be sampled.
    """
    folders = [absolute_path(run_dir) for run_dir in run_dirs]
    experiments = [load_run(folder, overrides) for folder in folders]
    names = _names(folders, experiments)
    variants = _common_variants(experiments)
    refuse_overridden(variants, overrides)
    _refuse_other_tasks(names, experiments, set_by_all(list(variants.values())))
    report = steps or tuple(sorted({step for e in experiments for step in e.report_steps}))
    count = num_tasks or min(e.evaluation.tasks for e in experiments)
    specs = [EvaluationSpec(split, count, report, variant) for variant in variants or ("",)]
    thetas = [
        parameters_of(experiment, folder, checkpoint)
        for experiment, folder in zip(experiments, folders, strict=True)
    ]
    for experiment in experiments:
        check_tasks(experiment, (split,))
    _refuse_other_data(names, experiments)
    measured = [_measured(e, theta, specs) for e, theta in zip(experiments, thetas, strict=True)]
    metric = experiments[0].build_task().primary_metric
    found = []
    for spec, by_run in zip(specs, zip(*measured, strict=True), strict=True):
        curves = [
            curve_of(experiment, by_task, spec, name)
            for experiment, by_task, name in zip(experiments, by_run, names, strict=True)
        ]
        values = [by_task[metric] for by_task in by_run]
        differences = [
            difference(names[j], values[j], names[i], values[i])
            for i, j in combinations(range(len(names)), 2)
        ]
        found.append(PairedComparison(spec.variant, metric, report, curves, differences))
    return found


def recipes(found: Sequence[PairedComparison]) -> dict[str, list[str]]:
    """The entries of the runs' protocols that differ: one value per run, a dash if it has none."""
    protocols = [curve.protocol for curve in found[0].curves]
    keys = dict.fromkeys(key for protocol in protocols for key in protocol)
    values = {key: [str(p.get(key, "–")) for p in protocols] for key in keys}
    return {key.replace("_", " "): each for key, each in values.items() if len(set(each)) > 1}


def _measured(
    experiment: Experiment, theta: Params, specs: Sequence[EvaluationSpec]
) -> list[dict[str, npt.NDArray[Any]]]:
    """Metrics of single tasks by name, [steps, tasks]; one table per spec."""
    flat = flat_vector(theta)
    with InProcess(experiment, compile=False, warm_up=False) as workers:
        return [task_by_task(workers, experiment, flat, spec) for spec in specs]


def difference(
    one: str, values: npt.NDArray[Any], other: str, of_other: npt.NDArray[Any]
) -> Difference:
    """`values` minus `of_other`, both [steps, tasks] with the same tasks in the same order."""
    mean, ci95 = mean_and_ci95(values.astype(np.float64) - of_other.astype(np.float64))
    p = [_p_value(m, c / 1.96) for m, c in zip(mean.tolist(), ci95.tolist(), strict=True)]
    return Difference(one, other, mean.tolist(), ci95.tolist(), p)


def _p_value(mean: float, standard_error: float) -> float:
    """The two-sided p-value of a z-test that the mean is 0."""
    from scipy import stats  # here: importing it takes about a second

    if not math.isfinite(mean) or not math.isfinite(standard_error):
        return math.nan
    if standard_error == 0:
        return 1.0 if mean == 0 else 0.0
    return 2 * float(stats.norm.sf(abs(mean) / standard_error))


def _names(folders: Sequence[Path], experiments: Sequence[Experiment]) -> list[str]:
    """The names of the experiments if they are all different, else those of the folders."""
    names = [experiment.name for experiment in experiments]
    if len(set(names)) == len(names):
        return names
    last = [folder.name for folder in folders]
    return last if len(set(last)) == len(last) else [str(folder) for folder in folders]


def _common_variants(experiments: Sequence[Experiment]) -> dict[str, dict[str, Any]]:
    """The variants of the tasks that all runs have, by name."""
    first, *others = (experiment.evaluation.variants for experiment in experiments)
    return {
        name: changes
        for name, changes in first.items()
        if all(other.get(name) == changes for other in others)
    }


def _refuse_other_tasks(
    names: Sequence[str], experiments: Sequence[Experiment], apart: set[str]
) -> None:
    """Raise ConfigError unless all runs have the same task settings, apart from those that the
    variants of the tasks set."""
    tasks = [experiment.task.model_dump(mode="json") for experiment in experiments]
    errors = []
    for key in dict.fromkeys(key for task in tasks for key in task):
        values = [task.get(key) for task in tasks]
        if key not in apart and any(value != values[0] for value in values):
            each = ", ".join(f"{v!r} in {n}" for n, v in zip(names, values, strict=True))
            errors.append(
                f"task.{key}: {each}; only runs on the same tasks can be compared "
                f"(--set task.{key}=VALUE tests all of them with one value)"
            )
    if errors:
        raise ConfigError("the runs", errors)


def _refuse_other_data(names: Sequence[str], experiments: Sequence[Experiment]) -> None:
    """Raise ConfigError unless all image stores have the same content."""
    hashes = [e.build_task().protocol().get("content_hash") for e in experiments]
    if any(each != hashes[0] for each in hashes):
        roots = ", ".join(f"{e.data.root} in {n}" for e, n in zip(experiments, names, strict=True))
        raise ConfigError(
            "the runs", [f"data.root: {roots}; the image stores there are not the same"]
        )
