"""Diagnostics over all tasks: what is recorded of them, and when to warn, in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.adaptation import RATE
from pipeline.chunk import ChunkResult, DiagnosisJob, FlatVector, tasks_per_chunk
from pipeline.config import Experiment
from pipeline.parameters import Layout

PREFIX = "diagnostics/"
EXPLODES, VANISHES = 30.0, 1 / 30
"""Growth of the meta-gradient on its way back through adaptation that is worth a warning."""
_MOSTLY = 0.5  # share of tasks


def diagnosis_jobs(experiment: Experiment, iteration: int, num_parameters: int) -> list[Any]:
    """The jobs of a diagnosis: the first validation tasks, in chunks."""
    tasks = experiment.diagnostics.tasks
    chunk = min(tasks, tasks_per_chunk(experiment, num_parameters))
    return [
        DiagnosisJob(iteration, first, min(chunk, tasks - first))
        for first in range(0, tasks, chunk)
    ]


def health(
    experiment: Experiment, layout: Layout, theta: FlatVector, results: Sequence[ChunkResult]
) -> dict[str, float]:
    """The metrics of a diagnosis, by their names in MLflow: means over its tasks."""
    metrics: dict[str, float] = {}
    for name in results[0].metrics:
        values = np.concatenate([result.metrics[name] for result in results], axis=1)
        means = values.astype(np.float64).mean(axis=1)
        if name == "hurt":
            metrics["hurt_share"] = float(means[0])
        else:
            metrics |= {f"{name}_step{s}": float(mean) for s, mean in enumerate(means)}
    if results[0].gradient is not None:
        both = sum(np.asarray(r.gradient, dtype=np.float64) for r in results)
        assert isinstance(both, np.ndarray)
        second, first = both
        norms = float(np.linalg.norm(second)), float(np.linalg.norm(first))
        metrics["order_cosine"] = _ratio(float(second @ first), norms[0] * norms[1])
        metrics["order_norm_ratio"] = _ratio(*norms)
    metrics |= dict(learned_rates(experiment, layout, theta))
    return {PREFIX + name: value for name, value in metrics.items()}


def learned_rates(
    experiment: Experiment, layout: Layout, theta: FlatVector
) -> Iterator[tuple[str, float]]:
    """Learned inner rates by layer, and by step where each step has its own; means per layer
    where every parameter has its own, with the share that has become negative."""
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


def by_step(metrics: dict[str, float], name: str) -> npt.NDArray[np.float64]:
    """The values of a diagnostic after step 0, 1, ...; empty where there are none."""
    values: list[float] = []
    while (key := f"{PREFIX}{name}_step{len(values)}") in metrics:
        values.append(metrics[key])
    return np.array(values)


def warnings_of(experiment: Experiment, metrics: dict[str, float]) -> dict[str, str]:
    """What is unhealthy, in words, and what to change; by kind."""
    found = {}
    steps = experiment.inner.steps
    norms = by_step(metrics, "gradient_norm")
    if len(norms):
        growth = _ratio(norms[0], norms[-1])
        way = (
            f"on its way back through {steps} inner step{'s' if steps > 1 else ''} "
            f"(its norm is {norms[-1]:.3g} after the last, {norms[0]:.3g} before the first)"
        )
        if not np.isfinite(norms).all() or growth > EXPLODES:
            found["explodes"] = (
                f"the meta-gradient explodes {way}: {_remedies(experiment)}, a smaller inner.lr, "
                "or outer.clip_norm"
            )
        elif growth < VANISHES:
            found["vanishes"] = f"the meta-gradient vanishes {way}: {_remedies(experiment)}"
    share = metrics[f"{PREFIX}hurt_share"]
    if share > _MOSTLY:
        curvature = by_step(metrics, "curvature")
        steep = ""
        if experiment.inner.optimizer == "sgd" and curvature.max() > 0:
            steep = (
                f" (largest curvature along it {curvature.max():.3g}: a step above "
                f"{2 / curvature.max():.2g} goes up)"
            )
        found["hurts"] = (
            f"adaptation hurts on {100 * share:.0f} % of the tasks diagnosed: try a smaller "
            f"inner.lr{steep}, or fewer inner.steps"
        )
    if metrics.get(f"{PREFIX}inner_lr_negative_share", 0) > 0:
        negative = 100 * metrics[f"{PREFIX}inner_lr_negative_share"]
        found["negative"] = (
            f"{negative:.2g} % of the learned inner rates are negative: adaptation climbs there; "
            "if the loss suffers, a smaller outer.lr learns them more slowly"
        )
    return found


def _remedies(experiment: Experiment) -> str:
    """What can be changed that has not been."""
    inner, outer = experiment.inner, experiment.outer
    ways = []
    if inner.order == "second":
        ways.append("inner.order=annealed (first order, while gradients are wild)")
    if outer.query_losses == "last" and inner.steps > 1:
        ways.append("outer.query_losses=annealed (every step hears from the query set directly)")
    if inner.steps > 1:
        ways.append("fewer inner.steps")
    if not inner.checkpoint and inner.steps > 1:
        ways.append("inner.checkpoint=true to afford a larger outer.tasks_per_batch in memory")
    return "try " + ", ".join(ways) if ways else "try another initialisation of the model"


def _ratio(one: float, other: float) -> float:
    return one / other if other else math.nan
