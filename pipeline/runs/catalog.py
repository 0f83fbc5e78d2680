"""Runs and searches as MLflow has them: listed, found by what people call them, compared.

Only reads, but for `log_to_run`. The trials of a search have its id in the tag mlflow.parentRunId.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.maml.confidence import Estimate
from pipeline.runs.mlflow_sender import existing_run
from pipeline.runs.mlflow_store import TrackingError
from pipeline.runs.reading import default_store, reading, store_of_folder
from pipeline.runs.tracker import RANKED_BY, RANKED_MODE, SELECTED_BY

STATUSES = ("running", "scheduled", "finished", "failed", "killed")
_PAGE = 500  # runs per request
_SHORT_ID = 8  # characters by which people name a run
_NAMED = 8  # candidates in an error message
_FINAL = ("validation/", "test/")
_BEFORE_TAGS = ("accuracy", "return", "loss")  # records of earlier versions do not say which
_CI95 = "_ci95"


class Validation(NamedTuple):
    """The last value of the metric that chooses the best checkpoint."""

    metric: str
    step: int
    """Gradient steps of adaptation."""
    value: Estimate


@dataclass(frozen=True)
class Run:
    """One run as MLflow has it."""

    run_id: str
    name: str
    status: str
    """One of STATUSES."""
    started: datetime.datetime
    """With the local time zone."""
    ended: datetime.datetime | None
    """None: it still runs, or its driver died without ending it."""
    tracking_experiment: str
    """MLflow's experiment, which holds the runs of many experiments of ours."""
    settings: dict[str, str]
    """By dotted path, as they were in the end: a resumed run may have changed some."""
    metrics: dict[str, float]
    """The last value of each metric, by name."""
    tags: dict[str, str]
    trials: tuple[Run, ...] = ()
    """The trials of a search: the best first, those without a validation last."""
    ranked_by: str = "None"
    """The metric by which its search ranks a trial, METRIC or METRIC_stepK; 'None': unknown."""

    @property
    def short_id(self) -> str:
        """The beginning of the id, by which people name a run."""
        return self.run_id[:_SHORT_ID]

    @property
    def parent_id(self) -> str | None:
        """The search that it is a trial of."""
        return self.tags.get("mlflow.parentRunId")

    @property
    def is_search(self) -> bool:
        """Whether it is a search: marked as one, or a run with trials."""
        return self.tags.get("kind") == "search" or bool(self.trials)

    @property
    def experiment(self) -> str:
        """The name of the experiment; '' if the run is not ours."""
        return self.settings.get("name", "")

    @property
    def algorithm(self) -> str:
        """The algorithm, as the run is tagged."""
        return self.tags.get("algorithm", "")

    @property
    def order(self) -> str:
        """The order of the meta-gradient, as the run is tagged."""
        return self.tags.get("order", "")

    @property
    def seconds(self) -> float:
        """Seconds from the start to the end, or until now."""
        end = self.ended or datetime.datetime.now(datetime.UTC)
        return (end - self.started).total_seconds()

    @property
    def validation(self) -> Validation | None:
        """The last validation, by the metric that ranks a trial or chooses a run's checkpoint.

        None for a run that is not validated yet, or that is no training run of ours.
        """
        steps = [self.settings.get(key) for key in ("evaluation.selection_step", "inner.steps")]
        step = next((step for step in steps if step is not None and step.isdecimal()), "")
        wanted, _, chosen = self.ranked_by.partition("_step")
        own = self.tags.get(SELECTED_BY)
        for metric in (wanted, *([own] if own else _BEFORE_TAGS)):
            at = chosen if metric == wanted and chosen else step
            value = estimate(self.metrics, f"validation/{metric}_step{at}")
            if value is not None:
                return Validation(metric, int(at), value)
        return None

    def to_json(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        found = self.validation
        return {
            "run_id": self.run_id,
            "name": self.name,
            "kind": "search" if self.is_search else "run",
            "status": self.status,
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round(self.seconds, 3),
            "experiment": self.experiment or None,
            "algorithm": self.algorithm or None,
            "order": self.order or None,
            "validation": found
            and {"metric": found.metric, "step": found.step, **found.value.to_json()},
            "run_dir": self.tags.get("run_dir"),
            "tracking_experiment": self.tracking_experiment,
            "trials": [trial.to_json() for trial in self.trials],
        }


class SideBySide(NamedTuple):
    """Runs compared; every list has one entry per run, None where a run has nothing."""

    runs: list[Run]
    settings: dict[str, list[str | None]]
    """The settings that differ, by path."""
    metrics: dict[str, list[Estimate | None]]
    """The last validation and the meta-test, by name."""

    def to_json(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return {
            "runs": [run.to_json() for run in self.runs],
            "settings": self.settings,
            "metrics": {
                name: [value and value.to_json() for value in values]
                for name, values in self.metrics.items()
            },
        }


def list_runs(uri: str, *, limit: int | None = None, text: str = "") -> list[Run]:
    """The newest runs and searches, newest first; a search holds its trials.

    `text` is a status, or part of a name, of an experiment, of an algorithm, or the beginning of a
    run id. A search whose trials match is listed with those. An absent or empty store has none.
    Raises TrackingError.
    """
    trials: dict[str, list[Run]] = {}
    listed: list[Run] = []
    with reading(uri) as client:
        for run in _newest_first(client):
            # A trial starts after its search, so it was seen before.
            if run.parent_id is not None:
                trials.setdefault(run.parent_id, []).append(run)
            elif found := _filtered(_with_trials(run, trials.pop(run.run_id, [])), text):
                listed.append(found)
                if len(listed) == limit:
                    break
        # What is left belongs to older searches, or to deleted ones.
        orphans = [
            trial
            for parent, group in trials.items()
            if existing_run(client, parent) is None
            for trial in group
            if _matches(trial, text)
        ]
    return sorted(listed + orphans, key=lambda run: run.started, reverse=True)[:limit]


def find_run(reference: str, uri: str | None) -> Run:
    """The run with this id (or a unique beginning of it), name or folder, without its trials.

    The store is `uri`, else the one of the folder, else the default of `maml ui`.
    Raises TrackingError naming the candidates.
    """
    folder = Path(reference).expanduser().absolute()
    is_folder = (folder / "config.yaml").is_file()
    store = store_of_folder(folder, uri) if is_folder else default_store(uri)
    with reading(store, must_exist=True) as client:
        if is_folder:
            # The newest: a folder that was emptied and used again holds the last of its runs.
            for run in _newest_first(client, _where("tags.run_dir", "=", str(folder))):
                return run
            reference = folder.name  # a folder that was moved still has its name
        for found in _called(client, reference):
            if len(found) == 1:
                return found[0]
            if found:
                raise TrackingError(
                    f"{len(found)} runs are called {reference!r}: {_named(found)}; give more of "
                    "the id"
                )
        newest = list(islice(_newest_first(client), _NAMED))
    there = f"the newest are {_named(newest)}" if newest else "it is empty"
    raise TrackingError(
        f"no run in {store} has the id, the name or the folder {reference!r}; {there}"
    )


def _called(client: Any, reference: str) -> Iterator[list[Run]]:
    """The runs of this name, then those whose id is this one or begins so."""
    if reference:
        yield list(_newest_first(client, _where("attributes.run_name", "=", reference)))
    if re.fullmatch("[0-9a-f]+", reference):
        yield list(_newest_first(client, _where("attributes.run_id", "LIKE", f"{reference}%")))


def _where(what: str, how: str, value: str) -> str:
    """A condition of MLflow's search; its language has no way to write both kinds of quotes."""
    quote = '"' if "'" in value else "'"
    return f"{what} {how} {quote}{value.replace(quote, '')}{quote}"


def compare(runs: Sequence[Run]) -> SideBySide:
    """Compare runs: the settings that differ, the last validation and the meta-test."""
    paths = list(dict.fromkeys(p for run in runs for p in run.settings if p != "description"))
    sections = list(dict.fromkeys(path.split(".")[0] for path in paths))
    paths.sort(key=lambda path: sections.index(path.split(".")[0]))
    settings = {path: [run.settings.get(path) for run in runs] for path in paths}
    names = {
        name
        for run in runs
        for name in run.metrics
        if name.startswith(_FINAL) and not name.endswith(_CI95)
    }
    ordered = sorted(names, key=_place)
    return SideBySide(
        list(runs),
        {path: values for path, values in settings.items() if len(set(values)) > 1},
        {name: [estimate(run.metrics, name) for run in runs] for name in ordered},
    )


def log_to_run(run_dir: Path, files: Sequence[Path], folder: str) -> None:
    """Log files to the MLflow run of a folder, as artifacts in `folder`. Raises TrackingError."""
    run = find_run(str(run_dir), None)
    with reading(store_of_folder(run_dir.absolute(), None)) as client:
        for file in files:
            client.log_artifact(run.run_id, str(file), folder)


def estimate(metrics: dict[str, float], name: str) -> Estimate | None:
    """A recorded metric with its confidence interval."""
    if name not in metrics:
        return None
    return Estimate(metrics[name], metrics.get(f"{name}{_CI95}"))


def _with_trials(run: Run, trials: Sequence[Run]) -> Run:
    """A search with its trials, the best first."""
    # Records of earlier versions have the settings alone: "None" where the tasks decide.
    ranked_by = run.tags.get(RANKED_BY, run.settings.get("search.metric", "None"))
    mode = run.tags.get(RANKED_MODE, run.settings.get("search.mode", "None"))
    trials = [replace(trial, ranked_by=ranked_by) for trial in trials]

    def rank(trial: Run) -> tuple[bool, float]:
        validation = trial.validation
        if validation is None or not math.isfinite(validation.value.mean):
            return True, 0.0
        largest = mode == "max" if mode != "None" else validation.metric != "loss"
        return False, -validation.value.mean if largest else validation.value.mean

    return replace(run, trials=tuple(sorted(trials, key=rank)))


def _filtered(run: Run, text: str) -> Run | None:
    """A run that matches, with all its trials; a search with those trials that match; or None."""
    if _matches(run, text):
        return run
    trials = tuple(trial for trial in run.trials if _matches(trial, text))
    return replace(run, trials=trials) if trials else None


def _matches(run: Run, text: str) -> bool:
    text = text.lower()
    if text in STATUSES:
        return run.status == text
    words = (run.name, run.experiment, run.algorithm, run.tracking_experiment)
    return any(text in word.lower() for word in words) or run.run_id.startswith(text)


def _newest_first(client: Any, condition: str = "") -> Iterator[Run]:
    """The runs of the store that were not deleted and meet the condition, the newest first."""
    if client is None:
        return
    experiments = {e.experiment_id: e.name for e in client.search_experiments()}
    if not experiments and client.tracking_uri.startswith("http"):
        raise TrackingError(
            f"{client.tracking_uri} answers, but has not even MLflow's own experiment; is it MLflow"
            "'s server?"
        )
    token = None
    while experiments:
        page = client.search_runs(
            list(experiments),
            condition,
            max_results=_PAGE,
            order_by=["attributes.start_time DESC"],
            page_token=token,
        )
        for found in page:
            yield _run_of(found, experiments[found.info.experiment_id])
        token = page.token
        if not token:
            return


def _run_of(found: Any, tracking_experiment: str) -> Run:
    info, data = found.info, found.data
    changed = {
        key.removeprefix("changed."): value
        for key, value in data.tags.items()
        if key.startswith("changed.")
    }
    return Run(
        run_id=info.run_id,
        name=info.run_name or info.run_id,
        status=str(info.status).lower(),
        started=_local(info.start_time),
        ended=_local(info.end_time) if info.end_time else None,
        tracking_experiment=tracking_experiment,
        settings={**data.params, **changed},
        metrics=dict(data.metrics),
        tags=dict(data.tags),
    )


def _local(milliseconds: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC).astimezone()


def _named(runs: Sequence[Run]) -> str:
    """The ids and names of the first runs, for a message."""
    more = f" and {len(runs) - _NAMED} more" if len(runs) > _NAMED else ""
    return ", ".join(f"{run.short_id} ({run.name})" for run in runs[:_NAMED]) + more


def _place(name: str) -> tuple[int, list[str]]:
    """Where a metric stands among others: validation first, a baseline after what it is for, step
    10 after step 9."""
    padded = re.sub(r"\d+", lambda number: number[0].zfill(9), name)
    return _FINAL.index(f"{name.split('/')[0]}/"), padded.split("/")
