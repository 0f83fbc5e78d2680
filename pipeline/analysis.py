"""Why does it work: feature reuse or rapid learning (section 4.2; Raghu et al. 2020)?

A trained model is looked at before and after it has adapted to test tasks:

    representations   do layers see the query examples differently afterwards? (CKA, CCA)
    parameters        how far has each layer moved?
    abilities         what is left if only the head, only the body, or nothing adapts?
    paths             the query loss on the straight line from θ to every θ'_i: one valley?
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import vmap

from pipeline.adaptation import Adaptation, matching
from pipeline.chunk import EVALUATION_SEED, adaptation_of, model_of
from pipeline.config import Experiment
from pipeline.estimates import Estimate
from pipeline.meta_gradient import Adapted, adaptation_curve, trajectory
from pipeline.meta_loss import Objective
from pipeline.parameters import Params
from pipeline.representations import (
    Outputs,
    layer_outputs,
    linear_cka,
    mean_cca,
    nearest_centroid,
    weight_layers,
)
from tasks.base import Classification, TaskBatch, TaskDistribution

FRACTIONS = tuple(round(0.1 * i, 1) for i in range(16))
"""Of the way from θ (0) to θ'_i (1), and beyond."""
_TASKS_AT_ONCE = 8
_QUERIES = 15  # per class
_ALIKE = 0.9  # CKA of representations that count as the same
NONE, ALL, HEAD, BODY, CENTROID = (
    "no adaptation",
    "as trained",
    "only the head adapts",
    "only the body adapts",
    "no adaptation, nearest centroid",
)


@dataclass(frozen=True)
class LayerChange:
    """How adaptation changes a layer: one with weights, and what follows it up to the next."""

    name: str
    kind: str
    cka: Estimate
    """Of its outputs before and after adaptation; 1: the same representation."""
    cca: Estimate
    """NaN where there are too few examples for its width."""
    moved: Estimate
    """|θ' − θ| / |θ| of its parameters."""


@dataclass(frozen=True)
class Analysis:
    """What was found."""

    metric: str
    steps: int
    num_tasks: int
    split: str
    changes: dict[str, Any]
    """Task settings that differ from the run's."""
    layers: list[LayerChange]
    """The head is the last."""
    abilities: dict[str, Estimate]
    """The metric when this or that adapts; regression has no centroids."""
    lost: dict[str, Estimate]
    """What is lost against adaptation as trained, task by task (positive: worse)."""
    paths: list[list[float]]
    """Query loss at FRACTIONS of the way, for every task."""

    @property
    def monotone_share(self) -> float:
        """Share of tasks whose loss never rises on the way to θ'_i (by more than 1 % of its
        drop)."""
        inside = np.array(self.paths)[:, : FRACTIONS.index(1.0) + 1]
        rise = np.diff(inside, axis=1).max(axis=1)
        return float((rise <= 0.01 * np.abs(inside[:, 0] - inside[:, -1])).mean())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**dataclasses.asdict(self), "monotone_share": self.monotone_share}


def analyze(
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

    `steps` of adaptation, by default the `selection_step`; `queries`: examples (per class), where
    the tasks have such a setting; by default 15, because representations of a few examples say
    little, or the run's own where there are not so many. Raises ValueError naming the setting.
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
        task.output_size if isinstance(task, Classification) else 0,
    )
    found: list[dict[str, npt.NDArray[Any]]] = []
    for first in range(0, num_tasks, _TASKS_AT_ONCE):
        indices = np.arange(first, min(first + _TASKS_AT_ONCE, num_tasks))
        batch = task.sample(EVALUATION_SEED, split, indices).to("cpu", dtype)
        found.append(looker.look(batch))
        on_progress(int(indices[-1]) + 1)
    values = {name: np.concatenate([f[name] for f in found], axis=-1) for name in found[0]}
    sign = 1 if task.higher_is_better else -1
    kinds = dict(weight_layers(model))
    abilities = {n.partition("/")[2]: v for n, v in values.items() if n.startswith("ability/")}
    return Analysis(
        metric=task.primary_metric,
        steps=steps,
        num_tasks=num_tasks,
        split=split,
        changes=changes,
        layers=[
            LayerChange(
                name,
                kinds[name],
                *(Estimate.of(values[f"{what}/{name}"]) for what in ("cka", "cca", "moved")),
            )
            for name in (key.removeprefix("cka/") for key in values if key.startswith("cka/"))
        ],
        abilities={name: Estimate.of(v) for name, v in abilities.items()},
        lost={
            name: Estimate.of(sign * (abilities[ALL] - v))
            for name, v in abilities.items()
            if name != ALL
        },
        paths=values["path"].T.tolist(),
    )


def _with_queries(
    experiment: Experiment, queries: int | None, split: str
) -> tuple[TaskDistribution, dict[str, Any]]:
    """The tasks to look at, and the settings in which they differ from the run's."""
    if "queries" in experiment.task.settings:
        changes = {"queries": queries or _QUERIES}
        try:
            task = experiment.build_task(**changes)
            task.check(split)
            return task, changes
        except ValueError:
            if queries is not None:
                raise
    task = experiment.build_task()
    task.check(split)
    return task, {}


class _Looker:
    """Looks at the tasks of a batch, all of them at once."""

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
        adapted = list(
            trajectory(
                self._objective,
                self._adaptation,
                self._meta,
                batch.support,
                self._alpha,
                self._steps,
            )
        )
        start, end = adapted[0], adapted[-1]
        before, after = (self._outputs(at, batch.query.x) for at in (start, end))
        values: dict[str, Tensor] = {}
        for name in before:
            pairs = list(zip(before[name], after[name], strict=True))
            values[f"cka/{name}"] = torch.stack([linear_cka(x, y) for x, y in pairs])
            values[f"cca/{name}"] = torch.stack([mean_cca(x, y) for x, y in pairs])
        values |= self._moved(start, end)
        values |= self._abilities(batch)
        if self._classes and len(before) > 1:
            features = list(before)[-2]  # what the head sees
            support = self._outputs(start, batch.support.x)[features].flatten(2)
            judge = partial(nearest_centroid, classes=self._classes)
            scores = vmap(judge)(support, batch.support.y, before[features].flatten(2))
            right = scores.argmax(-1) == batch.query.y
            values[f"ability/{CENTROID}"] = right.double().mean(-1)
        values["path"] = self._path(start, end, batch)
        return {name: value.double().numpy() for name, value in values.items()}

    def _outputs(self, at: Adapted, x: Tensor) -> Outputs:
        """Of every layer, [B, n, ..., channels]."""

        def one(fast: Params, x: Tensor) -> Outputs:
            return layer_outputs(self._model, {**at.slow, **fast}, x)

        return vmap(one)(at.fast, x)

    def _moved(self, start: Adapted, end: Adapted) -> dict[str, Tensor]:
        """|θ' − θ| / |θ| by layer; the parameters after a layer's weights belong to it."""
        layers = [name for name, _ in weight_layers(self._model)]
        owner, of_layer = layers[0], {}
        modules = [name for name, _ in self._model.named_modules()]
        for module in modules:
            owner = module if module in layers else owner
            of_layer[module] = owner
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

    def _abilities(self, batch: TaskBatch) -> dict[str, Tensor]:
        def curve(adaptation: Adaptation, *steps: int) -> Tensor:
            return adaptation_curve(
                self._objective, adaptation, self._meta, batch, self._alpha, steps=steps
            )[self._metric]

        values = {}
        if self._steps:
            none, full = curve(self._adaptation, 0, self._steps)
        else:
            none = full = curve(self._adaptation, 0)[0]
        values[f"ability/{NONE}"], values[f"ability/{ALL}"] = none, full
        for name, fast in self._parts.items():
            if not fast:
                values[f"ability/{name}"] = none
            elif set(fast) == set(self._adaptation.fast):
                values[f"ability/{name}"] = full
            else:
                part = dataclasses.replace(self._adaptation, fast=fast)
                values[f"ability/{name}"] = curve(part, self._steps)[0]
        return values

    def _path(self, start: Adapted, end: Adapted, batch: TaskBatch) -> Tensor:
        def loss(fast: Params, query: Any) -> Tensor:
            return self._objective.loss({**end.slow, **fast}, query)

        rows = []
        for fraction in FRACTIONS:
            fast = {n: p + fraction * (end.fast[n] - p) for n, p in start.fast.items()}
            rows.append(vmap(loss)(fast, batch.query))
        return torch.stack(rows)


def finding(analysis: Analysis) -> str:
    """Feature reuse or rapid learning, in words, from the numbers."""
    percent = analysis.metric == "accuracy"
    body, head = analysis.layers[:-1], analysis.layers[-1]

    def shown(estimate: Estimate) -> str:
        return estimate.text(percent) + (" %" if percent else "")

    abilities = analysis.abilities
    gain, uncertain = analysis.lost[NONE]
    helps = gain > (math.inf if uncertain is None else uncertain)
    kept = {name: 1 - lost.mean / gain for name, lost in analysis.lost.items()} if helps else {}
    sentences = [
        f"Adaptation in {analysis.steps} step{'' if analysis.steps == 1 else 's'} takes the "
        f"{analysis.metric} from {shown(abilities[NONE])} to {shown(abilities[ALL])}."
    ]
    cka, moved = (_mean(values) for values in ([x.cka for x in body], [x.moved for x in body]))
    if math.isfinite(cka):
        alike = "before and after are alike" if cka > _ALIKE else "change"
        sentences.append(
            f"The body's representations {alike} (mean CKA {cka:.2f}; head {head.cka.mean:.2f}), "
            f"its parameters move by {100 * moved:.1f} % (head {100 * head.moved.mean:.1f} %)."
        )
    for name, verb in ((HEAD, "keeps"), (BODY, "keeps"), (CENTROID, "reaches")):
        if name in kept:
            sentences.append(
                f"{name.capitalize()}: {shown(abilities[name])}, which {verb} "
                f"{100 * max(0.0, kept[name]):.0f} % of the gain."
            )
    sentences.append(_verdict(kept, alike=cka > _ALIKE))
    sentences.append(
        f"On the straight way from θ to θ'_i the query loss never rises on "
        f"{100 * analysis.monotone_share:.0f} % of the tasks"
        + (": they lie in one valley." if analysis.monotone_share > 0.9 else ".")
    )
    return " ".join(sentences)


def _mean(estimates: list[Estimate]) -> float:
    """Over layers for which there is a value."""
    known = [estimate.mean for estimate in estimates if math.isfinite(estimate.mean)]
    return sum(known) / len(known) if known else math.nan


def _verdict(kept: dict[str, float], alike: bool) -> str:
    """From what is kept of the gain without adapting the body, or without the head."""
    reuse = max(kept.get(HEAD, 0.0), kept.get(CENTROID, 0.0))
    rapid = kept.get(BODY, 0.0)
    if not kept:
        return "Adaptation does not help for certain, so there is nothing to explain."
    if reuse >= 0.9 and (alike or rapid < 0.9):
        return "This is feature reuse: what the body has learned serves new tasks as it is."
    if rapid >= 0.9 and reuse < 0.9:
        return "This is rapid learning: the body itself changes for every task."
    if reuse >= 0.9:
        return "Head or body alone does it: the features serve as they are, and can change too."
    return "It is both: neither the head alone nor the body alone explains the gain."
