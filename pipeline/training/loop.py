"""Meta-training (paper, Algorithms 1, 2 and 3), then the meta-test.

    for every iteration:
        for every chunk of tasks: sample tasks, adapt to each (eq. 2),
            differentiate its query loss with respect to θ (eq. 3)           workers
        average the gradients over the tasks                                 aggregation
        θ <- θ − β · mean gradient (eq. 4), or a policy's own step           outer_step

The driver runs this loop. It alone writes checkpoints, the run's folder and MLflow's record.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from pipeline.cluster.capacity import refuse_crowd, too_many_workers
from pipeline.cluster.dispatch import RayWorkers
from pipeline.cluster.group import InProcess, WorkerGroup
from pipeline.cluster.rounds import Total
from pipeline.config.experiment import Experiment
from pipeline.config.loading import absolute_path
from pipeline.config.wording import counted
from pipeline.evaluation.health import theta_diverged
from pipeline.evaluation.meta_test import Curve, meta_test
from pipeline.training.aggregation import Aggregate, aggregate
from pipeline.training.endings import Diverged, Interrupted, never
from pipeline.training.opening import open_session
from pipeline.training.outer_step import MetaBatch
from pipeline.training.placement import Placement, decide_compile, decide_workers
from pipeline.training.session import Method, Session, Updates, Watcher
from pipeline.training.transfer_learning import TransferLearning
from pipeline.training.validation import diagnose, validate
from pipeline.worker.jobs import GradientJob
from pipeline.worker.learner import compute_device


def train(
    experiment: Experiment,
    run_dir: str | Path,
    *,
    resume: bool = False,
    watcher: Watcher | None = None,
    should_stop: Callable[[], bool] = never,
) -> list[Curve]:
    """Meta-train an experiment (or pretrain, if it says so), then meta-test it.

    `experiment` says what is computed and where; `run_dir` is the folder that the run leaves its
    configuration, checkpoints, parameters, results and plots in: a new one, or with `resume` that
    of a run which goes on from its last checkpoint. `watcher` is told how the run gets on.
    `should_stop` is asked after every iteration; True saves a checkpoint and ends the run.

    Returns the curves of the meta-test: metrics after every number of gradient steps, one curve
    for each variant of the test tasks and for each baseline on it.

    Raises TrainingFailed if the run cannot go on (Diverged: its numbers are no longer finite),
    Interrupted if it was stopped, WorkersLost if no worker is left; and before anything is
    computed ValueError, RunFolderError, CheckpointError, StoreError or TrackingError for what is
    wrong with the settings, the folder, the data or the tracking store.
    """
    method = method_of(experiment)
    folder = absolute_path(run_dir)
    with open_session(experiment, folder, method, resume, watcher or Watcher()) as session:
        method.run(session, should_stop)
        session.watcher.testing(session.experiment)
        curves = meta_test(
            session.workers,
            session.experiment,
            session.theta,
            on_curve=lambda curve: session.watcher.tested(curve),
        )
        session.record_test(curves)
        return curves


def meta_train(session: Session, should_stop: Callable[[], bool] = never) -> None:
    """Iterate until `outer.iterations` are completed, then write θ. Test tasks play no part in it.

    Raises Diverged, Interrupted.
    """
    experiment = session.experiment
    session.save_checkpoint()  # so that a run can be continued before its first regular checkpoint
    _look(session)  # a run that ended between an update and these
    while session.iteration < experiment.outer.iterations:
        meta_update(session)
        _look(session)
        if session.checkpoint_due:
            session.save_checkpoint()
        if should_stop():
            raise Interrupted(f"stopped after iteration {session.iteration}")
    session.save_theta()


def _look(session: Session) -> None:
    """Diagnose and validate where it is due after this iteration, and was not done yet.

    In this order, because a validation that is the best so far writes a checkpoint: from there on
    both are done.
    """
    experiment = session.experiment
    every = experiment.diagnostics.every
    if every and session.due(every) and session.diagnosed_at < session.iteration:
        diagnose(session)
    if session.due(experiment.validate_every) and session.validated_at < session.iteration:
        validate(session)


def meta_update(session: Session) -> None:
    """One iteration: move θ by the mean meta-gradient of a meta-batch, and record it.

    Raises Diverged.
    """
    began = time.perf_counter()
    iteration = session.iteration
    total = session.workers.total(  # sample, adapt, differentiate, add up
        session.theta, lambda chunks: GradientJob(iteration, chunks), session.cut.num_chunks
    )
    answered = time.perf_counter()
    mean = aggregate(total, session.cut)  # over the tasks
    aggregated = time.perf_counter()
    batch = MetaBatch(iteration, session.cut.num_chunks, session.workers)
    moved = session.outer_step.move(session.optimizer, mean, batch)  # θ_t -> θ_{t+1}
    updated = time.perf_counter()
    session.update_done()
    _stop_if_diverged(session, mean)
    session.record(
        {
            **{f"train/{name}": value for name, value in mean.metrics.items()},
            **moved,
            **_seconds(total, answered - began),
            "seconds/aggregating": aggregated - answered,
            "seconds/updating": updated - aggregated,
            **({"workers": session.workers.ready} if session.workers.size else {}),
        },
        began,
    )


def _seconds(total: Total, elapsed: float) -> dict[str, float]:
    """Where the time of a round went, in seconds.

    Sampling and computing are sums over the chunks. Waiting is the elapsed time beyond the work of
    the busiest worker: transfers, scheduling, and chunks that do not divide evenly.
    """
    return {
        "seconds/sampling": total.seconds_sampling,
        "seconds/computing": total.seconds_computing,
        "seconds/waiting": elapsed - total.busiest_seconds,
    }


def _stop_if_diverged(session: Session, mean: Aggregate) -> None:
    """Count updates that were refused because their gradient was not finite.

    Raises Diverged, with advice, after `outer.max_bad_updates` of them in a row.
    """
    if not mean.bad_tasks:
        session.bad_updates = 0
        return
    session.bad_updates += 1
    per_batch = session.experiment.outer.tasks_per_batch
    first = (session.iteration - 1) * per_batch
    tasks = ", ".join(str(first + position) for position in mean.bad_tasks[:8])
    more = len(mean.bad_tasks) - 8
    what = (
        f"iteration {session.iteration - 1}: the meta-gradient is not finite; "
        f"training tasks {tasks}{f' and {more} more' if more > 0 else ''}"
    )
    limit = session.experiment.outer.max_bad_updates
    if session.bad_updates < limit:
        session.watcher.notice(f"{what}; the update was not applied")
        return
    first_loss = session.history.first("train/support_loss")
    if session.experiment.diagnostics.every and not theta_diverged(mean.metrics, first_loss):
        diagnose(session)  # a run that diverges early has no diagnosis yet
    advice = session.outer_step.advice(session.experiment, mean.metrics, first_loss)
    raise Diverged(
        f"{what}. {limit} updates in a row were not finite, so training stopped; none was applied. "
        f"{advice}"
    )


class MetaLearning:
    """A `Method`: meta-updates on the tasks of meta-batches."""

    def check(self, experiment: Experiment) -> None:
        """Only the number of workers: `opening` checks model, tasks and device of every run."""
        refuse_crowd(experiment)

    def place(self, experiment: Experiment, compile: bool) -> Placement:
        return decide_workers(experiment, compile)

    def compiles(self, experiment: Experiment) -> bool:
        return decide_compile(experiment)

    def start_workers(self, session: Session, placement: Placement) -> WorkerGroup:
        """Start the workers, and tell the watcher where their number is not what one may expect."""
        experiment, watcher = session.experiment, session.watcher
        if experiment.cluster.workers == "auto":
            number = f"{placement.workers} actors" if placement.workers else "in process"
            watcher.notice(f"workers: {number} ({placement.reason})")
        if placement.workers == 0:
            return InProcess(experiment, session.compile, notice=watcher.notice)
        if few := _few_chunks(experiment, placement.workers, session.cut.num_chunks):
            watcher.notice(few)
        crowded = too_many_workers(experiment, placement.workers)
        if crowded:
            watcher.notice(crowded)
        return RayWorkers(
            experiment, session.compile, placement.workers, watcher.notice, session.theta.size
        )

    def run(self, session: Session, should_stop: Callable[[], bool]) -> None:
        meta_train(session, should_stop)

    def updates(self, experiment: Experiment) -> Updates:
        size = experiment.outer.tasks_per_batch
        words = f"meta-updates of {size} tasks, {experiment.inner.order} order"
        return Updates(size, "tasks", words)

    def describe(self, session: Session) -> str:
        inner, outer = session.experiment.inner, session.experiment.outer
        if session.workers.size:
            share = session.experiment.cluster.gpus_per_worker
            gpus = f" with {share:g} GPU each" if share else ""
            workers = f"{session.workers.size} Ray actors{gpus}"
        else:
            cuda = compute_device(session.experiment).type == "cuda"
            workers = "in process" + (" on the GPU" if cuda else "")
        return (
            f"inner steps: {inner.steps}, {inner.order} order; "
            f"{outer.tasks_per_batch} tasks per meta-batch, {session.cut.per_chunk} per chunk; "
            f"{workers}; {'compiled' if session.compile else 'not compiled'}"
        )

    def tags(self, experiment: Experiment) -> dict[str, str]:
        return {"order": experiment.inner.order}


def _few_chunks(experiment: Experiment, workers: int, chunks: int) -> str:
    """That some of the workers that were asked for have nothing to do, in words, or ''."""
    asked = experiment.cluster.workers
    more = "a smaller outer.tasks_per_chunk makes more chunks"
    if asked != "auto" and asked > workers:
        return (
            f"cluster.workers: a meta-batch has {counted(chunks, 'chunk')}, so of {asked} workers "
            f"only {workers} will start, which changes no result; {more}"
        )
    if workers > chunks:
        return f"{workers} workers share {chunks} chunks per meta-batch: some will be idle; {more}"
    return ""


def method_of(experiment: Experiment) -> Method:
    """What the experiment asks for: transfer learning where it has a section `pretraining`."""
    settings = experiment.pretraining
    return MetaLearning() if settings is None else TransferLearning(settings)
