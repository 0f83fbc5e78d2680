"""Opens a run: checks, folder, workers, MLflow record; and closes it, however it ends.

Checks come first, and what a start wrote is taken back where it fails or is interrupted, so that a
run that does not start leaves nothing behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from pipeline.cluster.connection import cluster_address
from pipeline.cluster.group import threads_per_chunk
from pipeline.config.experiment import Experiment
from pipeline.config.loading import from_dict
from pipeline.evaluation.meta_test import check_tasks
from pipeline.maml.flat_vector import Params
from pipeline.runs.checkpoint import CheckpointStore, TrainingState
from pipeline.runs.claims import Lease, leased
from pipeline.runs.continuing import refuse_another
from pipeline.runs.files import write_atomically
from pipeline.runs.folder import (
    RunFolderError,
    check_writable,
    refuse_to_overwrite,
    state_to_resume,
    taken_back_if_it_fails,
)
from pipeline.runs.tracker import (
    SELECTED_BY,
    MlflowTracker,
    NullTracker,
    Tracker,
    environment_tags,
    resolve_uri,
)
from pipeline.training.endings import Interruption
from pipeline.training.session import Method, Session, Watcher, without_records
from pipeline.worker.learner import compute_device, initial_parameters
from tasks.data_root import absolute_root


def first_state_from(state: TrainingState) -> TrainingState:
    """The state of a new run that starts from another run's checkpoint.

    It takes over θ, the optimiser, the iteration, `compile` and `threads`, not the MLflow run, the
    metrics that wait for their record, nor the best checkpoint.
    """
    state = without_records(state)
    extra = {**state.extra, "tracking_token": None, "ancestor": name_of_state(state)}
    return replace(state, best=None, bad_updates=0, mlflow_run_id=None, extra=extra)


def name_of_state(state: TrainingState) -> str:
    """Names the run and the iteration of a checkpoint: "TOKEN@ITERATION"."""
    return f"{state.extra['tracking_token']}@{state.iteration}"


@contextlib.contextmanager
def open_session(
    experiment: Experiment,
    run_dir: Path,
    method: Method,
    resume: bool,
    watcher: Watcher,
    *,
    token: str | None = None,
    start_from: TrainingState | None = None,
) -> Iterator[Session]:
    """Open a new run in `run_dir`, or continue (`resume`) the one there; close it at the end.

    `method` says what the run will do. `token` names it in MLflow, so that it is found again; by
    default it is a new one. `start_from` is the checkpoint of another run to start from, whatever
    is in the folder.

    Raises RunFolderError, CheckpointError, TrackingError, and ValueError for what is wrong with the
    folder, the checkpoints, the tracking address, the model or the data.
    """
    method.check(experiment)
    store = CheckpointStore.of_run(experiment, run_dir)
    with contextlib.ExitStack() as held:
        lease = None if token is not None else held.enter_context(_writing(run_dir, store))
        state = _state_to_begin_with(store, run_dir, resume, start_from)
        if state is not None and token is None:  # a search may change what its trials are
            _refuse_another_run(experiment, state, store)
        begun = _Opening(experiment, run_dir, method, state, store, watcher, token, lease)
        session = _prepared(begun)
        with _closed(session):
            session.tracker = _start_tracking(session, state)
            watcher.started(session)
            yield session


@contextlib.contextmanager
def _writing(run_dir: Path, store: CheckpointStore) -> Iterator[Lease]:
    """Be the one who writes the run and, where they are on this machine, its checkpoints.

    Raises RunFolderError.
    """
    with contextlib.ExitStack() as held:
        lease = held.enter_context(leased(run_dir))
        elsewhere = store.local_folder
        if elsewhere is not None and not elsewhere.is_relative_to(run_dir):
            held.enter_context(leased(elsewhere, "checkpoint.uri"))
        yield lease


@contextlib.contextmanager
def _closed(session: Session) -> Iterator[None]:
    """Around what a session does: saves its last state, ends its workers and its MLflow record."""
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    watcher = session.watcher
    try:
        yield
        if problem := session.save_at_end():
            watcher.notice(problem)
        status = "FINISHED"
    except BaseException as error:
        if problem := session.save_at_end():
            error.add_note(problem)
        if isinstance(error, Interruption):
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


class _Opening(NamedTuple):
    """What a session is made of."""

    experiment: Experiment
    run_dir: Path
    method: Method
    state: TrainingState | None
    store: CheckpointStore
    watcher: Watcher
    token: str | None
    lease: Lease | None


def _prepared(opening: _Opening) -> Session:
    """A session whose workers have been started; what a new run wrote goes where that fails.

    Raises what `open_session` raises.
    """
    experiment = with_absolute_data(opening.experiment.changed(search=None))
    run_dir, state = opening.run_dir, opening.state
    config = experiment.to_yaml()
    with contextlib.ExitStack() as starting:
        if state is None and opening.lease is not None:  # without one the folder is the caller's
            starting.enter_context(taken_back_if_it_fails(run_dir))
        theta = _first_theta(experiment, run_dir, opening.store)
        opening.watcher.starting(experiment, run_dir)
        if state is None:  # so that it can be resumed if it is killed while programs compile
            write_atomically(run_dir / "config.yaml", config)
        session = _started(opening._replace(experiment=experiment), theta)
    if state is not None:  # only now, because a resume that is refused changes nothing
        write_atomically(run_dir / "config.yaml", config)
        session.rebuild_history(state)
    return session


def _started(opening: _Opening, theta: Params) -> Session:
    """Decide what results depend on, and start the workers. Raises what `open_session` raises."""
    experiment, method, state = opening.experiment, opening.method, opening.state
    # This and the number of threads change the last bits of results: a resumed run keeps those of
    # its beginning.
    compile = bool(state.extra["compile"]) if state else method.compiles(experiment)
    placement = method.place(experiment, compile)
    # Of Ray Train: decided before the next lines write this process's number into the settings.
    worker_threads = threads_per_chunk(experiment, 1)
    threads = state.extra["threads"] if state else threads_per_chunk(experiment, placement.workers)
    share = {"gpus_per_worker": placement.gpus_per_worker}
    session = Session(
        experiment.changed(compute={"threads": threads}, cluster=share),
        opening.run_dir,
        method,
        theta,
        state,
        opening.store,
        opening.watcher,
        compile=compile,
        token=opening.token,
        lease=opening.lease,
    )
    session.worker_threads = worker_threads
    session.workers = method.start_workers(session, placement)
    return session


def _state_to_begin_with(
    store: CheckpointStore, run_dir: Path, resume: bool, start_from: TrainingState | None
) -> TrainingState | None:
    """The state of a checkpoint, or None for a run that begins at the beginning.

    Raises RunFolderError, CheckpointError.
    """
    if start_from is not None:
        return first_state_from(start_from)
    if resume:
        return state_to_resume(run_dir, store)
    refuse_to_overwrite(run_dir, store)
    return None


def _refuse_another_run(
    experiment: Experiment, state: TrainingState, store: CheckpointStore
) -> None:
    """Raise ConfigError for the state of a run with other settings, as `checkpoint.uri` may name,
    RunFolderError for one that has gone further than this experiment does."""
    refuse_another(experiment, from_dict(state.config), f"the run in {store.folder}")
    if state.iteration > experiment.outer.iterations:
        raise RunFolderError(
            f"outer.iterations: {experiment.outer.iterations:,} are fewer than the "
            f"{state.iteration:,} that the run in {store.folder} has done"
        )


def _first_theta(experiment: Experiment, run_dir: Path, store: CheckpointStore) -> Params:
    """Check what can be known to be wrong before the start; return θ of a fresh model.

    A model that does not fit the tasks, a missing GPU and a bad tracking address are found before
    anything is written. Raises what `open_session` raises.
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


def _start_tracking(session: Session, state: TrainingState | None) -> Tracker:
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
            **session.method.tags(experiment),
            "workers": str(session.workers.size),
            "compiled": str(session.compile),
            "run_dir": str(session.run_dir),
            SELECTED_BY: session.metric,
            # MLflow's pages show these as the run's description and its source.
            "mlflow.note.content": session.summary(),
            "mlflow.source.name": experiment.name,
            "mlflow.source.type": "LOCAL",
            **experiment.tracking.tags,
        },
        run_id=state.mlflow_run_id if state else None,
        token=session.tracking_token,
    )
    tracker.log_artifact(session.run_dir / "config.yaml")
    return tracker
