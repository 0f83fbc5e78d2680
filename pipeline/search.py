"""Ray Tune around `training`: which settings are best, and what they cost.

    SEARCH/search.yaml       the resolved configuration
    SEARCH/trials/ID/        an ordinary run folder per trial
    SEARCH/tune/             Ray Tune's own state, from which a search is resumed
    SEARCH/results.csv ...   see `search_report`

The driver starts Ray and the MLflow run that all trials are nested in, then only watches: trials run
in actors of Tune, each with its workers in one placement group (see `search_trial`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.checkpoint import write_atomically
from pipeline.chunk import ChunkComputer
from pipeline.config import Experiment, Search
from pipeline.evaluation import check_tasks
from pipeline.experiments import ConfigError, load
from pipeline.mlflow_sender import TrackingError
from pipeline.ray_workers import cluster_address, connect
from pipeline.search_report import best_of, in_words, outcomes, ranked, write_report
from pipeline.search_runs import TrialRuns
from pipeline.search_space import draws, in_flight, possible_experiments, settings_of, within
from pipeline.search_trial import (
    FAILED,
    STOPPED,
    UNFINISHED,
    Criterion,
    Plan,
    TrialResult,
    base_experiment,
    bundles,
    criterion,
    run_trial,
    trial_experiment,
)
from pipeline.session import Interrupted, Interruption, RunFolderError
from pipeline.tracking import NullTracker, RunTracker, Tracker, environment_tags, resolve_uri

_CONNECTING = 60.0  # seconds that MLflow has to answer; trials are nested in the search's run
_RESTARTS = 3  # of a trial whose process died
_STARVING = 30.0  # seconds without a running trial until somebody is told why

_ENVIRONMENT = {
    "TUNE_GLOBAL_CHECKPOINT_S": "1",  # a search that is killed goes on where it was
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow and the run folders have everything
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths mean the same everywhere
}


class SearchWatcher:
    """What a person may want to see of a search."""

    def starting(self, experiment: Experiment, folder: Path) -> None:
        """The preparation begins."""

    def started(self, plan: Plan, trials: int) -> None:
        """Ray and MLflow are there; `trials` are to come, those that are done included."""

    def progress(self, results: Sequence[TrialResult]) -> None:
        """Something may have happened; called often."""

    def ended(self, result: TrialResult) -> None:
        """A trial is over."""

    def notice(self, message: str) -> None:
        """Something out of the ordinary, in words."""


@dataclass(frozen=True)
class SearchResult:
    """What a search has found."""

    plan: Plan
    trials: list[TrialResult]
    """The best first."""
    words: list[str]

    @property
    def best(self) -> TrialResult | None:
        return best_of(self.trials, self.plan.criterion)


def search(
    experiment: Experiment,
    folder: Path,
    *,
    resume: bool = False,
    watcher: SearchWatcher | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> SearchResult:
    """Try what the experiment's search section says; a trial that fails does not end the search.

    Raises ConfigError, ValueError, RunFolderError, TrackingError for what is wrong before anything
    is started, and Interrupted.
    """
    watcher = watcher or SearchWatcher()
    experiment = _with_absolute_data(experiment)
    possible = possible_experiments(experiment)
    assert experiment.search is not None
    _check_tasks(possible)
    judged = _criterion(experiment.search, possible)
    scheduler = _scheduler(experiment.search, possible)
    algorithm = _algorithm(experiment.search, experiment.seed)
    token = _open_folder(experiment, folder, resume)
    watcher.starting(experiment, folder)
    plan = Plan(experiment, folder, token, None, judged, (os.getcwd(),))
    with _ray(experiment, possible, watcher.notice), _recorded(plan, watcher) as (tracker, plan):
        runs = TrialRuns(plan)
        conductor = _conductor(plan, watcher, runs, should_stop)
        try:
            trials = _tune(plan, scheduler, algorithm, conductor)
            stopped = should_stop()
            results = ranked([_result(plan, trial, over=not stopped) for trial in trials], judged)
        finally:
            for result in conductor.results():
                runs.end(result)
            runs.close()
        files = write_report(plan, results, runs.run_ids)
        words = in_words(plan, results)
        _record(tracker, plan, results, files, runs)
        if stopped:
            raise Interrupted(f"the search was stopped: {outcomes(results)}")
    return SearchResult(plan, results, words)


def load_search(folder: Path, name_or_path: str) -> Experiment:
    """The experiment of a search that is to be continued. Raises ConfigError, RunFolderError."""
    path = folder / "search.yaml"
    if not path.is_file():
        raise RunFolderError(f"{folder} is not the folder of a search: it has no search.yaml")
    before = load(str(path))
    name = load(name_or_path).name if Path(name_or_path).is_file() else name_or_path
    if name != before.name:
        raise ConfigError(str(folder), [f"holds a search of {before.name}, not of {name}"])
    return before


def _with_absolute_data(experiment: Experiment) -> Experiment:
    root = str(Path(experiment.data.root).expanduser().absolute())
    return experiment.model_copy(update={"data": experiment.data.model_copy(update={"root": root})})


def _check_tasks(experiments: Sequence[Experiment]) -> None:
    """Every kind of tasks that trials may meet. Raises what `check_tasks` raises."""
    for experiment in {e.task.model_dump_json(): e for e in experiments}.values():
        check_tasks(experiment)


def _criterion(search: Search, possible: Sequence[Experiment]) -> Criterion:
    """Raises ValueError if a validation does not have what the search asks for."""
    compute = possible[0].compute.model_copy(update={"device": "cpu"})
    computer = ChunkComputer(possible[0].model_copy(update={"compute": compute}), compile=False)
    try:
        metrics = computer.metric_names()
    finally:
        computer.close()
    found = criterion(search, possible[0], metrics)
    for experiment in possible:
        steps = {*experiment.report_steps, experiment.selection_step}
        if found.step_of(experiment) not in steps:
            raise ValueError(
                f"search.metric: {search.metric!r}: validations report adaptation steps "
                f"{', '.join(map(str, sorted(steps)))}; add {found.step} to evaluation.steps"
            )
    return found


def _scheduler(search: Search, possible: Sequence[Experiment]) -> Any:
    """Ray Tune's scheduler. Raises ValueError if it refuses `search.scheduler_args`."""
    from ray.tune import schedulers

    iterations = max(e.outer.iterations for e in possible)
    every = max(e.validate_every for e in possible)
    # One more than there are: a trial ends by itself, when all of it is written.
    asha = {"time_attr": "iteration", "max_t": iterations + 1, "grace_period": every}
    # Brackets follow from the number of decisions that a trial can face.
    hyperband = {"time_attr": "validations", "max_t": -(-iterations // every)}
    space = draws(search.model_copy(update={"algorithm": "random"}))
    mutations = {path: space[path] for path in in_flight(search)}
    mutations = {p: m["grid_search"] if isinstance(m, dict) else m for p, m in mutations.items()}
    pbt = {
        "time_attr": "iteration",
        "perturbation_interval": 2 * every,
        "hyperparam_mutations": mutations,
        "custom_explore_fn": lambda draw: within(search, draw),
    }
    factory, defaults = {
        "asha": (schedulers.ASHAScheduler, {**asha, "reduction_factor": 3}),
        "hyperband": (schedulers.HyperBandScheduler, {**hyperband, "stop_last_trials": False}),
        "median": (
            schedulers.MedianStoppingRule,
            {"time_attr": "iteration", "grace_period": 2 * every},
        ),
        "pbt": (schedulers.PopulationBasedTraining, pbt),
        "none": (schedulers.FIFOScheduler, {}),
    }[search.scheduler]
    try:
        scheduler = factory(**{**defaults, **search.scheduler_args})
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"search.scheduler_args: {factory.__name__} refuses them: {error}"
        ) from None
    return scheduler


def _algorithm(search: Search, seed: int) -> Any:
    """Ray Tune's search algorithm, seeded. Raises ValueError if its package is missing."""
    if search.algorithm == "tpe":
        if importlib.util.find_spec("optuna") is None:
            raise ValueError(
                "search.algorithm: tpe needs Optuna: pip install 'maml-pipeline[search]'"
            )
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return OptunaSearch(seed=seed % 2**32)
    from ray.tune.search.basic_variant import BasicVariantGenerator

    # Each draw meets every point of the grids: trials come in groups that differ in these alone.
    return BasicVariantGenerator(constant_grid_search=True, random_state=seed % 2**32)


def _open_folder(experiment: Experiment, folder: Path, resume: bool) -> str:
    """Make or find the folder; returns the name of the search in MLflow. Raises RunFolderError."""
    path = folder / "search.json"
    if resume:
        try:
            return str(json.loads(path.read_text())["token"])
        except (OSError, ValueError, KeyError) as error:
            raise RunFolderError(f"{path} cannot be read: {error}") from None
    if (folder / "search.yaml").exists() or (folder / "config.yaml").exists():
        raise RunFolderError(
            f"run_dir: {folder} already holds results; continue a search with --resume {folder}, "
            "or choose another folder"
        )
    token = uuid.uuid4().hex
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"token": token}))
    except OSError as error:
        raise RunFolderError(
            f"run_dir: cannot write to {folder}: {error.strerror}; choose another folder"
        ) from error
    write_atomically(folder / "search.yaml", experiment.to_yaml())
    return token


@contextlib.contextmanager
def _ray(
    experiment: Experiment, possible: Sequence[Experiment], notice: Callable[[str], None]
) -> Iterator[None]:
    """Ray, running and with room for a trial. Raises ValueError if there is none here."""
    import ray

    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    started = connect(experiment, 0)
    try:
        lacking = max((_lacking(e) for e in map(base_experiment, possible)), key=len)
        if lacking and cluster_address(experiment) is None:
            raise ValueError(lacking)
        if lacking:
            notice(f"{lacking}; waiting for the cluster to grow")
        yield
    finally:
        if started:
            ray.shutdown()


def _lacking(experiment: Experiment) -> str:
    """What Ray has too little of for a single trial, in words; '' if there is enough."""
    import ray

    wanted = bundles(experiment)
    there = ray.cluster_resources()
    total = {name: sum(b.get(name, 0.0) for b in wanted) for name in ("CPU", "GPU")}
    short = {name: amount for name, amount in total.items() if amount > there.get(name, 0.0)}
    if not short:
        return ""
    workers = experiment.cluster.workers
    what = f"{workers} workers of " if workers else ""
    each = ", ".join(f"{amount:g} {name}" for name, amount in wanted[-1].items())
    have = ", ".join(f"{there.get(name, 0.0):g} {name}" for name in short)
    return (
        f"cluster.workers: a trial takes {what}{each}, together "
        f"{', '.join(f'{a:g} {n}' for n, a in short.items())}, and Ray has {have}: lower "
        "cluster.workers, cluster.cpus_per_worker or cluster.gpus_per_worker"
    )


@contextlib.contextmanager
def _recorded(plan: Plan, watcher: SearchWatcher) -> Iterator[tuple[RunTracker, Plan]]:
    """The MLflow run that trials are nested in. Raises TrackingError if MLflow does not answer."""
    experiment = plan.experiment
    if not experiment.tracking.enabled:
        yield NullTracker(), plan
        return
    uri = resolve_uri(experiment.tracking.uri, plan.folder)
    tracker = Tracker.open(
        uri=uri,
        experiment=experiment.tracking.experiment,
        run_name=plan.folder.name,
        run_dir=plan.folder,
        params=experiment.flat(),
        tags={
            **environment_tags(),
            "search": plan.folder.name,
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
        # Trials are given the address: theirs is another folder, whose default is another store.
        tracking = experiment.tracking.model_copy(update={"uri": uri})
        there = experiment.model_copy(update={"tracking": tracking})
        yield tracker, replace(plan, experiment=there, parent_run_id=parent)
        status = "FINISHED"
    except Interruption:
        status = "KILLED"
        raise
    finally:
        unsent = tracker.close(status)
        if unsent is not None:
            watcher.notice(f"MLflow could not be reached; what it missed is in {unsent}")


def _tune(plan: Plan, scheduler: Any, algorithm: Any, conductor: Any) -> list[Any]:
    """Run or continue the trials; returns Ray Tune's.

    `tune.run` and not its wrapper `Tuner`: that pickles callbacks and scheduler, and continues with
    the pickled ones.
    """
    from ray import tune

    for chatty in ("ray.tune", "ray.air", "ray.train"):
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    search = plan.search

    def trial(draw: dict[str, Any]) -> None:
        run_trial(plan, draw)

    def resources(draw: dict[str, Any]) -> Any:
        experiment = base_experiment(plan.experiment)
        if any(path.startswith("cluster.") for path in search.space):
            experiment = trial_experiment(plan, "", settings_of(search, draw))
        return tune.PlacementGroupFactory(bundles(experiment))

    begun = any((plan.folder / "tune").glob("experiment_state-*.json"))
    resumed = tune.ResumeConfig.ResumeType.RESUME
    analysis = tune.run(
        tune.with_resources(trial, resources),
        name="tune",
        storage_path=str(plan.folder),
        config=draws(search),
        num_samples=1 if search.algorithm == "grid" else search.samples,
        metric="value",
        mode=plan.criterion.mode,
        scheduler=scheduler,
        search_alg=algorithm,
        time_budget_s=search.time_budget,
        max_concurrent_trials=search.max_concurrent,
        checkpoint_config=tune.CheckpointConfig(num_to_keep=3),
        max_failures=_RESTARTS,
        reuse_actors=True,
        raise_on_failed_trial=False,
        resume_config=tune.ResumeConfig(unfinished=resumed, errored=resumed) if begun else None,
        callbacks=[conductor],
        verbose=0,
    )
    return list(analysis.trials)


def _conductor(
    plan: Plan, watcher: SearchWatcher, runs: TrialRuns, should_stop: Callable[[], bool]
) -> Any:
    """Ray Tune's callback: tells the watcher and MLflow what happens, and stops when asked to."""
    from ray import tune

    class Conductor(tune.Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self._trials: list[Any] = []
            self._fed = time.monotonic()

        def results(self) -> list[TrialResult]:
            return [_result(plan, trial, over=False) for trial in self._trials]

        def setup(
            self, stop: Any = None, num_samples: Any = None, total_num_samples: int = 0, **_: Any
        ) -> None:
            watcher.started(plan, total_num_samples)

        def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
            self._trials = trials
            watcher.progress(self.results())
            self._complain_of_starvation()
            if should_stop():
                _ask_tune_to_stop()

        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **_: Any
        ) -> None:
            self._end(_result(plan, trial, over=True))

        on_trial_error = on_trial_complete

        def _end(self, result: TrialResult) -> None:
            runs.end(result)
            watcher.ended(result)

        def _complain_of_starvation(self) -> None:
            now = time.monotonic()
            if any(trial.status == "RUNNING" for trial in self._trials):
                self._fed = now
            elif now - self._fed > _STARVING:
                self._fed = now
                lacking = _lacking(base_experiment(plan.experiment))
                watcher.notice(lacking or "no trial is running: waiting for room in the cluster")

    return Conductor()


def _ask_tune_to_stop() -> None:
    """By the signal at which Tune saves its state and ends."""
    asked = threading.current_thread() is threading.main_thread()
    if not asked or not callable(signal.getsignal(signal.SIGUSR1)):
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGUSR1)


def _result(plan: Plan, trial: Any, over: bool) -> TrialResult:
    """What Tune knows of a trial; `over`: what has no end has been ended."""
    result = plan.result(trial.trial_id, trial.config, trial.last_result or {})
    if trial.status == "ERROR":
        error = trial.get_pickled_error()
        reason = str(error).strip().splitlines()[0] if error and str(error).strip() else "it died"
        return replace(result, outcome=FAILED, failure=result.failure or reason)
    if result.outcome == UNFINISHED and (over or trial.status == "TERMINATED"):
        return replace(result, outcome=STOPPED)
    return result


def _record(
    tracker: RunTracker,
    plan: Plan,
    results: Sequence[TrialResult],
    files: Sequence[Path],
    runs: TrialRuns,
) -> None:
    """The findings, on the search's own MLflow run."""
    for path in files:
        tracker.log_artifact(path, "plots" if path.parent.name == "plots" else None)
    counts = {
        f"trials/{o}": sum(r.outcome == o for r in results) for o in {r.outcome for r in results}
    }
    tracker.log_metrics({"trials": len(results), **counts}, 0)
    best = best_of(results, plan.criterion)
    if best is not None:
        tracker.log_metrics({"best": best.value, "best_ci95": best.ci95}, 0)
        tags = {"best_trial": best.trial_id, "best_run_id": runs.run_ids.get(best.trial_id, "")}
        tracker.set_tags({**tags, "answer": " ".join(in_words(plan, results))})
