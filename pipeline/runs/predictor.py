"""A trained model at work: given a support set, it adapts and answers queries.

    adapter = Adapter.load("runs/omniglot-5w1s-20260101-120000")
    prediction = adapter.predict(support_x, support_y, query_x)

What it needs for that - the parameters, and the recipe that they were trained with: steps, rates,
what adapts, normalisation - is two files, and depends neither on the data set nor on Ray or MLflow.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor

from pipeline.config import json_text
from pipeline.config.components import build_model
from pipeline.config.experiment import Experiment
from pipeline.config.loading import ConfigError, from_dict, load_run
from pipeline.maml.adaptation_curve import adapt
from pipeline.maml.flat_vector import Layout, Params
from pipeline.maml.meta_loss import Objective
from pipeline.runs.checkpoint import load_theta
from pipeline.worker.learner import adaptation_of, meta_parameters_of
from tasks.base import Examples, supervised

RECIPE, PARAMETERS = "recipe.json", "theta.safetensors"

Array = npt.NDArray[Any]


class Prediction(NamedTuple):
    """The answers of an adapted model to m queries."""

    predictions: Array
    """Classification: the label of every query [m], as the support set has them; regression: the
    target [m, outputs]."""
    scores: Array
    """Classification: the probability of every class [m, N], labels in ascending order;
    regression: as `predictions`."""
    support_loss: Array
    """Loss on the support set after 0, 1, ... steps of adaptation, [steps + 1]."""


@dataclass(frozen=True)
class Recipe:
    """How a model adapts, and to what."""

    experiment: Experiment
    input_shape: tuple[int, ...]
    """Of one example."""
    output_size: int
    """Classes, or dimensions of the target."""
    steps: int
    """Gradient steps of adaptation."""

    @classmethod
    def of(cls, experiment: Experiment) -> Recipe:
        """Make the recipe of an experiment; its data are read only for the size of images.

        Raises ValueError for tasks of reinforcement learning.
        """
        task = supervised(experiment.build_task(), "an exported model")
        return cls(
            experiment.changed(search=None),
            tuple(task.input_shape),
            task.output_size,
            experiment.selection_step,
        )

    def to_json(self) -> str:
        """The recipe as JSON text."""
        values = {
            "experiment": self.experiment.plain(),
            "input_shape": self.input_shape,
            "output_size": self.output_size,
            "steps": self.steps,
        }
        return json_text.write(values)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read what `to_json` wrote. Raises ConfigError."""
        try:
            values = json.loads(text)
            given, shape = values["experiment"], tuple(map(_count, values["input_shape"]))
            size, steps = _count(values["output_size"]), _count(values["steps"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            why = f"not a recipe that `maml export` wrote: {type(error).__name__}: {error}"
            raise ConfigError(RECIPE, [why]) from None
        return cls(from_dict(given, RECIPE), shape, size, steps)


def _count(value: Any) -> int:
    """A number of a recipe. Raises ValueError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no number of something")
    return value


def _steps(value: Any) -> int:
    """The argument `steps`. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise ValueError(f"steps: must be an integer of at least 0, got {value!r}")
    return int(value)


class Adapter:
    """A meta-trained model. Every call of `predict` starts from the meta-parameters anew."""

    def __init__(self, recipe: Recipe, theta: Params):
        """Build the model. Raises ValueError if `theta` does not fit the model of `recipe`."""
        experiment = recipe.experiment
        self.recipe = recipe
        self._dtype: torch.dtype = getattr(torch, experiment.compute.dtype)
        model = build_model(
            experiment.model.kind,
            experiment.model.settings,
            recipe.input_shape,
            recipe.output_size,
            experiment.seed,
        ).to(self._dtype)
        task = supervised(experiment.build_task(), "an exported model")
        self.classifies = task.has_classes
        self._adaptation = adaptation_of(experiment, model)
        self._objective = Objective(model, task)
        self._theta = {name: value.to(self._dtype) for name, value in theta.items()}
        wanted = Layout.of(meta_parameters_of(experiment, model))
        if Layout.of(theta).shapes_by_name != wanted.shapes_by_name:
            raise ValueError(f"{PARAMETERS} does not fit the model of the recipe")
        self._alpha = torch.tensor(experiment.inner.lr, dtype=self._dtype)

    @classmethod
    def load(cls, folder: str | Path) -> Adapter:
        """Load a run's final parameters from its folder, or a model from one that `save` wrote.

        Raises ConfigError if `folder` is neither, CheckpointError if the run has no final
        parameters yet or they cannot be read, ValueError if they do not fit the model, or for
        reinforcement learning.
        """
        folder = Path(folder)
        path = folder / RECIPE
        recipe = (
            Recipe.from_json(path.read_text()) if path.is_file() else Recipe.of(load_run(folder))
        )
        return cls(recipe, load_theta(folder / PARAMETERS))

    def save(self, folder: str | Path) -> None:
        """Write the two files that `load` needs into `folder`, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECIPE).write_text(self.recipe.to_json())
        theta = {name: value.contiguous() for name, value in self._theta.items()}
        safetensors.torch.save_file(theta, folder / PARAMETERS)

    @torch.no_grad()
    def predict(
        self, support_x: Any, support_y: Any, query_x: Any, *, steps: int | None = None
    ) -> Prediction:
        """Adapt to n support examples, then answer m queries.

        `support_x` has the shape [n, *input_shape], `query_x` [m, *input_shape]. `support_y` holds
        integer labels [n] of exactly as many classes as the model was trained for, in any
        numbering, or targets [n, outputs]. `steps` is the number of gradient steps, by default that
        of the recipe. With batch normalisation, queries are normalised by the statistics of all of
        them, as in training. Computes on the CPU. Raises ValueError naming the argument.
        """
        steps = self.recipe.steps if steps is None else _steps(steps)
        support = self._inputs("support_x", support_x)
        query = self._inputs("query_x", query_x)
        targets, labels = self._targets(support_y, len(support))
        one_task = Examples(support[None], targets[None])
        losses, params = [], self._theta
        for fast, slow in adapt(
            self._objective,
            self._adaptation,
            self._theta,
            one_task,
            self._alpha,
            steps,
            1,
        ):
            params = {**slow, **{name: value[0] for name, value in fast.items()}}
            losses.append(float(self._objective.loss(params, Examples(support, targets))))
        outputs = self._objective.predict(params, query)
        if not torch.isfinite(outputs).all():
            raise ValueError(
                "support_x: adaptation to this support set diverged (the outputs are not finite); "
                "are the inputs scaled as in training?"
            )
        support_loss = np.array(losses)
        if labels is None:
            values = outputs.numpy()
            return Prediction(values, values, support_loss)
        scores = torch.softmax(outputs, -1).numpy()
        return Prediction(labels[scores.argmax(-1)], scores, support_loss)

    def _inputs(self, name: str, value: Any) -> Tensor:
        """Examples as a tensor [n, *input_shape]. Raises ValueError naming the argument."""
        try:
            array = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: not an array of numbers: {error}") from None
        shape = self.recipe.input_shape
        if array.ndim != len(shape) + 1 or array.shape[1:] != shape or not len(array):
            wanted = ", ".join(("n", *map(str, shape)))
            raise ValueError(f"{name}: must have the shape [{wanted}], got {list(array.shape)}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: holds {int((~np.isfinite(array)).sum())} NaN or infinities")
        return torch.from_numpy(array).to(self._dtype)

    def _targets(self, value: Any, count: int) -> tuple[Tensor, Array | None]:
        """Targets as the loss takes them; of classification also the labels, by class 0, 1, ...

        Raises ValueError naming the argument.
        """
        size = self.recipe.output_size
        try:
            array = np.asarray(value)
        except ValueError as error:  # lists of several lengths
            raise ValueError(f"support_y: not an array: {error}") from None
        if not self.classifies:
            if array.shape != (count, size):
                raise ValueError(
                    f"support_y: must have the shape [{count}, {size}], one target for each "
                    f"example of support_x, got {list(array.shape)}"
                )
            if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
                raise ValueError("support_y: must be finite numbers")
            return torch.from_numpy(array.astype(np.float64)).to(self._dtype), None
        if array.shape != (count,):
            raise ValueError(
                f"support_y: must have the shape [{count}], one label for each example of "
                f"support_x, got {list(array.shape)}"
            )
        if array.dtype.kind not in "iu":
            raise ValueError(f"support_y: labels must be integers, got {array.dtype}")
        labels, classes = np.unique(array, return_inverse=True)
        if len(labels) != size:
            seen = ", ".join(map(str, labels[:10].tolist()))
            raise ValueError(
                f"support_y: the model tells {size} classes apart, and needs examples of all of "
                f"them; the support set has {len(labels)} ({seen}{', ...' * (len(labels) > 10)})"
            )
        return torch.from_numpy(classes.astype(np.int64)), labels
