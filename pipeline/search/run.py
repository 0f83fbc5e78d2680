"""Searches settings with Ray Tune: which are best, and what they cost.

    SEARCH/search.yaml       the resolved configuration
    SEARCH/trials/ID/        an ordinary run folder per trial
    SEARCH/tune/             Ray Tune's own state, from which a search is resumed
    SEARCH/results.csv ...   see `report`

The driver starts Ray and the MLflow run in which all trials are nested, then only watches. Trials
are ordinary runs of `training.loop` in actors of Tune, each with its workers in one placement group
(see `trial`).
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.cluster.capacity import refuse_or_wait
from pipeline.cluster.connection import connect
from pipeline.config import json_text
from pipeline.config.experiment import Experiment
from pipeline.config.loading import ConfigError, absolute_path, changes, load
from pipeline.config.search import Search
from pipeline.evaluation.meta_test import check_tasks
from pipeline.runs.claims import leased
from pipeline.runs.continuing import folder_to_continue
from pipeline.runs.files import write_atomically
from pipeline.runs.folder import RunFolderError, check_writable
from pipeline.runs.mlflow_store import TrackingError
from pipeline.runs.tracker import (
    RANKED_BY,
    RANKED_MODE,
    MlflowTracker,
    NullTracker,
    Tracker,
    environment_tags,
    resolve_uri,
)
from pipeline.search.report import best_of, in_words, outcomes, ranked, write_report
from pipeline.search.space import possible_experiments, search_of
from pipeline.search.trial import (
    UNFINISHED,
    Plan,
    Ranking,
    TrialResult,
    ranking_of,
    sized_as_trial,
)
from pipeline.search.trial_records import TrialRuns
from pipeline.search.tune import (
    ENVIRONMENT,
    SearchWatcher,
    algorithm_of,
    conductor_of,
    run_trials,
    scheduler_of,
    trial_lacks,
)
from pipeline.training.endings import Interrupted, Interruption, never
from pipeline.training.opening import with_absolute_data
from pipeline.training.placement import gpu_share
from pipeline.worker.chunk import ChunkComputer

_FACTS = "search.json"
_CONNECTING = 60.0  # seconds that MLflow has to answer before the search gives up


@dataclass(frozen=True)
class SearchResult:
    """The trials of a search that is over."""

    plan: Plan
    trials: list[TrialResult]
    """The best first."""
    words: list[str]
    """The answer for a person, line by line."""

    @property
    def best(self) -> TrialResult | None:
        """The trial with the best value; None if none has a value."""
        return best_of(self.trials, self.plan.ranking)


def run_search(
    experiment: Experiment,
    folder: str | Path,
    *,
    resume: bool = False,
    watcher: SearchWatcher | None = None,
    should_stop: Callable[[], bool] = never,
) -> SearchResult:
    """Search for the best settings of an experiment: one short training, a trial, for each.

    `experiment` has a `search` section that says what to try; `folder` is where the search leaves
    its trials and results: a new one, or with `resume` that of a search which goes on, keeping the
    trials that have ended. `watcher` is told how the search gets on. `should_stop` is asked while
    trials run; True saves the search and ends it.

    Returns all trials, the best first, with the findings in words. A trial that fails does not end
    the search.

    Raises Interrupted if the search was stopped; and before anything is started ConfigError,
    ValueError, RunFolderError, StoreError or TrackingError for what is wrong with the space, the
    folder, the data or the tracking store.
    """
    watcher, folder = watcher or SearchWatcher(), absolute_path(folder)
    experiment = with_absolute_data(experiment)
    search, possible = search_of(experiment), possible_experiments(experiment)
    _check_tasks(possible)
    ranking = _ranking(search, possible)
    scheduler = scheduler_of(search, possible)
    algorithm = algorithm_of(search, experiment.seed)
    with contextlib.ExitStack() as stack:
        stack.enter_context(leased(folder))
        token = _open_folder(experiment, folder, resume)
        watcher.starting(experiment, folder)
        gpus = stack.enter_context(_ray(experiment, possible, watcher.notice))
        if gpus:  # otherwise what is found may run where there are some
            experiment = experiment.changed(cluster={"gpus_per_worker": gpus})
        plan = Plan(experiment, folder, token, ranking, (os.getcwd(),))
        tracker, plan = stack.enter_context(_recorded(plan, watcher))
        runs = TrialRuns(plan)
        conductor = conductor_of(plan, watcher, runs, should_stop)
        stopped = True
        try:
            run_trials(plan, scheduler, algorithm, conductor)
            stopped = should_stop()
        finally:
            results = ranked(conductor.results(over=not stopped), ranking)
            for result in results:
                runs.end(result)
            runs.close()
        files = write_report(plan, results, runs.run_ids)
        words = in_words(plan, results)
        _record(tracker, plan, results, words, files, runs.run_ids)
        if stopped:
            raise Interrupted(f"the search was stopped: {outcomes(results)}")
        _write_facts(folder, {"token": token, "over": True})
    return SearchResult(plan, results, words)


def load_search(folder: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a search that is to be continued; no override can change it.

    Raises ConfigError, RunFolderError.
    """
    if overrides:
        raise ConfigError("the overrides", ["a resumed search keeps its settings"])
    path = folder / "search.yaml"
    if not path.is_file():
        raise RunFolderError(f"{folder} is not the folder of a search: it has no search.yaml")
    return load(str(path))


def search_to_continue(experiment: Experiment) -> Path | None:
    """The folder of a search of this experiment that can go on; None if there is none.

    It is `run_dir`, else the newest of this name and these settings that is not over. Raises
    ConfigError if the search in `run_dir` has other settings.
    """

    def check(folder: Path) -> None:
        before = load_search(folder)
        asked = with_absolute_data(experiment).changed(run_dir=before.run_dir)
        errors = [
            f"{path}: was {was!r}, is {now!r}; a resumed search keeps its settings"
            for path, was, now in changes(before, asked)
        ]
        if errors:
            raise ConfigError(f"the search in {folder}", errors)

    return folder_to_continue(
        experiment, "search.yaml", check, lambda folder: bool(_facts(folder).get("over"))
    )


def _check_tasks(experiments: Sequence[Experiment]) -> None:
    """Check every kind of tasks that trials may meet. Raises what `check_tasks` raises."""
    for experiment in {e.task.model_dump_json(): e for e in experiments}.values():
        check_tasks(experiment)


def _ranking(search: Search, possible: Sequence[Experiment]) -> Ranking:
    """What trials are ranked by. Raises ValueError if a validation does not report it."""
    computer = ChunkComputer(possible[0].changed(compute={"device": "cpu"}), compile=False)
    found = ranking_of(search, possible[0], computer.metric_names())
    for experiment in possible:
        steps = {*experiment.report_steps, experiment.selection_step}
        if found.step_of(experiment) not in steps:
            raise ValueError(
                f"search.metric: {search.metric!r}: validations report adaptation steps "
                f"{', '.join(map(str, sorted(steps)))}; add {found.step} to evaluation.steps"
            )
    return found


def _open_folder(experiment: Experiment, folder: Path, resume: bool) -> str:
    """Make or find the folder; return the search's token in MLflow. Raises RunFolderError."""
    if resume:
        try:
            return str(_facts(folder)["token"])
        except KeyError:
            raise RunFolderError(f"{folder / _FACTS} has no token") from None
    if (folder / "search.yaml").exists() or (folder / "config.yaml").exists():
        raise RunFolderError(
            f"run_dir: {folder} already holds results; continue a search with --resume {folder}, "
            "or choose another folder"
        )
    token = uuid.uuid4().hex
    check_writable(folder)
    _write_facts(folder, {"token": token})
    write_atomically(folder / "search.yaml", experiment.to_yaml())
    return token


def _facts(folder: Path) -> dict[str, Any]:
    """What a search knows of itself: its token in MLflow, and whether it is over.

    Raises RunFolderError.
    """
    path = folder / _FACTS
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}") from None


def _write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    write_atomically(folder / _FACTS, json_text.write(facts, indent=None))


@contextlib.contextmanager
def _ray(
    experiment: Experiment, possible: Sequence[Experiment], notice: Callable[[str], None]
) -> Iterator[float]:
    """Connect to Ray, and check that a trial fits; gives the GPUs of a worker, or of a trial that
    has none. Raises ValueError if no trial fits this machine."""
    import ray

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    started = connect(experiment, 0)
    try:
        alone = experiment.cluster.workers in (0, "auto")
        gpus = gpu_share(experiment.changed(cluster={"workers": 1}) if alone else experiment)
        missing = max((trial_lacks(sized_as_trial(e)) for e in possible), key=len)
        refuse_or_wait(experiment, missing, notice)
        yield gpus
    finally:
        if started:
            ray.shutdown()


@contextlib.contextmanager
def _recorded(plan: Plan, watcher: SearchWatcher) -> Iterator[tuple[Tracker, Plan]]:
    """Open the MLflow run in which trials are nested, close it at the end; the plan knows it.

    Raises TrackingError if MLflow does not answer.
    """
    experiment = plan.experiment
    if not experiment.tracking.enabled:
        yield NullTracker(), plan
        return
    uri = resolve_uri(experiment.tracking.uri, plan.folder)
    tracker = MlflowTracker.open(
        uri=uri,
        experiment=experiment.tracking.experiment,
        run_name=plan.folder.name,
        run_dir=plan.folder,
        params=experiment.flat(),
        tags={
            **environment_tags(),
            "kind": "search",
            "search": plan.folder.name,
            RANKED_BY: plan.ranking.name,
            RANKED_MODE: plan.ranking.mode,
            "run_dir": str(plan.folder),
            **experiment.tracking.tags,
        },
        token=plan.token,
    )
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        parent = tracker.wait_for_run_id(_CONNECTING)
        if parent is None:
            raise TrackingError(
                f"MLflow at {uri} does not answer, and the trials of a search are nested in its "
                "run there: start it, or search with tracking.enabled=false"
            )
        tracker.log_artifact(plan.folder / "search.yaml")
        yield tracker, replace(plan, parent_run_id=parent, tracking_uri=uri)
        status = "FINISHED"
    except Interruption:
        status = "KILLED"
        raise
    finally:
        unsent = tracker.close(status)
        if unsent is not None:
            watcher.notice(f"MLflow could not be reached; what it missed is in {unsent}")


def _record(
    tracker: Tracker,
    plan: Plan,
    results: Sequence[TrialResult],
    words: Sequence[str],
    files: Sequence[Path],
    run_ids: Mapping[str, str],
) -> None:
    """Log the findings to the search's own MLflow run."""
    for path in files:
        tracker.log_artifact(path, "plots" if path.parent.name == "plots" else None)
    # The step is the number of ended trials: a search that was resumed is logged several times.
    ended = sum(r.outcome != UNFINISHED for r in results)
    counts = {o: sum(r.outcome == o for r in results) for o in {r.outcome for r in results}}
    tracker.log_metrics({f"trials/{outcome}": count for outcome, count in counts.items()}, ended)
    best = best_of(results, plan.ranking)
    if best is not None:
        tracker.log_metrics({"best": best.value, "best_ci95": best.ci95}, ended)
        tags = {"best_trial": best.trial_id, "best_run_id": run_ids.get(best.trial_id, "")}
        tracker.set_tags({**tags, "answer": " ".join(words)})
