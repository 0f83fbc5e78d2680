"""Measures why MAML works: feature reuse or rapid learning (section 4.2; Raghu et al. 2020)?

A trained model is compared before and after it has adapted to test tasks:

    representations   how much the outputs of each layer on the query examples change (CKA, CCA)
    parameters        how far the parameters of each layer move
    abilities         what is left of the metric if only the head, only the body, or nothing adapts
    paths             whether the query loss rises on the straight line from θ to a task's θ'_i
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import vmap

from pipeline.config.experiment import Experiment
from pipeline.maml.adaptation import Adaptation, matching
from pipeline.maml.adaptation_curve import Adapted, adapt, query_metrics
from pipeline.maml.confidence import Estimate
from pipeline.maml.flat_vector import Params
from pipeline.maml.meta_loss import Objective
from pipeline.maml.representations import (
    Outputs,
    head_inputs,
    layer_of_modules,
    layer_outputs,
    linear_cka,
    mean_cca,
    nearest_centroid,
    weight_layers,
)
from pipeline.worker.learner import adaptation_of, model_of
from pipeline.worker.task_source import EVALUATION_SEED
from tasks.base import Examples, Supervised, TaskBatch, supervised

FRACTIONS = tuple(round(0.1 * i, 1) for i in range(16))
"""Points on the straight line from θ (0) to θ'_i (1) and beyond, at which paths are measured."""
_TASKS_AT_ONCE = 8
_QUERIES = 15  # query examples (per class), where the task has such a setting
NONE, ALL, HEAD, BODY, CENTROID = (
    "no adaptation",
    "as trained",
    "only the head adapts",
    "only the body adapts",
    "no adaptation, nearest centroid",
)


@dataclass(frozen=True)
class LayerChange:
    """How adaptation changes a layer: weights, and the normalisation and activation after them."""

    name: str
    kind: str
    cka: Estimate
    """Linear CKA of its outputs before and after adaptation; 1: the same representation."""
    cca: Estimate
    """Mean CCA of the same outputs; NaN where there are too few examples for its width."""
    moved: Estimate
    """|θ' − θ| / |θ| of its parameters."""


@dataclass(frozen=True)
class Analysis:
    """The numbers of an analysis."""

    metric: str
    """The tasks' `primary_metric`."""
    steps: int
    num_tasks: int
    split: str
    changes: dict[str, Any]
    """Task settings that differ from the run's."""
    layers: list[LayerChange]
    """In the order of the network; the head is the last."""
    abilities: dict[str, Estimate]
    """The metric on query examples, by what adapts; CENTROID only in classification."""
    lost: dict[str, Estimate]
    """The paired difference to adaptation as trained, by what adapts; positive: worse."""
    paths: list[list[float]]
    """The query loss at FRACTIONS of the way, [tasks, len(FRACTIONS)]."""
    higher_is_better: bool
    """Of the metric."""

    @property
    def monotone_share(self) -> float:
        """Share of tasks whose loss never rises on the way to θ'_i by more than 1 % of its drop."""
        inside = np.array(self.paths)[:, : FRACTIONS.index(1.0) + 1]
        rise = np.diff(inside, axis=1).max(axis=1)
        return float((rise <= 0.01 * np.abs(inside[:, 0] - inside[:, -1])).mean())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**dataclasses.asdict(self), "monotone_share": self.monotone_share}


def analysis_of(
    experiment: Experiment,
    theta: Params,
    *,
    split: str = "test",
    num_tasks: int = 100,
    steps: int | None = None,
    queries: int | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Analysis:
    """Analyse trained meta-parameters on tasks 0 .. num_tasks − 1 of a split, in this process.

    `steps` of adaptation default to the `selection_step`. `queries` are query examples (per class);
    15 by default, because a few say little of a representation, or the run's own number where
    classes have fewer. Raises ValueError naming the setting.
    """
    steps = experiment.selection_step if steps is None else steps
    task, changes = _with_queries(experiment, queries, split)
    dtype = getattr(torch, experiment.compute.dtype)
    model = model_of(experiment).to(dtype)
    looker = _Looker(
        model,
        Objective(model, task),
        adaptation_of(experiment, model),
        {name: value.to(dtype) for name, value in theta.items()},
        torch.tensor(experiment.inner.lr, dtype=dtype),
        steps,
        task.primary_metric,
        task.output_size if task.has_classes else 0,
    )
    found: list[dict[str, npt.NDArray[Any]]] = []
    for first in range(0, num_tasks, _TASKS_AT_ONCE):
        indices = np.arange(first, min(first + _TASKS_AT_ONCE, num_tasks))
        batch = task.sample(EVALUATION_SEED, split, indices).to("cpu", dtype)
        found.append(looker.look(batch))
        on_progress(int(indices[-1]) + 1)
    values = {name: np.concatenate([f[name] for f in found], axis=-1) for name in found[0]}
    sign = 1 if task.higher_is_better else -1
    abilities = {n.partition("/")[2]: v for n, v in values.items() if n.startswith("ability/")}
    return Analysis(
        metric=task.primary_metric,
        steps=steps,
        num_tasks=num_tasks,
        split=split,
        changes=changes,
        layers=_layer_changes(values, dict(weight_layers(model))),
        abilities={name: Estimate.of(v) for name, v in abilities.items()},
        lost={
            name: Estimate.of(sign * (abilities[ALL] - v))
            for name, v in abilities.items()
            if name != ALL
        },
        paths=values["path"].T.tolist(),
        higher_is_better=task.higher_is_better,
    )


def _layer_changes(
    values: Mapping[str, npt.NDArray[Any]], kinds: Mapping[str, str]
) -> list[LayerChange]:
    """Means over the tasks, layer by layer; `kinds` are the kinds of layers by name."""
    names = [key.removeprefix("cka/") for key in values if key.startswith("cka/")]
    return [
        LayerChange(
            name,
            kinds[name],
            *(Estimate.of(values[f"{what}/{name}"]) for what in ("cka", "cca", "moved")),
        )
        for name in names
    ]


def _with_queries(
    experiment: Experiment, queries: int | None, split: str
) -> tuple[Supervised, dict[str, Any]]:
    """The tasks to analyse, and the settings in which they differ from the run's."""
    if "queries" in experiment.task.settings:
        changes = {"queries": queries or _QUERIES}
        try:
            task = supervised(experiment.build_task(**changes), "analysis")
            task.check(split)
            return task, changes
        except ValueError:
            if queries is not None:
                raise
    task = supervised(experiment.build_task(), "analysis")
    task.check(split)
    return task, {}


class _Looker:
    """Measures a batch of tasks, all of them at once; B is their number."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        adaptation: Adaptation,
        meta: Params,
        alpha: Tensor,
        steps: int,
        metric: str,
        classes: int,
    ):
        self._model, self._objective, self._adaptation = model, objective, adaptation
        self._meta, self._alpha, self._steps = meta, alpha, steps
        self._metric, self._classes = metric, classes
        head = set(matching(model, ["head"], "analysis"))
        self._parts = {
            HEAD: tuple(name for name in adaptation.fast if name in head),
            BODY: tuple(name for name in adaptation.fast if name not in head),
        }

    @torch.no_grad()
    def look(self, batch: TaskBatch) -> dict[str, npt.NDArray[Any]]:
        """Values per task [B] by name; 'path' [len(FRACTIONS), B]."""
        start, end = self._ends(self._adaptation, batch)
        values = (
            self._likeness(start, end, batch)
            | self._moved(start, end)
            | self._abilities(start, end, batch)
            | {"path": self._path(start, end, batch)}
        )
        return {name: value.double().numpy() for name, value in values.items()}

    def _ends(self, adaptation: Adaptation, batch: TaskBatch) -> tuple[Adapted, Adapted]:
        """The parameters of each task before and after adaptation by `adaptation`."""
        objective, meta, alpha = self._objective, self._meta, self._alpha
        tasks, support = len(batch.query.x), batch.support
        walk = list(adapt(objective, adaptation, meta, support, alpha, self._steps, tasks))
        return walk[0], walk[-1]

    def _likeness(self, start: Adapted, end: Adapted, batch: TaskBatch) -> dict[str, Tensor]:
        """CKA and CCA of every layer's outputs before and after adaptation."""
        before, after = (self._outputs(at, batch.query.x) for at in (start, end))
        values = {}
        for name in before:
            pairs = list(zip(before[name], after[name], strict=True))
            values[f"cka/{name}"] = torch.stack([linear_cka(x, y) for x, y in pairs])
            values[f"cca/{name}"] = torch.stack([mean_cca(x, y) for x, y in pairs])
        return values

    def _outputs(self, at: Adapted, x: Tensor) -> Outputs:
        """The outputs of every layer on each task's inputs, by layer: [B, n, ..., channels]."""

        def one(fast: Params, x: Tensor) -> Outputs:
            return layer_outputs(self._model, {**at.slow, **fast}, x)

        return vmap(one)(at.fast, x)

    def _moved(self, start: Adapted, end: Adapted) -> dict[str, Tensor]:
        """|θ' − θ| / |θ| by layer, [B] each."""
        layers = [name for name, _ in weight_layers(self._model)]
        of_layer = layer_of_modules(self._model)
        change = dict.fromkeys(layers, torch.zeros(next(iter(start.fast.values())).shape[0]))
        size = dict(change)
        for name, p in start.slow.items():
            layer = of_layer[name.rpartition(".")[0]]
            size[layer] = size[layer] + p.square().sum()
        for name, p in start.fast.items():
            layer = of_layer[name.rpartition(".")[0]]
            change[layer] = change[layer] + (end.fast[name] - p).flatten(1).square().sum(1)
            size[layer] = size[layer] + p.flatten(1).square().sum(1)
        return {f"moved/{name}": (change[name] / size[name]).sqrt() for name in layers}

    def _abilities(self, start: Adapted, end: Adapted, batch: TaskBatch) -> dict[str, Tensor]:
        """The metric on the query set by what adapts, [B] each."""
        values = {NONE: self._query_metric(start, batch), ALL: self._query_metric(end, batch)}
        for name, fast in self._parts.items():
            values[name] = values[NONE]
            if fast:
                part = dataclasses.replace(self._adaptation, fast=fast)
                values[name] = self._query_metric(self._ends(part, batch)[1], batch)
        if self._classes:
            values[CENTROID] = self._centroid_accuracy(start, batch)
        return {f"ability/{name}": value for name, value in values.items()}

    def _query_metric(self, at: Adapted, batch: TaskBatch) -> Tensor:
        """The metric on the query set, [B]."""
        loss, metrics = query_metrics(self._objective, at, batch.query)
        return {"loss": loss, **metrics}[self._metric]

    def _centroid_accuracy(self, at: Adapted, batch: TaskBatch) -> Tensor:
        """Accuracy of the nearest class centroid in the features that the head receives, [B]."""

        def one(fast: Params, support: Examples, query: Examples) -> Tensor:
            params = {**at.slow, **fast}
            features = [head_inputs(self._model, params, x) for x in (support.x, query.x)]
            scores = nearest_centroid(features[0], support.y, features[1], self._classes)
            return (scores.argmax(-1) == query.y).double().mean()

        return vmap(one)(at.fast, batch.support, batch.query)

    def _path(self, start: Adapted, end: Adapted, batch: TaskBatch) -> Tensor:
        """The query loss at FRACTIONS of the way from θ to θ'_i, [len(FRACTIONS), B]."""

        def loss(fast: Params, query: Any) -> Tensor:
            return self._objective.loss({**end.slow, **fast}, query)

        rows = []
        for fraction in FRACTIONS:
            fast = {n: p + fraction * (end.fast[n] - p) for n, p in start.fast.items()}
            rows.append(vmap(loss)(fast, batch.query))
        return torch.stack(rows)
