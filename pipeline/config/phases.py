"""What changes during a run: the order of the meta-gradient and the weights of the query losses."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.config.experiment import Experiment


class Phase(NamedTuple):
    """How the iterations of one phase compute their meta-gradient."""

    second_order: bool
    every_query_loss: bool


def phase_at(experiment: Experiment, iteration: int) -> Phase:
    """The phase that an iteration belongs to."""
    inner = experiment.inner
    second = inner.order == "second" or (
        inner.order == "annealed" and iteration >= experiment.second_order_from
    )
    return Phase(second, query_weights_at(experiment, iteration) is not None)


def phases(experiment: Experiment) -> list[Phase]:
    """All phases of a run, in the order in which they come."""
    switches = {0, experiment.second_order_from, experiment.query_losses_until}
    starts = sorted(start for start in switches if start < experiment.outer.iterations)
    return list(dict.fromkeys(phase_at(experiment, start) for start in starts))


def query_weights_at(experiment: Experiment, iteration: int) -> tuple[float, ...] | None:
    """How much the query loss after step 1 .. S counts; None: only the last, with weight 1.

    Annealed as in MAML++: all equal at first, those before the last fall to 0.03/S, then to nothing
    at `query_losses_until`; in ten stairs.
    """
    wanted, steps = experiment.outer.query_losses, experiment.inner.steps
    if not isinstance(wanted, str):
        return wanted
    if wanted == "last" or steps == 1:
        return None
    if wanted == "all":
        return (1 / steps,) * steps
    until = experiment.query_losses_until
    if iteration >= until:
        return None
    fallen = (10 * iteration // until) / (10 * steps)
    early = max(1 / steps - fallen, 0.03 / steps)
    return (*(early,) * (steps - 1), 1 - early * (steps - 1))
