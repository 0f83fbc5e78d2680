"""A run that is open: its workers, its state, its folder, its MLflow record.

`training` decides what happens when; this file knows where everything goes.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from pipeline.algorithms import name_of
from pipeline.checkpoint import CheckpointStore, TrainingState, save_theta
from pipeline.chunk_jobs import Cut, tasks_per_chunk
from pipeline.config import Experiment
from pipeline.evaluation import Curve, check_tasks, write_results
from pipeline.files import write_atomically
from pipeline.learner import compute_device, initial_parameters
from pipeline.outer_update import OuterUpdate
from pipeline.parameters import FlatVector, Params
from pipeline.placement import Placement, decide_compile, decide_workers
from pipeline.ray_cluster import cluster_address
from pipeline.ray_workers import RayWorkers
from pipeline.report import summary, write_plots
from pipeline.run_folder import (
    History,
    RunFolderError,
    check_writable,
    refuse_to_overwrite,
    state_to_resume,
)
from pipeline.tracking import NullTracker, RunTracker, Tracker, environment_tags, resolve_uri
from pipeline.workers import InProcess, WorkerGroup, on_driver, threads_per_chunk
from tasks.data_root import absolute_root

_PRETRAINING = "pretraining."  # names of tensors in a checkpoint


class TrainingFailed(Exception):
    """The run cannot go on; `str()` says why and what to do. A checkpoint holds what it has."""


class Diverged(TrainingFailed):
    """Numbers that are not finite ended the run; continued, it would end in the same way."""


class Interrupted(Exception):
    """The run was asked to stop, and has: its state is in a checkpoint."""


Interruption = (Interrupted, KeyboardInterrupt)


class Watcher:
    """What a person may want to see of a run; the command line overrides it, tests too."""

    def starting(self, experiment: Experiment, run_dir: Path) -> None:
        """The preparation begins: workers start, programs are compiled."""

    def started(self, session: Session) -> None:
        """Everything is ready; training begins or goes on."""

    def iteration(self, iteration: int, metrics: dict[str, float]) -> None:
        """An update was done."""

    def validated(self, iteration: int, curve: Curve, best: bool) -> None:
        """Validation tasks were evaluated."""

    def testing(self, experiment: Experiment) -> None:
        """The meta-test begins."""

    def tested(self, curve: Curve) -> None:
        """One curve of the meta-test."""

    def notice(self, message: str) -> None:
        """Something out of the ordinary, in words."""


class Session:
    """State of a run between two iterations, and the only writer of its results."""

    def __init__(
        self,
        experiment: Experiment,
        run_dir: Path,
        theta: Params,
        state: TrainingState | None,
        store: CheckpointStore,
        watcher: Watcher,
        token: str | None = None,
    ):
        task = experiment.build_task()
        self.experiment, self.run_dir, self.watcher = experiment, run_dir, watcher
        self.update = OuterUpdate(theta, experiment.outer)
        self.iteration = 0
        """Completed meta-updates."""
        self.pretraining: dict[str, Tensor] = {}
        """State of pretraining, for checkpoints; θ is made of it at the end."""
        self.bad_updates = 0
        self.best: dict[str, Any] | None = None
        self.metric, self._higher_is_better = task.primary_metric, task.higher_is_better
        self.tasks_per_chunk = tasks_per_chunk(experiment, self.update.layout.size)
        self.num_chunks = Cut(experiment.outer.tasks_per_batch, self.tasks_per_chunk).num_chunks
        self.workers: WorkerGroup
        self.tracker: RunTracker = NullTracker()
        self._store = store
        self._improved = False
        self._saved_at = -1
        self._window: dict[str, float] = {}
        self._window_length = 0
        self._seconds_tracking = 0.0
        self._warned: set[str] = set()
        self.history = History(run_dir)
        if state is not None:
            self._restore(state)
        # θ as the workers take it: the same memory, so that it is always the current one.
        self._theta = self.update.flat.numpy()
        self.compile = bool(state.extra["compile"]) if state else decide_compile(experiment)
        # Known before MLflow has answered: a run that is killed early is found again by it.
        known = state.extra.get("tracking_token") if state else None
        self.tracking_token = str(token or known or uuid.uuid4().hex)
        self.ancestor = state.extra.get("ancestor") if state else None
        """Whose state the run began with, `origin` of that state; None: its own."""

    @property
    def theta(self) -> FlatVector:
        """θ, flat [D]."""
        return self._theta

    def due(self, every: int) -> bool:
        """Whether something that happens every so many iterations happens now; the last counts."""
        last = self.iteration == self.experiment.outer.iterations
        return self.iteration % every == 0 or last

    def record(self, metrics: dict[str, float], began: float) -> None:
        """Take in the metrics of an iteration that began at `began` (time.perf_counter)."""
        started = time.perf_counter()
        metrics["tasks_per_second"] = self.experiment.outer.tasks_per_batch / (started - began)
        metrics["seconds/tracking"] = self._seconds_tracking
        window = self._window
        for name, value in metrics.items():
            window[name] = window.get(name, 0.0) + value
        self._window_length += 1
        # A record never spans a checkpoint: a resumed run then has the same ones.
        if self.due(self.experiment.track_every) or self.due(self.experiment.checkpoint_every):
            means = {name: total / self._window_length for name, total in window.items()}
            self._window, self._window_length = {}, 0
            self.log(means)
        self.watcher.iteration(self.iteration, metrics)
        self._seconds_tracking = time.perf_counter() - started

    def record_validation(self, curve: Curve, value: float) -> None:
        """Take in a validation; `value` is what checkpoints are chosen by."""
        before = None if self.best is None else self.best["value"]
        better = bool(np.isfinite(value)) and (
            before is None or (value > before if self._higher_is_better else value < before)
        )
        self.log(curve.by_step("validation/"))
        if better:
            self.best = {"iteration": self.iteration, "value": value, "metric": self.metric}
            self._improved = True
            self.save_checkpoint()
        self.watcher.validated(self.iteration, curve, better)

    def record_diagnosis(self, metrics: dict[str, float], warnings: Mapping[str, str]) -> None:
        """Take in a diagnosis; a warning of a kind is given once."""
        self.log(metrics)
        for kind, message in warnings.items():
            if kind not in self._warned:
                self._warned.add(kind)
                self.watcher.notice(f"iteration {self.iteration:,}: {message}")

    def save_checkpoint(self) -> None:
        """Write the state of this moment, unless it is written already."""
        if self._saved_at == self.iteration and not self._improved:
            return
        self._store.save(
            TrainingState(
                iteration=self.iteration,
                tensors={
                    **self.update.tensors(),
                    **{f"{_PRETRAINING}{name}": v for name, v in self.pretraining.items()},
                },
                scheduler=self.update.scheduler_state(),
                best=self.best,
                bad_updates=self.bad_updates,
                config=self.experiment.model_dump(mode="json"),
                mlflow_run_id=self.tracker.run_id,
                extra={
                    "compile": self.compile,
                    "threads": self.experiment.compute.threads,
                    "tracking_token": self.tracking_token,
                    "ancestor": self.ancestor,
                },
            ),
            best=self._improved,
        )
        # A flag that stayed set would make every later checkpoint the best one.
        self._improved, self._saved_at = False, self.iteration

    def save_theta(self) -> None:
        """Write the final parameters."""
        save_theta(self.run_dir / "theta.safetensors", self.update.theta)
        self.tracker.log_artifact(self.run_dir / "theta.safetensors")

    def record_test(self, curves: Sequence[Curve]) -> None:
        """Write and log the meta-test, and the plots with it."""
        write_results(self.run_dir, curves)
        for curve in curves:
            prefix = f"test/{curve.title}/".replace("=", "-").replace(",", "")
            self.tracker.log_metrics(curve.by_step(prefix), self.iteration)
        self.tracker.log_artifact(self.run_dir / "results.json")
        note = summary(self.experiment, self.update.layout.size, curves)
        self.tracker.set_tags({"mlflow.note.content": note})
        self.record_plots(curves)

    def record_plots(self, curves: Sequence[Curve] = ()) -> None:
        """Draw and log what there is to see."""
        for plot in write_plots(self.experiment, self.run_dir, self.update.theta, curves):
            self.tracker.log_artifact(plot, "plots")

    def _restore(self, state: TrainingState) -> None:
        own, wide = {}, {}
        for name, value in state.tensors.items():
            if name.startswith(_PRETRAINING):
                wide[name.removeprefix(_PRETRAINING)] = value
            else:
                own[name] = value
        self.pretraining = wide
        try:
            self.update.restore(own, state.scheduler)
        except (ValueError, KeyError, RuntimeError) as error:
            raise RunFolderError(f"{self._store.folder}: {error}") from error
        self.iteration, self.bad_updates, self.best = state.iteration, state.bad_updates, state.best
        self._saved_at = state.iteration
        self.history.forget_after(state.iteration)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Record metrics of this moment, in metrics.jsonl and in MLflow."""
        self.history.append(self.iteration, metrics)
        self.tracker.log_metrics(dict(metrics), self.iteration)


def inherited(state: TrainingState) -> TrainingState:
    """What a run takes over from another one: θ, its optimiser, the iteration, and how chunks are
    computed - but neither the other's MLflow run nor what was best in it."""
    extra = {**state.extra, "tracking_token": None, "ancestor": origin(state)}
    return replace(state, best=None, bad_updates=0, mlflow_run_id=None, extra=extra)


def origin(state: TrainingState) -> str:
    """Which run a state is of, and when it was taken."""
    return f"{state.extra['tracking_token']}@{state.iteration}"


@contextlib.contextmanager
def open_session(
    experiment: Experiment,
    run_dir: Path,
    resume: bool,
    watcher: Watcher,
    *,
    token: str | None = None,
    heir_of: TrainingState | None = None,
) -> Iterator[Session]:
    """Open a new run in `run_dir`, or continue the one that is there; close it whatever happens.

    `token` is a name by which the run is found again in MLflow; by default it has one of its own.
    `heir_of` is another run's state to begin with, whatever is in the folder.

    Raises RunFolderError, CheckpointError, TrackingError, ValueError for what is wrong with the
    folder, the checkpoints, the tracking address, the model or the data.
    """
    store = CheckpointStore.of_run(experiment, run_dir)
    if heir_of is not None:
        state: TrainingState | None = inherited(heir_of)
    elif resume:
        state = state_to_resume(store)
    else:
        refuse_to_overwrite(run_dir, store)
        state = None
    experiment = with_absolute_data(experiment.changed(search=None))
    check_tasks(experiment)
    theta = initial_parameters(experiment)  # a model that does not fit leaves no folder behind
    if cluster_address(experiment) is None:
        compute_device(experiment)  # nor does a GPU that is not here
    if experiment.tracking.enabled:
        resolve_uri(experiment.tracking.uri, run_dir)
    check_writable(run_dir)
    store.check_writable()
    watcher.starting(experiment, run_dir)
    placement = decide_workers(experiment)
    write_atomically(run_dir / "config.yaml", experiment.to_yaml())
    # Their number changes the last bits: a resumed run keeps that of its beginning.
    threads = state.extra["threads"] if state else threads_per_chunk(experiment, placement.workers)
    experiment = experiment.changed(compute={"threads": threads})
    session = Session(experiment, run_dir, theta, state, store, watcher, token)
    session.workers = _start_workers(session, placement)
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        session.tracker = _start_tracking(session, state, placement)
        watcher.started(session)
        yield session
        status = "FINISHED"
    except Interruption:
        status = "KILLED"
        raise
    finally:
        try:
            session.workers.close()
        finally:
            unsent = session.tracker.close(status)
            if unsent is not None:
                watcher.notice(
                    f"MLflow could not be reached; what it missed is in {unsent} "
                    f"(maml resend {unsent})"
                )


def with_absolute_data(experiment: Experiment) -> Experiment:
    """Paths mean what they mean here, where the person is who wrote them, and on every worker."""
    return experiment.changed(data={"root": absolute_root(experiment.data.root)})


def _start_workers(session: Session, placement: Placement) -> WorkerGroup:
    experiment, watcher = session.experiment, session.watcher
    if experiment.cluster.workers == "auto" and experiment.pretraining is None:
        number = f"{placement.workers} actors" if placement.workers else "in process"
        watcher.notice(f"workers: {number} ({placement.reason})")
    if placement.workers == 0:
        if experiment.pretraining is None:
            return InProcess(experiment, session.compile)
        return InProcess(on_driver(experiment), compile=False, warm_up=False)
    if placement.workers > session.num_chunks:
        watcher.notice(
            f"{placement.workers} workers share {session.num_chunks} chunks per meta-batch: some "
            "will be idle; a smaller outer.tasks_per_chunk makes more chunks"
        )
    return RayWorkers(experiment, session.compile, placement.workers, watcher.notice)


def _start_tracking(
    session: Session, state: TrainingState | None, placement: Placement
) -> RunTracker:
    experiment = session.experiment
    if not experiment.tracking.enabled:
        return NullTracker()
    tracker = Tracker.open(
        uri=experiment.tracking.uri,
        experiment=experiment.tracking.experiment,
        run_name=session.run_dir.name,
        run_dir=session.run_dir,
        params={"num_parameters": session.update.layout.size, **experiment.flat()},
        tags={
            **environment_tags(),
            "algorithm": name_of(experiment),
            **({} if experiment.pretraining else {"order": experiment.inner.order}),
            "workers": str(placement.workers),
            "compiled": str(session.compile),
            "run_dir": str(session.run_dir),
            # Where MLflow's pages look for a description, and for what a run was made from.
            "mlflow.note.content": summary(experiment, session.update.layout.size),
            "mlflow.source.name": experiment.name,
            "mlflow.source.type": "LOCAL",
            **experiment.tracking.tags,
        },
        run_id=state.mlflow_run_id if state else None,
        token=session.tracking_token,
    )
    tracker.log_artifact(session.run_dir / "config.yaml")
    return tracker
