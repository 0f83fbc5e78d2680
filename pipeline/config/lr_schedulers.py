"""Schedules of the outer rate: torch's own, named by the configuration."""

from __future__ import annotations

import inspect
import math

import torch

from pipeline.config.settings import Outer

# Schedulers that cannot be written in YAML, or that need more than the iteration.
_UNSUITABLE = {"LRScheduler", "LambdaLR", "MultiplicativeLR", "ReduceLROnPlateau"} | {
    "SequentialLR",
    "ChainedScheduler",
    "SWALR",
}
_LENGTHS = ("T_max", "total_iters", "total_steps")


def schedulers() -> list[str]:
    """Names of the torch schedulers that `outer.scheduler` accepts."""
    base = torch.optim.lr_scheduler.LRScheduler
    return sorted(
        name
        for name, value in vars(torch.optim.lr_scheduler).items()
        if inspect.isclass(value)
        and issubclass(value, base)
        and not name.startswith("_")
        and name not in _UNSUITABLE
    )


def build_scheduler(
    optimizer: torch.optim.Optimizer, outer: Outer
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """Build the scheduler that the configuration names; None: there is none.

    Raises ValueError naming the setting.
    """
    if outer.scheduler is None:
        return None
    if outer.scheduler not in schedulers():
        raise ValueError(
            f"outer.scheduler: {outer.scheduler!r} is none of {', '.join(schedulers())}"
        )
    factory = getattr(torch.optim.lr_scheduler, outer.scheduler)
    arguments = dict(outer.scheduler_args)
    for name in _LENGTHS:
        if name in inspect.signature(factory).parameters:
            arguments.setdefault(name, outer.iterations)
    try:
        scheduler: torch.optim.lr_scheduler.LRScheduler = factory(optimizer, **arguments)
    except Exception as error:  # torch's classes check little, and fail in many ways
        raise _refusal(outer, error) from None
    return scheduler


def check_scheduler(outer: Outer) -> None:
    """Build the scheduler and take a step: some arguments are not looked at before.

    Raises ValueError naming the setting.
    """
    for name, value in outer.scheduler_args.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"outer.scheduler_args.{name}: must be a finite number, got {value}")
    if outer.scheduler is None:
        return  # the first optimiser of a process has torch import its compiler, for two seconds
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=outer.lr)
    scheduler = build_scheduler(optimizer, outer)
    assert scheduler is not None
    optimizer.step()
    try:
        scheduler.step()
        rate = float(optimizer.param_groups[0]["lr"])
        if not math.isfinite(rate):
            raise ValueError(f"the rate becomes {rate}")
    except Exception as error:
        raise _refusal(outer, error) from None


def _refusal(outer: Outer, error: Exception) -> ValueError:
    why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return ValueError(f"outer.scheduler_args: {outer.scheduler} refuses them: {why}")
