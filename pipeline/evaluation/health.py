"""Summarises diagnostics of meta-gradients over tasks, and warns of unhealthy ones in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce

import numpy as np
import numpy.typing as npt
import torch

from pipeline.config.experiment import Experiment
from pipeline.config.wording import counted
from pipeline.maml.adaptation import RATE
from pipeline.maml.flat_vector import FlatVector, Layout
from pipeline.worker.jobs import DiagnosisJob, JobResult, in_chunks

PREFIX = "diagnostics/"
EXPLODES, VANISHES = 30.0, 1 / 30
"""A warning is due where the way back through adaptation changes the norm of the meta-gradient by
more than these factors."""
_MOSTLY = 0.5  # share of tasks on which adaptation hurts, above which a warning is due
# θ has diverged where the support loss is so many times that of the beginning. A moderate rise is
# normal: θ is trained for its loss after adaptation, not before.
_DIVERGED = 100.0
_SAID = {
    "explodes": "the meta-gradient explodes",
    "vanishes": "the meta-gradient vanishes",
    "hurts": "adaptation hurts",
    "negative": "negative inner rates",
}


def diagnosis_jobs(
    experiment: Experiment, iteration: int, num_parameters: int
) -> list[DiagnosisJob]:
    """The jobs that diagnose the first `diagnostics.tasks` validation tasks, chunk by chunk."""
    tasks = experiment.diagnostics.tasks
    chunks = in_chunks(experiment, num_parameters, tasks)
    return [DiagnosisJob(iteration, first, count) for first, count in chunks]


def health(
    experiment: Experiment, layout: Layout, theta: FlatVector, results: Sequence[JobResult]
) -> dict[str, float]:
    """The metrics of a diagnosis by their names in MLflow: means over its tasks."""
    metrics: dict[str, float] = {}
    for name in results[0].metrics:
        values = np.concatenate([result.metrics[name] for result in results], axis=1)
        means = values.astype(np.float64).mean(axis=1)
        if name == "hurt":
            metrics["hurt_share"] = float(means[0])
        else:
            metrics |= {f"{name}_step{s}": float(mean) for s, mean in enumerate(means)}
    if results[0].gradient is not None:
        # Second and first order, [2, D], summed over the chunks.
        second, first = reduce(np.add, [np.asarray(r.gradient, np.float64) for r in results])
        norms = float(np.linalg.norm(second)), float(np.linalg.norm(first))
        metrics["order_cosine"] = _ratio(float(second @ first), norms[0] * norms[1])
        metrics["order_norm_ratio"] = _ratio(*norms)
    metrics |= dict(learned_rates(experiment, layout, theta))
    return {PREFIX + name: value for name, value in metrics.items()}


def learned_rates(
    experiment: Experiment, layout: Layout, theta: FlatVector
) -> Iterator[tuple[str, float]]:
    """Metrics of learned inner rates; none where rates are fixed.

    By layer and step where each step has its own rates, else means by layer; and the share of rates
    that have become negative.
    """
    rates = {
        name.removeprefix(RATE): value.numpy()
        for name, value in layout.split(torch.from_numpy(np.array(theta))).items()
        if name.startswith(RATE)
    }
    for name, value in rates.items():
        if experiment.inner.rates == "per-layer-and-step":
            yield from ((f"inner_lr/{name}_step{s}", float(rate)) for s, rate in enumerate(value))
        else:
            yield f"inner_lr/{name}", float(value.mean())
    if rates:
        negative = sum(int((value < 0).sum()) for value in rates.values())
        yield "inner_lr_negative_share", negative / sum(value.size for value in rates.values())


def by_step(metrics: Mapping[str, float], name: str) -> npt.NDArray[np.float64]:
    """The values of a diagnostic at step 0, 1, ..., [steps]; empty if it was not recorded."""
    values: list[float] = []
    while (key := f"{PREFIX}{name}_step{len(values)}") in metrics:
        values.append(metrics[key])
    return np.array(values)


def warnings_of(experiment: Experiment, metrics: Mapping[str, float]) -> dict[str, str]:
    """Warnings by kind: what is unhealthy in a diagnosis, and what to change."""
    found = {}
    steps = experiment.inner.steps
    norms = by_step(metrics, "gradient_norm")
    if len(norms):
        growth = _ratio(norms[0], norms[-1])
        way = (
            f"on its way back through {counted(steps, 'inner step')} "
            f"(its norm is {norms[-1]:.3g} after the last, {norms[0]:.3g} before the first)"
        )
        if not np.isfinite(norms).all():
            found["explodes"] = (
                "the meta-gradient is not finite on its way back through "
                f"{counted(steps, 'inner step')}: try a smaller inner.lr"
                + "".join(f", {way}" for way in _untried_settings(experiment))
            )
        elif growth > EXPLODES:
            found["explodes"] = (
                f"the meta-gradient explodes {way}: {_remedies(experiment)}, a smaller inner.lr, "
                "or outer.clip_norm"
            )
        elif growth < VANISHES:
            found["vanishes"] = f"the meta-gradient vanishes {way}: {_remedies(experiment)}"
    share = metrics[f"{PREFIX}hurt_share"]
    if share > _MOSTLY:
        fewer = ", or fewer inner.steps" if steps > 1 else ""
        found["hurts"] = (
            f"adaptation hurts on {100 * share:.0f} % of the tasks diagnosed: try a smaller "
            f"inner.lr{_too_steep(experiment, metrics)}{fewer}"
        )
    if metrics.get(f"{PREFIX}inner_lr_negative_share", 0) > 0:
        negative = 100 * metrics[f"{PREFIX}inner_lr_negative_share"]
        found["negative"] = (
            f"{negative:.2g} % of the learned inner rates are negative: adaptation climbs there; "
            "if the loss suffers, a smaller outer.lr learns them more slowly"
        )
    return found


def verdict(experiment: Experiment, diagnoses: Sequence[Mapping[str, float]]) -> str:
    """The diagnoses of a whole run in a few words."""
    found = [warnings_of(experiment, metrics) for metrics in diagnoses]
    number = counted(len(found), "diagnosis", "diagnoses")
    kinds = sorted({kind for warnings in found for kind in warnings})
    if not kinds:
        return f"no warning in {number}"
    what = ", ".join(_SAID[kind] for kind in kinds)
    return f"warnings in {sum(map(bool, found))} of {number}: {what}"


def theta_diverged(metrics: Mapping[str, float], first_loss: float | None) -> bool:
    """Whether the support loss before adaptation far exceeds that at the start of the run."""
    return first_loss is not None and not metrics["support_loss"] <= _DIVERGED * first_loss


def why_not_finite(
    experiment: Experiment, metrics: Mapping[str, float], first_loss: float | None
) -> str:
    """Advice for a run on supervised tasks whose meta-gradients are no longer finite.

    `metrics` are means over the tasks of the last meta-batch. `first_loss` is the first recorded
    support loss; None if it was never finite.
    """
    loss, inner = metrics["support_loss"], experiment.inner
    if first_loss is None and not math.isfinite(loss):
        return "The loss is not finite before anything is learned: look at the data of these tasks"
    if first_loss is not None and theta_diverged(metrics, first_loss):
        return (
            f"the meta-parameters have diverged (support loss before adaptation {loss:.3g}, at the "
            f"beginning {first_loss:.3g}): lower outer.lr, or set outer.clip_norm"
        )
    lower = f"lower inner.lr (it is {inner.lr:g})"
    if math.isfinite(metrics["query_loss"]):
        ways = "".join(f", {way}" for way in _untried_settings(experiment))
        return f"Losses are finite, but not their gradient through adaptation: {lower}{ways}"
    fewer = f" or inner.steps (they are {inner.steps})" if inner.steps > 1 else ""
    return (
        f"Adaptation leads to losses that are not finite: {lower}{fewer}; if that does not help, "
        "look at the data of these tasks"
    )


def _too_steep(experiment: Experiment, metrics: Mapping[str, float]) -> str:
    """The first inner step of gradient descent that raises the loss, in words; '' if none does.

    Gradient descent diverges along a direction of curvature above 2 / rate.
    """
    if experiment.inner.optimizer == "sgd":
        for step, curvature in enumerate(by_step(metrics, "curvature")):
            if curvature * experiment.inner.lr > 2:
                return (
                    f" (curvature along it at step {step + 1} is {curvature:.3g}: a step above "
                    f"{2 / curvature:.2g} goes up)"
                )
    return ""


def _remedies(experiment: Experiment) -> str:
    """Settings not yet in use that help where gradients explode or vanish, in words."""
    inner = experiment.inner
    ways = _untried_settings(experiment)
    if not inner.recompute and inner.steps > 1:
        ways.append("inner.recompute=true to afford a larger outer.tasks_per_batch in memory")
    return "try " + ", ".join(ways) if ways else "try another initialisation of the model"


def _untried_settings(experiment: Experiment) -> list[str]:
    """Settings that make the meta-gradient steadier and that this experiment does not use yet."""
    inner, outer = experiment.inner, experiment.outer
    ways = []
    if inner.order == "second":
        ways.append("inner.order=annealed (first order, while gradients are large)")
    if outer.query_losses == "last" and inner.steps > 1:
        ways.append(
            "outer.query_losses=annealed (every inner step gets a gradient of its own from the "
            "query set)"
        )
    if inner.steps > 1:
        ways.append("fewer inner.steps")
    return ways


def _ratio(one: float, other: float) -> float:
    """one / other; NaN for a division by 0."""
    return one / other if other else math.nan
