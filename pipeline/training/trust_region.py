"""The outer optimisers of reinforcement learning: meta-gradient and trajectories -> the next θ.

The workers keep the trajectories. The driver asks them for Fisher products and for the worth of a
candidate θ: one job per chunk, and the answers are averaged over the tasks in the order of the
chunks. So the step does not depend on the number of workers.

    trpo      the natural gradient (conjugate gradients on Fisher products), as long as
              KL ≈ ½ sᵀFs = max_kl allows, cut until the surrogate is better and the KL kept
              (Schulman et al. 2015; the paper's outer optimiser)
    promp     several steps of `outer.optimizer` on clipped ratios, with a penalty on moving away
              from the policies that collected (Rothfuss et al. 2019)
    gradient  one step of `outer.optimizer`
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline.cluster.rounds import Total
from pipeline.config.settings import Reinforcement
from pipeline.maml.flat_vector import FlatVector
from pipeline.training.aggregation import Aggregate, all_finite
from pipeline.training.outer_optimizer import OuterOptimizer
from pipeline.worker.jobs import CandidateJob, ChunkJob, FisherJob
from pipeline.worker.tree import Span

Vector = npt.NDArray[np.float64]
Ask = Callable[[Callable[[Span], ChunkJob], FlatVector], Total]
"""Asks all chunks, at the θ that collected their trajectories, about a vector [D]."""


class Solution(NamedTuple):
    """The approximate solution of A x = b."""

    x: Vector
    residual: Vector
    """b − A x, by the recursion rather than by another product."""


def conjugate_gradients(
    product: Callable[[Vector], Vector], b: Vector, iterations: int, tolerance: float = 1e-10
) -> Solution:
    """Solve A x = b for a positive definite A, given by its `product` with a vector [D].

    The method of conjugate gradients (Hestenes & Stiefel 1952). Stops early where |b − A x|² is
    below `tolerance`, or where rounding has made the curvature along a direction not positive.
    """
    x, residual = np.zeros_like(b), b.copy()
    direction, squared = residual.copy(), float(residual @ residual)
    for _ in range(iterations):
        if squared < tolerance:
            break
        image = product(direction)
        curvature = float(direction @ image)
        if not curvature > 0:  # also true of products that are not finite
            break
        length = squared / curvature
        x += length * direction
        residual -= length * image
        before, squared = squared, float(residual @ residual)
        direction = residual + squared / before * direction
    return Solution(x, residual)


class Questions(NamedTuple):
    """Asks the workers about the trajectories of an iteration, one job per chunk."""

    iteration: int
    ask: Ask

    def fisher(self, direction: FlatVector) -> Vector:
        """The Fisher matrix times a direction [D], mean over the tasks."""
        return _mean_gradient(self.ask(lambda chunks: FisherJob(self.iteration, chunks), direction))

    def candidate(self, theta: FlatVector, inner_kl_weight: float | None = None) -> Total:
        """What another θ [D] is worth; with a weight, its gradient too."""
        return self.ask(lambda chunks: CandidateJob(self.iteration, chunks, inner_kl_weight), theta)


def jobs_of_update(settings: Reinforcement, iteration: int) -> list[tuple[ChunkJob, int]]:
    """The jobs with which `policy_update` asks about the first chunk, and how often each; with a
    line search that accepts its first step. All are about some vector [D]. For measuring them."""
    first = Span(0, 1)
    evaluated = CandidateJob(iteration, first)
    if settings.update == "trpo":
        return [(FisherJob(iteration, first), settings.cg_iterations), (evaluated, 1)]
    if settings.update == "promp":
        moved = CandidateJob(iteration, first, settings.inner_kl)
        return [(moved, settings.outer_steps - 1), (evaluated, 1)]
    return [(evaluated, 1)]


def policy_update(
    settings: Reinforcement, optimizer: OuterOptimizer, mean: Aggregate, questions: Questions
) -> dict[str, float]:
    """Move θ, given the mean meta-gradient of the iteration; return the metrics to log.

    A gradient that is not finite leaves θ as it is.
    """
    metrics = {"meta_gradient_norm": float(torch.linalg.vector_norm(mean.gradient))}
    if settings.update != "trpo":
        metrics["outer_lr"] = optimizer.lr
    if all_finite(mean.gradient):
        step = {"trpo": _trust_region, "promp": _proximal, "gradient": _one_step}[settings.update]
        metrics |= step(settings, optimizer, mean, questions)
    optimizer.tick()
    return metrics


def _trust_region(
    settings: Reinforcement, optimizer: OuterOptimizer, mean: Aggregate, questions: Questions
) -> dict[str, float]:
    """TRPO (Schulman et al. 2015): the natural gradient F⁻¹g, scaled to KL = max_kl, shortened
    until the surrogate loss falls and the KL stays within max_kl."""
    theta = _now(optimizer)
    gradient = mean.gradient.double().numpy()

    def fisher(v: Vector) -> Vector:
        return questions.fisher(v.astype(theta.dtype)) + settings.damping * v

    found = conjugate_gradients(fisher, gradient, settings.cg_iterations)
    curvature = float(found.x @ (gradient - found.residual))  # xᵀ F x
    metrics = {
        "trpo/cg_residual": float(np.linalg.norm(found.residual)),
        "trpo/kl_before": mean.metrics["query_kl"],
    }
    before = mean.metrics["query_loss"]
    attempts = settings.backtracks if curvature > 0 else 0
    for attempt in range(attempts):
        step = math.sqrt(2 * settings.max_kl / curvature) * settings.backtrack**attempt * found.x
        candidate = (theta - step).astype(theta.dtype)
        answers = questions.candidate(candidate)
        loss, kl = (_mean_metric(answers, name) for name in ("surrogate", "kl"))
        if loss < before and kl <= settings.max_kl:
            optimizer.replace(torch.from_numpy(candidate))
            return {
                **metrics,
                "trpo/kl_after": kl,
                "trpo/improvement": before - loss,
                "trpo/line_search_steps": attempt + 1,
                "trpo/accepted": 1.0,
            }
    return {
        **metrics,
        "trpo/kl_after": 0.0,
        "trpo/improvement": 0.0,
        "trpo/line_search_steps": attempts,
        "trpo/accepted": 0.0,
    }


def _one_step(
    settings: Reinforcement, optimizer: OuterOptimizer, mean: Aggregate, questions: Questions
) -> dict[str, float]:
    """One step of `outer.optimizer` along the meta-gradient."""
    optimizer.descend(mean.gradient)
    return _afterwards("gradient", optimizer, mean, questions)


def _proximal(
    settings: Reinforcement, optimizer: OuterOptimizer, mean: Aggregate, questions: Questions
) -> dict[str, float]:
    """ProMP (Rothfuss et al. 2019): several steps of `outer.optimizer` on the same trajectories."""
    # The first gradient was taken where the trajectories were collected: it is the meta-gradient.
    optimizer.descend(mean.gradient)
    inner_kl = 0.0  # at the θ that collected
    for _ in range(settings.outer_steps - 1):
        answers = questions.candidate(_now(optimizer), settings.inner_kl)
        inner_kl = _mean_metric(answers, "inner_kl")
        optimizer.descend(torch.from_numpy(_mean_gradient(answers)).to(mean.gradient.dtype))
    return {**_afterwards("promp", optimizer, mean, questions), "promp/inner_kl": inner_kl}


def _afterwards(
    name: str, optimizer: OuterOptimizer, mean: Aggregate, questions: Questions
) -> dict[str, float]:
    """Metrics of an update whose steps were taken without a line search."""
    answers = questions.candidate(_now(optimizer))
    return {
        f"{name}/kl_before": mean.metrics["query_kl"],
        f"{name}/kl_after": _mean_metric(answers, "kl"),
        f"{name}/improvement": mean.metrics["query_loss"] - _mean_metric(answers, "surrogate"),
    }


def _now(optimizer: OuterOptimizer) -> FlatVector:
    """A copy of the current θ, [D]: later steps change the original in place."""
    now: FlatVector = optimizer.flat.numpy().copy()
    return now


def _mean_gradient(total: Total) -> Vector:
    return np.asarray(total.gradient, np.float64) / total.num_tasks


def _mean_metric(total: Total, name: str) -> float:
    return float(total.metrics[name].mean(dtype=np.float64))
