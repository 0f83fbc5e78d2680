"""One trial of a search: an ordinary run that reports its validations to Ray Tune.

    Tune's actor ── run_trial ──▶ open_session, meta_train, as `maml train` ──▶ SEARCH/trials/ID
                      ▲                 │ every validation: record sent, checkpoint written
                      └ go on, or stop ◀┘ tune.report(value, iteration, checkpoint)

A trial that is resumed continues from its own folder. With population based training, Tune hands it
the checkpoint of a better trial instead; `opening.first_state_from` says what it takes over.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.cluster.capacity import worker_bundle
from pipeline.cluster.group import threads_per_chunk
from pipeline.config.experiment import Experiment
from pipeline.config.loading import with_settings
from pipeline.config.search import Search
from pipeline.evaluation.meta_test import Curve
from pipeline.runs.checkpoint import CheckpointError, CheckpointStore, TrainingState
from pipeline.runs.mlflow_store import STORE
from pipeline.search.space import in_flight, search_of, settings_of
from pipeline.training.endings import Interrupted
from pipeline.training.loop import MetaLearning, meta_train
from pipeline.training.opening import name_of_state, open_session
from pipeline.training.session import Session, Watcher
from pipeline.training.validation import validate
from tasks.credentials import redacted

WORST = 1e30
"""Replaces a value that is not finite, which schedulers and samplers could not sort."""
_DELIVERY = 20.0  # seconds that a validation waits until MLflow has its record


@dataclass(frozen=True)
class Ranking:
    """How trials are ranked: by a metric of their last validation."""

    metric: str
    step: int | None
    """Adaptation steps; None: the experiment's `selection_step`."""
    mode: Literal["min", "max"]

    @property
    def name(self) -> str:
        """The metric as `search.metric` names it: METRIC, or METRIC_stepK."""
        return self.metric if self.step is None else f"{self.metric}_step{self.step}"

    def step_of(self, experiment: Experiment) -> int:
        """The adaptation steps after which an experiment is validated."""
        return experiment.selection_step if self.step is None else self.step

    def of(self, curve: Curve, experiment: Experiment) -> tuple[float, float]:
        """The value of a validation and half the width of its confidence interval."""
        position = curve.steps.index(self.step_of(experiment))
        return curve.mean[self.metric][position], curve.ci95[self.metric][position]


@dataclass(frozen=True)
class TrialResult:
    """The outcome of a trial, from its last report."""

    trial_id: str
    settings: dict[str, Any]
    """The searched ones, by path."""
    outcome: str
    """One of COMPLETE, STOPPED, FAILED, UNFINISHED."""
    iteration: int
    value: float
    """The last validation, by the metric of the search's ranking; NaN: there is none."""
    ci95: float
    """Half the width of the confidence interval of `value`."""
    step: int | None
    """Adaptation steps after which it was validated."""
    seconds: float
    """Spent on meta-updates; starting, compiling and validating are left out."""
    tasks_per_second: float
    failure: str = ""
    """Why it failed, for a person."""


COMPLETE, STOPPED, FAILED, UNFINISHED = "complete", "stopped early", "failed", "unfinished"


@dataclass(frozen=True)
class Plan:
    """What every trial of a search needs to know; sent to the process of each trial."""

    experiment: Experiment
    """Has its search section; its paths are absolute."""
    folder: Path
    token: str
    """Names the search in MLflow."""
    ranking: Ranking
    import_paths: tuple[str, ...]
    """Folders from which the driver imports a user's modules."""
    parent_run_id: str | None = None
    """The search's MLflow run; None: tracking is off."""
    tracking_uri: str | None = None
    """Where that run is: the default of a trial's own folder would be another store."""

    @property
    def search(self) -> Search:
        """The experiment's search section."""
        return search_of(self.experiment)

    def result(
        self, trial_id: str, draw: Mapping[str, Any], last: Mapping[str, Any]
    ) -> TrialResult:
        """A trial's result from its last report; UNFINISHED unless it failed or is complete."""
        settings = settings_of(self.search, draw)
        iteration, failure = int(last.get("iteration", 0)), str(last.get("failure", ""))
        iterations = int(settings.get("outer.iterations", self.experiment.outer.iterations))
        complete = COMPLETE if iteration >= iterations else UNFINISHED
        return TrialResult(
            trial_id,
            settings,
            outcome=FAILED if failure else complete,
            iteration=iteration,
            value=math.nan if failure else float(last.get("value", math.nan)),
            ci95=math.nan if failure else float(last.get("ci95", math.nan)),
            step=last.get("step"),
            seconds=float(last.get("seconds", math.nan)),
            tasks_per_second=float(last.get("tasks_per_second", math.nan)),
            failure=failure,
        )

    def trial_dir(self, trial_id: str) -> Path:
        """The run folder of a trial."""
        return self.folder / "trials" / trial_id

    def trial_token(self, trial_id: str) -> str:
        """The tag by which any process finds the trial's MLflow run."""
        return f"{self.token}-{trial_id}"


def sized_as_trial(experiment: Experiment) -> Experiment:
    """The experiment with the workers and threads that it has as a trial, and without its search.

    Trials run in parallel, so `auto` workers means none: a trial computes in its own process, with
    the threads of one worker.
    """
    cluster = experiment.cluster
    workers = 0 if cluster.workers == "auto" else cluster.workers
    return experiment.without_gpu().changed(
        search=None,
        compute={"threads": threads_per_chunk(experiment, 1)},
        checkpoint={"uri": None},  # one folder cannot hold the checkpoints of several runs
        cluster={"workers": workers},
    )


def bundles(experiment: Experiment) -> list[dict[str, float]]:
    """The resources of a trial, as Ray counts them: one bundle for itself, one per worker actor."""
    cluster = experiment.cluster
    worker = worker_bundle(experiment)
    if cluster.workers in (0, "auto"):
        return [{**worker, "CPU": cluster.cpus_per_worker or 1.0}]
    # The trial itself only waits for its workers. Ray refuses a group of empty bundles.
    return [{} if worker else {"CPU": 0.01}, *([worker] * int(cluster.workers))]


def trial_experiment(plan: Plan, trial_id: str, settings: Mapping[str, Any]) -> Experiment:
    """The experiment that a trial runs. Raises ConfigError."""
    base = plan.experiment.changed(search=None)
    experiment = sized_as_trial(with_settings(base, settings))
    tags = {**experiment.tracking.tags, "search": plan.folder.name, "search.trial": trial_id}
    if plan.parent_run_id is not None:
        tags["mlflow.parentRunId"] = plan.parent_run_id
    uri = redacted(plan.tracking_uri or "") or experiment.tracking.uri
    return experiment.changed(tracking={"tags": tags, "uri": uri})


def run_trial(plan: Plan, draw: Mapping[str, Any]) -> None:
    """The function that Ray Tune runs in an actor, for one trial after another."""
    from ray import tune

    sys.path += [path for path in plan.import_paths if path not in sys.path]
    # Time for a stopped trial to end its MLflow run, before the actor starts the next trial.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "60"
    trial_id = tune.get_context().get_trial_id()
    folder = plan.trial_dir(trial_id)
    watcher = Reporter(plan, folder)
    if plan.tracking_uri is not None:  # with the credentials that the trial does not record
        os.environ[STORE] = plan.tracking_uri
    try:
        experiment = trial_experiment(plan, trial_id, settings_of(plan.search, draw))
        own, other = _states(experiment, folder, plan.trial_token(trial_id), tune.get_checkpoint())
        with open_session(
            experiment,
            folder,
            MetaLearning(),
            resume=own is not None,
            watcher=watcher,
            token=plan.trial_token(trial_id),
            start_from=other,
        ) as session:
            if session.iteration == experiment.outer.iterations:
                validate(session)  # it ended after its last update and before its last report
            meta_train(session)
            session.record_plots()
        watcher.report()
    except Interrupted:
        raise SystemExit(0) from None  # what Tune does to a thread that it wants to end
    except Exception as error:
        # Not raised: it would happen again, and a new actor takes seconds to start. What Tune
        # starts again are trials whose process died.
        said = redacted(f"{type(error).__name__}: {error}")
        watcher.failed(said.removeprefix("TrainingFailed: "))


def _states(
    experiment: Experiment, folder: Path, token: str, given: Any
) -> tuple[TrainingState | None, TrainingState | None]:
    """The trial's own newest state, and the state of another run with which it is to begin.

    `given` is the checkpoint that Tune hands out. It may be older than the one in the folder. It
    may also come from another trial; then it is used once, and not again after a restart.
    """
    store = CheckpointStore.of_run(experiment, folder)
    try:
        own = store.latest()
    except CheckpointError:
        own = None  # every checkpoint is damaged; Tune may have a copy
    if given is None:
        return own, None
    with given.as_directory() as path:
        state = CheckpointStore(path, keep=1).latest()
    if state is None:
        return own, None
    if state.extra["tracking_token"] == token:
        return (own, None) if own and own.iteration >= state.iteration else (None, state)
    settings = experiment.model_dump(mode="json")
    taken = own is not None and own.extra.get("ancestor") == name_of_state(state)
    same = own is not None and all(own.config[s] == settings[s] for s in ("inner", "outer"))
    return (own, None) if taken and same else (own, state)


class Reporter(Watcher):
    """Reports validations to Ray Tune, and keeps notices in the trial's folder."""

    _session: Session
    """Set by `started`, which comes before `iteration` and `validated`."""

    def __init__(self, plan: Plan, folder: Path):
        self._plan, self._folder = plan, folder
        self._started = False
        self._seconds = 0.0
        self._updates = 0
        self._pending: dict[str, Any] | None = None

    def started(self, session: Session) -> None:
        self._session, self._started = session, True

    def iteration(self, iteration: int, metrics: dict[str, float]) -> None:
        per_batch = self._session.experiment.outer.tasks_per_batch
        self._seconds += per_batch / metrics["tasks_per_second"]
        self._updates += 1

    def notice(self, message: str) -> None:
        with (self._folder / "notices.log").open("a") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {message}\n")

    def validated(self, iteration: int, curve: Curve, best: bool) -> None:
        """Prepare the report of a validation, and send it unless it is the last one."""
        session, search = self._session, self._plan.search
        experiment = session.experiment
        if search.scheduler == "pbt":
            flat = experiment.flat()
            rates = {p: flat[p] for p in in_flight(search) if isinstance(flat[p], int | float)}
            session.tracker.log_metrics(rates, iteration)
        value, ci95 = self._plan.ranking.of(curve, experiment)
        # From this process's updates: the duration of those before a restart is not known.
        per_update = self._seconds / max(1, self._updates)
        self._pending = {
            "value": value if math.isfinite(value) else self._worst(),
            "ci95": ci95,
            "step": self._plan.ranking.step_of(experiment),
            **_times(iteration, experiment.validate_every),
            "seconds": iteration * per_update,
            "tasks_per_second": experiment.outer.tasks_per_batch / per_update
            if per_update
            else math.nan,
            "failure": "" if math.isfinite(value) else "the validation is not finite",
        }
        if iteration < experiment.outer.iterations:
            # `run_trial` sends the last one, when all is written: Tune may end a trial at a report.
            session.save_checkpoint()
            session.tracker.flush(_DELIVERY)
            self.report()

    def report(self) -> None:
        """Send the prepared report to Tune, if any. Raises Interrupted to end the trial."""
        if self._pending is None:
            return
        from ray import tune

        checkpoint = tune.Checkpoint.from_directory(str(self._folder / "checkpoints"))
        metrics, self._pending = self._pending, None
        try:
            tune.report(metrics, checkpoint=checkpoint)
        except SystemExit:
            raise Interrupted("ended by the search") from None

    def failed(self, message: str) -> None:
        """Tell Tune that the trial is over without a result."""
        from ray import tune

        iteration, every = 0, 1  # it may have failed before it started
        if self._started:
            iteration, every = self._session.iteration, self._session.experiment.validate_every
        tune.report(
            {
                "value": self._worst(),
                "ci95": math.nan,
                **_times(iteration, every),
                "seconds": self._seconds,
                "tasks_per_second": 0.0,
                "failure": message,
            }
        )

    def _worst(self) -> float:
        """A value that ranks behind all others."""
        return WORST if self._plan.ranking.mode == "min" else -WORST


def _times(iteration: int, every: int) -> dict[str, int]:
    """How far a trial is, in the two units that schedulers count; `every`: iterations between
    validations."""
    return {"iteration": iteration, "validations": -(-iteration // every)}


def ranking_of(search: Search, experiment: Experiment, metrics: Sequence[str]) -> Ranking:
    """How the search ranks trials; `metrics` are those that a validation reports.

    Raises ValueError naming the setting for a metric that is not among them.
    """
    task = experiment.build_task()
    wanted = search.metric or task.primary_metric
    name, found, text = wanted.partition("_step")
    if wanted in metrics:
        name, found = wanted, ""
    if name not in metrics or (found and not text.isdigit()):
        raise ValueError(
            f"search.metric: {wanted!r} is none that a validation of {experiment.task.kind} tasks "
            f"has ({', '.join(metrics)}, or one of them after K adaptation steps as "
            f"{metrics[0]}_step1)"
        )
    mode: Literal["min", "max"]
    if name == "loss":
        mode = "min"
    elif name == task.primary_metric:
        mode = "max" if task.higher_is_better else "min"
    elif name == "accuracy":
        mode = "max"
    elif search.mode is None:
        raise ValueError(f"search.mode: say whether {name} is to be small (min) or large (max)")
    else:
        mode = search.mode
    return Ranking(name, int(text) if found else None, search.mode or mode)
