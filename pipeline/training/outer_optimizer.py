"""Applies a meta-gradient to θ with an optimiser of torch (eq. 4)."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from pipeline.config.lr_schedulers import build_scheduler
from pipeline.config.settings import Outer
from pipeline.maml.flat_vector import Layout, Params
from pipeline.training.aggregation import all_finite


class OuterOptimizer:
    """θ, its optimiser and its schedule of rates, on the CPU.

    The optimiser sees θ as one flat vector [D]. SGD, Adam and AdamW work element by element, so the
    result equals that of one tensor per parameter, and one fused call computes it.
    """

    def __init__(self, theta: Params, outer: Outer):
        self.layout = Layout.of(theta)
        self._outer = outer
        self._flat = torch.nn.Parameter(self.layout.join(theta))
        options: dict[str, Any] = {"lr": outer.lr, "weight_decay": outer.weight_decay}
        factory: Any
        if outer.optimizer == "sgd":
            factory, options["momentum"] = torch.optim.SGD, outer.momentum
        else:
            factory = torch.optim.Adam if outer.optimizer == "adam" else torch.optim.AdamW
        self._optimizer: torch.optim.Optimizer = factory([self._flat], fused=True, **options)
        self._scheduler = build_scheduler(self._optimizer, outer)
        self._steps = 0
        self.moves = 0
        """Counts the beginnings of changes to θ, to the optimiser and to the schedule."""

    @property
    def flat(self) -> Tensor:
        """θ as a flat vector [D]; updated in place by `step`."""
        return self._flat.detach()

    @property
    def theta(self) -> Params:
        """θ by name: views, updated in place by `step`."""
        return self.layout.split(self.flat)

    @property
    def lr(self) -> float:
        """The outer rate β of the next update."""
        return float(self._optimizer.param_groups[0]["lr"])

    def step(self, gradient: Tensor) -> float:
        """Apply the mean meta-gradient [D], θ <- θ − β·gradient; return its norm before clipping.

        A gradient that is not finite is not applied, and the returned norm is not finite either.
        The schedule advances all the same, because it counts iterations.
        """
        norm = self.descend(gradient)
        self.tick()
        return norm

    def descend(self, gradient: Tensor) -> float:
        """Apply a gradient [D]; the schedule stays, for iterations of several steps.

        Returns the norm of the gradient before clipping.
        """
        norm = float(torch.linalg.vector_norm(gradient))
        if all_finite(gradient):
            if self._outer.clip_value is not None:
                gradient = gradient.clamp(-self._outer.clip_value, self._outer.clip_value)
            if self._outer.clip_norm is not None:
                largest = self._outer.clip_norm
                gradient = gradient * min(
                    1.0, largest / max(norm, torch.finfo(gradient.dtype).tiny)
                )
            self.moves += 1
            self._flat.grad = gradient
            self._optimizer.step()
        return norm

    def tick(self) -> None:
        """Advance the schedule by one iteration."""
        self.moves += 1
        self._steps += 1
        if self._scheduler is not None:
            self._scheduler.step()

    def replace(self, flat: Tensor) -> None:
        """Overwrite θ with `flat` [D]; the optimiser and its schedule keep their state."""
        self.moves += 1
        self._flat.detach().copy_(flat)

    def tensors(self) -> dict[str, Tensor]:
        """Copies of θ and the optimiser's tensors: "theta.NAME" and "optimizer.KEY.NAME"."""
        named = {f"theta.{name}": value.clone() for name, value in self.theta.items()}
        for key, value in self._optimizer.state.get(self._flat, {}).items():
            if value is None:
                continue
            if value.dim() == 0:
                named[f"optimizer.{key}"] = value.clone()
            else:
                for name, part in self.layout.split(value).items():
                    named[f"optimizer.{key}.{name}"] = part.clone()
        return named

    def scheduler_state(self) -> dict[str, Any]:
        """The number of steps that the schedule has taken, as plain values for JSON.

        `restore` takes a fresh schedule through as many steps. A checkpoint thus keeps nothing that
        a scheduler computes from its arguments, and a run that is continued for more iterations
        follows the longer schedule.
        """
        return {"steps": self._steps}

    def restore(self, tensors: dict[str, Tensor], scheduler_state: dict[str, Any]) -> None:
        """Take over what `tensors` and `scheduler_state` returned; call it once, on a fresh object.

        Raises ValueError where the parameters are not those of this model.
        """
        parts: dict[str, Params] = {}
        state: dict[str, Any] = {}
        for path, value in tensors.items():
            key, _, name = path.removeprefix("optimizer.").partition(".")
            if name:
                parts.setdefault(key, {})[name] = value
            else:
                state[key] = value
        theta = parts.pop("theta", {})
        if Layout.of(theta).shapes_by_name != self.layout.shapes_by_name:
            raise ValueError("the checkpoint's parameters are not those of this model")
        with torch.no_grad():
            self._flat.copy_(self.layout.join(theta))
        state |= {key: self.layout.join(params) for key, params in parts.items()}
        if state:
            self._optimizer.state[self._flat] = state
        self._steps = int(scheduler_state["steps"])
        if self._scheduler is not None:
            with warnings.catch_warnings():
                # torch warns: no optimiser step precedes these, they were an earlier process's.
                warnings.simplefilter("ignore")
                for _ in range(self._steps):
                    self._scheduler.step()
