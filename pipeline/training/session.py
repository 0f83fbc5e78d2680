"""A run that is open: its state, and the one place that writes its record.

`opening` opens and closes a session, `loop` decides what happens in it and when. The session writes
checkpoints, metrics, results and plots, and sends them to MLflow.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.cluster.group import WorkerGroup
from pipeline.config.experiment import Experiment
from pipeline.evaluation.meta_test import Curve, write_results
from pipeline.evaluation.run_report import summary, write_plots
from pipeline.maml.flat_vector import FlatVector, Params
from pipeline.runs.checkpoint import CheckpointStore, TrainingState, save_theta
from pipeline.runs.claims import Lease
from pipeline.runs.folder import History, RunFolderError
from pipeline.runs.tracker import CURVES, NullTracker, Tracker, recorded_title
from pipeline.training.outer_optimizer import OuterOptimizer
from pipeline.training.outer_step import outer_step_of
from pipeline.training.placement import Placement
from pipeline.training.saving import Saver
from pipeline.worker.jobs import Cut, tasks_per_chunk
from pipeline.worker.tree import ORDER

_PRETRAINING = "pretraining."  # prefix of the names of pretraining's tensors in a checkpoint
_RECORDS = "records"  # those of RUN_DIR/metrics.jsonl, as bytes, where checkpoints are elsewhere
_WINDOW = "window."  # and of the sums of metrics since the last record, float64 scalars


class Watcher:
    """Told what happens in a run. Does nothing; the command line and tests override it."""

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
        """A curve of the meta-test is complete."""

    def notice(self, message: str) -> None:
        """Something out of the ordinary happened; `message` is for a person."""


class Updates(NamedTuple):
    """What one iteration of a method is."""

    size: int
    """Tasks or examples of an update."""
    unit: str
    """What `size` counts: 'tasks' or 'examples'."""
    words: str
    """In words, for 'N WORDS'."""


class Method(Protocol):
    """What a run does to find θ; `loop.method_of` chooses it once, before the run opens.

    MetaLearning      meta-updates of tasks (`loop`)
    TransferLearning  one network learns all training tasks at once (`transfer_learning`)
    """

    def check(self, experiment: Experiment) -> None:
        """Raise ValueError before the start for what would otherwise fail at the end or on a
        worker."""
        ...

    def compiles(self, experiment: Experiment) -> bool:
        """Whether the functions of chunks are compiled; follows from the configuration alone."""
        ...

    def place(self, experiment: Experiment, compile: bool) -> Placement:
        """Decide how many actors compute chunks, which are compiled or not."""
        ...

    def start_workers(self, session: Session, placement: Placement) -> WorkerGroup:
        """Start who computes chunks, and tell the watcher where that may surprise."""
        ...

    def run(self, session: Session, should_stop: Callable[[], bool]) -> None:
        """Train from the session's iteration to the last one, then write θ.

        `should_stop` is asked now and then; True saves a checkpoint and raises Interrupted. Raises
        TrainingFailed.
        """
        ...

    def updates(self, experiment: Experiment) -> Updates:
        """What one iteration is."""
        ...

    def describe(self, session: Session) -> str:
        """How the run computes, in words."""
        ...

    def tags(self, experiment: Experiment) -> dict[str, str]:
        """Tags of the MLflow run that only this method has."""
        ...


class Session:
    """State of a run between two iterations, and the only writer of its results.

    Raises RunFolderError for a checkpoint that is not of this model.
    """

    def __init__(
        self,
        experiment: Experiment,
        run_dir: Path,
        method: Method,
        theta: Params,
        state: TrainingState | None,
        store: CheckpointStore,
        watcher: Watcher,
        *,
        compile: bool,
        token: str | None = None,
        lease: Lease | None = None,
    ):
        """`theta` is of a fresh model, `state` that of a checkpoint to continue from, or None;
        `lease` is that of `run_dir`, None where its caller sees to it that nobody else writes."""
        task = experiment.build_task()
        self.experiment, self.run_dir, self.watcher = experiment, run_dir, watcher
        self.method = method
        self.optimizer = OuterOptimizer(theta, experiment.outer)
        self.outer_step = outer_step_of(experiment)
        self.iteration = 0
        """Completed meta-updates."""
        self._moves = 0  # of θ, up to the last completed update
        self.pretraining: dict[str, Tensor] = {}
        """State of pretraining by name, from which θ is made at the end; empty in meta-training."""
        self.bad_updates = 0
        """Updates in a row that were refused because their gradient was not finite."""
        self.best: dict[str, Any] | None = None
        """The best validation so far: its iteration, value and metric."""
        self.metric, self._higher_is_better = task.primary_metric, task.higher_is_better
        per_chunk = tasks_per_chunk(experiment, self.optimizer.layout.size, compile)
        self.cut = Cut(experiment.outer.tasks_per_batch, per_chunk)
        self.compile = compile
        self.workers: WorkerGroup
        """Set by `opening`: how they start depends on the number of chunks."""
        self.worker_threads: int
        """Threads of a worker of Ray Train, set by `opening`; `experiment.compute` has those that
        compute chunks."""
        self.tracker: Tracker = NullTracker()
        self.validated_at = self.diagnosed_at = 0
        """The iterations of the last validation and diagnosis."""
        self._store = store
        self._window: dict[str, float] = {}
        self._window_length = 0
        self._seconds_tracking = 0.0
        self._warned: set[str] = set()
        self.history = History(run_dir)
        if state is not None:
            self._restore(state)
        saved_at = None if state is None else state.iteration
        self._saver = Saver(store, experiment.checkpoint, watcher.notice, saved_at, lease)
        # A view of the memory that updates change in place: always the current θ.
        self._theta = self.optimizer.flat.numpy()
        # Made here, because MLflow answers later: a run that is killed early is found again by it.
        known = state.extra.get("tracking_token") if state else None
        self.tracking_token = str(token or known or uuid.uuid4().hex)
        self.started_from = state.extra.get("ancestor") if state else None
        """`opening.name_of_state` of the other run's checkpoint that this run started from; or
        None."""

    @property
    def theta(self) -> FlatVector:
        """The current θ, flat [D], on the CPU."""
        return self._theta

    def due(self, every: int) -> bool:
        """Whether `every` divides the number of completed iterations, or they are all completed."""
        last = self.iteration == self.experiment.outer.iterations
        return self.iteration % every == 0 or last

    def record(self, metrics: dict[str, float], began: float) -> None:
        """Record the metrics of an iteration that began at `began` (time.perf_counter, seconds)."""
        started = time.perf_counter()
        metrics["tasks_per_second"] = self.experiment.outer.tasks_per_batch / (started - began)
        metrics["seconds/tracking"] = self._seconds_tracking
        window = self._window
        for name, value in metrics.items():
            window[name] = window.get(name, 0.0) + value
        self._window_length += 1
        if self.due(self.experiment.track_every):
            means = {name: total / self._window_length for name, total in window.items()}
            self._window, self._window_length = {}, 0
            self.log(means)
        self.watcher.iteration(self.iteration, metrics)
        self._seconds_tracking = time.perf_counter() - started

    def log(self, metrics: Mapping[str, float]) -> None:
        """Write metrics of the current iteration to metrics.jsonl and to MLflow."""
        self.history.append(self.iteration, metrics)
        self.tracker.log_metrics(dict(metrics), self.iteration)

    def record_validation(self, curve: Curve, value: float) -> None:
        """Record a validation; the checkpoint with the best `value` so far is kept as the best."""
        before = None if self.best is None else self.best["value"]
        better = bool(np.isfinite(value)) and (
            before is None or (value > before if self._higher_is_better else value < before)
        )
        self.log(curve.by_step("validation/"))
        self.validated_at = self.iteration
        if better:
            self.best = {"iteration": self.iteration, "value": value, "metric": self.metric}
            self._saver.save(self._state(), best=True)
        self.watcher.validated(self.iteration, curve, better)

    def record_diagnosis(self, metrics: dict[str, float], warnings: Mapping[str, str]) -> None:
        """Record a diagnosis; pass on its warnings, each kind once in a run."""
        self.log(metrics)
        self.diagnosed_at = self.iteration
        for kind, message in warnings.items():
            if kind not in self._warned:
                self._warned.add(kind)
                self.watcher.notice(f"iteration {self.iteration:,}: {message}")

    @property
    def checkpoint_due(self) -> bool:
        """Whether it is time for a checkpoint: by the number of iterations, or by the clock."""
        return self.due(self.experiment.checkpoint_every) or self._saver.overdue()

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the current state, unless there is one already.

        A write that fails does not end the run, see `Saver.save`, which says what this raises.
        """
        if self._saver.saved_at != self.iteration:
            self._saver.save(self._state(), best=False)

    def save_at_end(self) -> str:
        """Write the last state of a run that is over, however it ended; what went wrong, or ''.

        Nothing is written for a run that has no checkpoint, as it has not begun, nor in the middle
        of an update: what there is of it is no state from which a run can go on.
        """
        saved_at = self._saver.saved_at
        whole = self.optimizer.moves == self._moves
        if saved_at in (None, self.iteration) or not whole:
            return ""
        return self._saver.save_at_end(self._state())

    def update_done(self) -> None:
        """Count an update of θ that is complete."""
        self.iteration += 1
        self._moves = self.optimizer.moves

    def _state(self) -> TrainingState:
        """What a checkpoint holds: copies."""
        window = {n: torch.tensor(v, dtype=torch.float64) for n, v in self._window.items()}
        return TrainingState(
            iteration=self.iteration,
            tensors={
                **self.optimizer.tensors(),
                **{f"{_PRETRAINING}{name}": v for name, v in self.pretraining.items()},
                **{f"{_WINDOW}{name}": v for name, v in window.items()},
                **self._records(),
            },
            scheduler=self.optimizer.scheduler_state(),
            best=self.best,
            bad_updates=self.bad_updates,
            config=self.experiment.model_dump(mode="json"),
            mlflow_run_id=self.tracker.run_id,
            extra={
                "compile": self.compile,
                "threads": self.experiment.compute.threads,
                "tracking_token": self.tracking_token,
                "ancestor": self.started_from,
                "order_of_sums": ORDER,
                "validated_at": self.validated_at,
                "diagnosed_at": self.diagnosed_at,
                "window_length": self._window_length,
            },
        )

    def _records(self) -> dict[str, Tensor]:
        """What a checkpoint that may outlive the run's folder holds of its records."""
        content = self.history.content() if self.experiment.checkpoint.uri else b""
        if not content:
            return {}
        return {_RECORDS: torch.frombuffer(bytearray(content), dtype=torch.uint8)}

    def rebuild_history(self, state: TrainingState) -> None:
        """Take the checkpoint's records where metrics.jsonl is missing; drop those of later
        iterations."""
        if _RECORDS in state.tensors:
            self.history.rebuild(state.tensors[_RECORDS].numpy().tobytes())
        self.history.forget_after(state.iteration)

    def save_theta(self) -> None:
        """Write the current θ as the run's result, theta.safetensors."""
        save_theta(self.run_dir / "theta.safetensors", self.optimizer.theta)
        self.tracker.log_artifact(self.run_dir / "theta.safetensors")

    def record_test(self, curves: Sequence[Curve]) -> None:
        """Write the meta-test and all plots, and log them."""
        write_results(self.run_dir, curves)
        for curve in curves:
            values = curve.by_step(f"test/{recorded_title(curve.title)}/")
            self.tracker.log_metrics(values, self.iteration)
        self.tracker.log_artifact(self.run_dir / "results.json")
        titles = json.dumps([curve.title for curve in curves])
        self.tracker.set_tags({CURVES: titles, "mlflow.note.content": self.summary(curves)})
        self.record_plots(curves)

    def summary(self, curves: Sequence[Curve] = ()) -> str:
        """The run in Markdown, with its meta-test if there was one."""
        updates = self.method.updates(self.experiment).words
        return summary(self.experiment, self.optimizer.layout.size, updates, curves)

    def record_plots(self, curves: Sequence[Curve] = ()) -> None:
        """Draw and log the run's plots; `curves` is its meta-test, if there was one."""
        for plot in write_plots(self.experiment, self.run_dir, self.optimizer.theta, curves):
            self.tracker.log_artifact(plot, "plots")

    def _restore(self, state: TrainingState) -> None:
        """Continue from the state of a checkpoint."""
        if state.extra.get("order_of_sums") != ORDER:
            raise RunFolderError(
                f"{self._store.folder}: this run added its gradients in another order, which the "
                "present version no longer does: continued, it would not be the run that it was; "
                "start a new one, or continue with the version that it began with"
            )
        own, wide = {}, {}
        for name, value in state.tensors.items():
            if name.startswith(_PRETRAINING):
                wide[name.removeprefix(_PRETRAINING)] = value
            elif name.startswith(_WINDOW):
                self._window[name.removeprefix(_WINDOW)] = float(value)
            elif name != _RECORDS:
                own[name] = value
        self.pretraining = wide
        try:
            self.optimizer.restore(own, state.scheduler)
        except (ValueError, KeyError, RuntimeError) as error:
            raise RunFolderError(f"{self._store.folder}: {error}") from error
        self.iteration, self.bad_updates, self.best = state.iteration, state.bad_updates, state.best
        # Checkpoints of earlier versions were written after all of it.
        self.validated_at = state.extra.get("validated_at", state.iteration)
        self.diagnosed_at = state.extra.get("diagnosed_at", state.iteration)
        self._window_length = state.extra.get("window_length", 0)


def without_records(state: TrainingState) -> TrainingState:
    """The state without records, and without the metrics that wait for theirs."""
    records = (_WINDOW, _RECORDS)
    tensors = {n: value for n, value in state.tensors.items() if not n.startswith(records)}
    return replace(state, tensors=tensors, extra={**state.extra, "window_length": 0})
