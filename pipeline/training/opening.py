"""Opens a run: folder, state, workers and record, in the order in which they may refuse."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pipeline.cluster.connection import cluster_address
from pipeline.cluster.group import InProcess, WorkerGroup, on_driver, threads_per_chunk
from pipeline.cluster.ray_group import RayWorkers
from pipeline.config.algorithms import name_of
from pipeline.config.experiment import Experiment
from pipeline.evaluation.meta_test import check_tasks
from pipeline.evaluation.run_report import summary
from pipeline.runs.checkpoint import CheckpointStore, TrainingState
from pipeline.runs.files import write_atomically
from pipeline.runs.folder import check_writable, refuse_to_overwrite, state_to_resume
from pipeline.runs.tracker import NullTracker, RunTracker, Tracker, environment_tags, resolve_uri
from pipeline.training.endings import Interruption
from pipeline.training.placement import Placement, decide_workers
from pipeline.training.session import Session, Watcher
from pipeline.worker.learner import compute_device, initial_parameters
from tasks.data_root import absolute_root


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
