"""Opens a run: checks, folder, workers, MLflow record; and closes it, however it ends.

Checks come first, so that a run that cannot start leaves nothing behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pipeline.cluster.connection import cluster_address
from pipeline.cluster.dispatch import RayWorkers
from pipeline.cluster.group import InProcess, WorkerGroup, on_driver, threads_per_chunk
from pipeline.config.experiment import Experiment
from pipeline.evaluation.meta_test import check_tasks
from pipeline.evaluation.run_report import summary
from pipeline.maml.flat_vector import Params
from pipeline.runs.checkpoint import CheckpointStore, TrainingState
from pipeline.runs.files import write_atomically
from pipeline.runs.folder import check_writable, refuse_to_overwrite, state_to_resume
from pipeline.runs.tracker import (
    SELECTED_BY,
    MlflowTracker,
    NullTracker,
    Tracker,
    environment_tags,
    resolve_uri,
)
from pipeline.training.endings import Interruption
from pipeline.training.placement import Placement, decide_compile, decide_workers
from pipeline.training.session import Session, Watcher
from pipeline.worker.learner import compute_device, initial_parameters
from tasks.data_root import absolute_root


def inherited(state: TrainingState) -> TrainingState:
    """The state with which a run begins where another one stood.

    It takes over θ, its optimiser, the iteration, and how chunks are computed; it leaves behind the
    other's MLflow run and its best checkpoint.
    """
    extra = {**state.extra, "tracking_token": None, "ancestor": origin(state)}
    return replace(state, best=None, bad_updates=0, mlflow_run_id=None, extra=extra)


def origin(state: TrainingState) -> str:
    """Names the run and the iteration that a state was taken from: "TOKEN@ITERATION"."""
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
    """Open a new run in `run_dir`, or continue (`resume`) the one there; close it at the end.

    `token` names the run in MLflow, so that it is found again; by default it is a new one.
    `heir_of` is the state of another run to begin with, whatever is in the folder.

    Raises RunFolderError, CheckpointError, TrackingError, and ValueError for what is wrong with the
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
    theta = _first_theta(experiment, run_dir, store)
    watcher.starting(experiment, run_dir)
    placement = decide_workers(experiment)
    write_atomically(run_dir / "config.yaml", experiment.to_yaml())
    # Of Ray Train: decided before the next lines write this process's number into the settings.
    worker_threads = threads_per_chunk(experiment, 1)
    # Both change the last bits of results: a resumed run keeps those of its beginning.
    threads = state.extra["threads"] if state else threads_per_chunk(experiment, placement.workers)
    experiment = experiment.changed(compute={"threads": threads})
    compile = bool(state.extra["compile"]) if state else decide_compile(experiment)
    session = Session(
        experiment, run_dir, theta, state, store, watcher, compile=compile, token=token
    )
    session.worker_threads = worker_threads
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


def _first_theta(experiment: Experiment, run_dir: Path, store: CheckpointStore) -> Params:
    """Check what can be known to be wrong before the start; return θ of a fresh model.

    A model that does not fit the tasks, a missing GPU and a bad tracking address are found before
    `check_writable` makes the run's folder. Raises what `open_session` raises.
    """
    check_tasks(experiment)
    theta = initial_parameters(experiment)
    if cluster_address(experiment) is None:
        compute_device(experiment)
    if experiment.tracking.enabled:
        resolve_uri(experiment.tracking.uri, run_dir)
    check_writable(run_dir)
    store.check_writable()
    return theta


def with_absolute_data(experiment: Experiment) -> Experiment:
    """Make `data.root` absolute: a worker may have another working directory."""
    return experiment.changed(data={"root": absolute_root(experiment.data.root)})


def _start_workers(session: Session, placement: Placement) -> WorkerGroup:
    """Start the workers, and tell the watcher where their number is not what one may expect."""
    experiment, watcher = session.experiment, session.watcher
    if experiment.cluster.workers == "auto" and experiment.pretraining is None:
        number = f"{placement.workers} actors" if placement.workers else "in process"
        watcher.notice(f"workers: {number} ({placement.reason})")
    if placement.workers == 0:
        if experiment.pretraining is None:
            return InProcess(experiment, session.compile, notice=watcher.notice)
        return InProcess(on_driver(experiment), compile=False, warm_up=False)
    chunks = session.cut.num_chunks
    if placement.workers > chunks:
        watcher.notice(
            f"{placement.workers} workers share {chunks} chunks per meta-batch: some "
            "will be idle; a smaller outer.tasks_per_chunk makes more chunks"
        )
    return RayWorkers(
        experiment, session.compile, placement.workers, watcher.notice, session.theta.size
    )


def _start_tracking(session: Session, state: TrainingState | None, placement: Placement) -> Tracker:
    """Open the run's record in MLflow; a resumed run continues its own."""
    experiment = session.experiment
    if not experiment.tracking.enabled:
        return NullTracker()
    tracker = MlflowTracker.open(
        uri=experiment.tracking.uri,
        experiment=experiment.tracking.experiment,
        run_name=session.run_dir.name,
        run_dir=session.run_dir,
        params={"num_parameters": session.optimizer.layout.size, **experiment.flat()},
        tags={
            **environment_tags(),
            "algorithm": experiment.algorithm_name,
            **({} if experiment.pretraining else {"order": experiment.inner.order}),
            "workers": str(placement.workers),
            "compiled": str(session.compile),
            "run_dir": str(session.run_dir),
            SELECTED_BY: session.metric,
            # MLflow's pages show these as the run's description and its source.
            "mlflow.note.content": summary(experiment, session.optimizer.layout.size),
            "mlflow.source.name": experiment.name,
            "mlflow.source.type": "LOCAL",
            **experiment.tracking.tags,
        },
        run_id=state.mlflow_run_id if state else None,
        token=session.tracking_token,
    )
    tracker.log_artifact(session.run_dir / "config.yaml")
    return tracker
