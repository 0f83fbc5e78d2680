"""Runs pretraining on the workers of Ray Train; the driver watches and records it.

    driver: pretrain ── TorchTrainer.fit, in a thread ──▶ _worker (x N): torch's DDP averages
       ▲                                                     │           their gradients
       └── reads the board: records and states ◀── _Board ◀──┘ rank 0, every `report_every` updates

Only the driver writes the run. With every report it saves the workers' state in its own checkpoint,
from which any number of workers can continue. When a worker is lost, Ray Train starts all of them
again from its own copy of the last state.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from pipeline.cluster.capacity import lacking, refuse_or_wait, room_for_workers, worker_bundle
from pipeline.cluster.connection import connect
from pipeline.config.experiment import Experiment
from pipeline.config.settings import Pretraining
from pipeline.maml.flat_vector import Layout
from pipeline.runs.checkpoint import theta_of
from pipeline.training.endings import Diverged, Interrupted, TrainingFailed
from pipeline.training.pretraining import Pretrainer, narrowed
from pipeline.training.session import Session
from pipeline.worker.learner import compute_device

_POLL = 0.2  # seconds between looks at the board
_MAX_FAILURES = 3  # lost workers before a run is given up
_STATE = "state.safetensors"


class Report(NamedTuple):
    """Progress of all workers, sent by rank 0."""

    iteration: int
    means: dict[str, float]
    """Metrics by name, means per update since the last report."""
    seconds: float
    """Since the last report."""
    state: bytes
    """`Pretrainer.state` in the format of safetensors."""


class Start(NamedTuple):
    """The workers start at an iteration: for the first time, or again after a loss."""

    iteration: int


class Failure(NamedTuple):
    """The workers gave up for a reason that another attempt would meet again."""

    reason: str


def pretrain(session: Session, settings: Pretraining, should_stop: Callable[[], bool]) -> None:
    """Pretrain in place of the meta-training loop, then put θ for new tasks into the session.

    Raises TrainingFailed, Interrupted, and ValueError where the workers do not fit the machine.
    """
    experiment = session.experiment
    session.save_checkpoint()
    if session.iteration < experiment.outer.iterations:
        workers = number_of_workers(experiment, settings)
        session.tracker.set_tags({"workers": str(workers)})
        if workers == 0:
            _in_process(session, settings, should_stop)
        else:
            _by_ray_train(session, settings, workers, should_stop)
        if session.iteration < experiment.outer.iterations:
            raise Interrupted(f"stopped after iteration {session.iteration}")
    theta = narrowed(experiment, settings, theta_of(session.pretraining))
    session.optimizer.replace(Layout.of(session.optimizer.theta).join(theta))


def number_of_workers(experiment: Experiment, settings: Pretraining) -> int:
    """Resolve `cluster.workers`: `auto` fills the room; never more than an update has parts."""
    cluster = experiment.cluster
    auto = cluster.workers == "auto"
    wanted = max(1, room_for_workers(experiment).now) if auto else int(cluster.workers)
    return min(wanted, -(-settings.batch_size // settings.part_size))


def _in_process(session: Session, settings: Pretraining, should_stop: Callable[[], bool]) -> None:
    """Pretrain in this process, without Ray."""
    experiment = session.experiment
    trainer = Pretrainer(experiment, settings, compute_device(experiment))
    _restore(trainer, session.pretraining, session.iteration)
    while trainer.iteration < experiment.outer.iterations and not should_stop():
        began = time.perf_counter()
        means = trainer.run(trainer.next_report, trainer.model)
        seconds = time.perf_counter() - began
        _take(session, trainer.iteration, means, seconds, trainer.state())


def _restore(trainer: Pretrainer, state: Mapping[str, Tensor], iteration: int) -> None:
    """Continue from a state, where there is one."""
    if state:
        trainer.restore(dict(state), iteration)


def _take(
    session: Session,
    iteration: int,
    means: Mapping[str, float],
    seconds: float,
    state: dict[str, Tensor],
) -> None:
    """Write a report into the run's record and its checkpoint."""
    updates = iteration - session.iteration
    if updates <= 0:
        return  # these updates were repeated after a worker was lost
    session.iteration, session.pretraining = iteration, state
    per_second = updates * session.method.updates(session.experiment).size / seconds
    metrics = {f"train/{name}": value for name, value in means.items()}
    metrics["examples_per_second"] = per_second
    session.log(metrics)
    session.watcher.iteration(iteration, metrics)
    session.save_checkpoint()


class _Board:
    """A Ray actor that carries news from the workers to the driver, and the wish to stop back."""

    def __init__(self) -> None:
        self._news: list[Report | Start | Failure] = []
        self._stop = False
        self._decided: dict[int, bool] = {}

    def put(self, news: Report | Start | Failure) -> None:
        """Called by a worker."""
        self._news.append(news)

    def take(self) -> list[Report | Start | Failure]:
        """Called by the driver: the news since its last call, oldest first."""
        news, self._news = self._news, []
        return news

    def request_stop(self) -> None:
        """Called by the driver: all workers stop after their next report."""
        self._stop = True

    def should_stop(self, iteration: int) -> bool:
        """Called by every worker after a report. All get the same answer for an iteration: a
        worker that went on alone would wait forever for the gradients of the others."""
        return self._decided.setdefault(iteration, self._stop)


def _by_ray_train(
    session: Session, settings: Pretraining, workers: int, should_stop: Callable[[], bool]
) -> None:
    """Pretrain on the workers of Ray Train; connect to Ray, and leave it as it was found.

    Raises TrainingFailed, and ValueError where the workers do not fit the cluster.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    experiment = session.experiment
    started = connect(experiment, workers)
    storage, name = _storage(session), f"pretraining-{uuid.uuid4().hex[:8]}"
    try:
        bundles = [worker_bundle(experiment)] * workers
        missing = lacking(f"pretraining takes {workers} workers of", bundles)
        refuse_or_wait(experiment, missing, session.watcher.notice)
        # On the driver's node: it lives as long as the driver, while other nodes may be lost.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        board = ray.remote(num_cpus=0, scheduling_strategy=here)(_Board).remote()
        fit = _Fit(session, settings, workers, board, storage, name)
        fit.start()
        _watch(session, fit, board, should_stop)
        if fit.error is not None:
            raise TrainingFailed(
                f"pretraining ended after iteration {session.iteration}: {_reason(fit.error)}"
            ) from fit.error
    finally:
        if started:
            ray.shutdown()
        with contextlib.suppress(OSError):  # Ray's copies are needed no longer
            shutil.rmtree(Path(storage) / name)


def _watch(session: Session, fit: _Fit, board: Any, should_stop: Callable[[], bool]) -> None:
    """Record reports until Ray Train has ended; where a stop was requested before any worker
    started, do not wait for it. Raises Diverged."""
    import ray

    begun, asked, failure = False, False, ""
    while True:
        alive = fit.is_alive()
        for news in ray.get(board.take.remote()):
            if isinstance(news, Report):
                state = safetensors.torch.load(news.state)
                _take(session, news.iteration, news.means, news.seconds, state)
            elif isinstance(news, Failure):
                failure = news.reason
            elif begun:
                session.watcher.notice(
                    f"a worker was lost; all go on from iteration {news.iteration}"
                )
            begun = True
        if not alive or (asked and not begun):
            break
        if should_stop() and not asked:
            ray.get(board.request_stop.remote())
            asked = True
        fit.join(_POLL)
    if failure:
        raise Diverged(failure)


class _Fit(threading.Thread):
    """A thread that runs `TorchTrainer.fit`, which blocks; `error` is what it raised."""

    def __init__(
        self,
        session: Session,
        settings: Pretraining,
        workers: int,
        board: Any,
        storage: str,
        name: str,
    ):
        super().__init__(name="ray-train", daemon=True)
        self.error: BaseException | None = None
        experiment, cluster = session.experiment, session.experiment.cluster
        state = safetensors.torch.save(session.pretraining) if session.pretraining else b""
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        self._trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "experiment": experiment.without_gpu().model_dump_json(),
                "pretraining": settings.model_dump_json(),
                "board": board,
                "import_paths": [os.getcwd()],
                "state": state,
                "iteration": session.iteration,
                "threads": session.worker_threads,
            },
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=bool(cluster.gpus_per_worker),
                resources_per_worker=worker_bundle(experiment),
            ),
            run_config=RunConfig(
                name=name,
                storage_path=storage,
                failure_config=FailureConfig(max_failures=_MAX_FAILURES),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        )

    def run(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:
            self.error = error


def _storage(session: Session) -> str:
    """A place for Ray Train's copies that all nodes see: `checkpoint.uri`, else the run folder."""
    uri = session.experiment.checkpoint.uri
    if uri is None:
        return str(session.run_dir)
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def _worker(config: dict[str, Any]) -> None:
    """The function that Ray Train runs on every worker; `config` is the `train_loop_config`."""
    import ray
    import ray.train
    import ray.train.torch

    sys.path += [path for path in config["import_paths"] if path not in sys.path]
    experiment = Experiment.model_validate_json(config["experiment"])
    torch.set_num_threads(config["threads"])
    context = ray.train.get_context()
    rank, size, board = context.get_world_rank(), context.get_world_size(), config["board"]
    own_gpu = bool(experiment.cluster.gpus_per_worker)
    device = ray.train.torch.get_device() if own_gpu else compute_device(experiment)
    settings = Pretraining.model_validate_json(config["pretraining"])
    trainer = Pretrainer(experiment, settings, device)
    _restore(trainer, *_newest_state(config))
    if rank == 0:
        ray.get(board.put.remote(Start(trainer.iteration)))
    forward = ray.train.torch.prepare_model(trainer.model, move_to_device=False)
    while trainer.iteration < experiment.outer.iterations:
        began = time.perf_counter()
        try:
            means = trainer.run(trainer.next_report, forward, rank, size)
        except Diverged as error:  # raised by all workers in the same update
            if rank == 0:
                ray.get(board.put.remote(Failure(str(error))))
            return
        means = _summed(means, device) if size > 1 else means
        seconds = time.perf_counter() - began
        state = safetensors.torch.save(trainer.state()) if rank == 0 else None
        _keep_copy(trainer.iteration, state)
        if state is not None:
            ray.get(board.put.remote(Report(trainer.iteration, means, seconds, state)))
        if ray.get(board.should_stop.remote(trainer.iteration)):
            return


def _newest_state(config: Mapping[str, Any]) -> tuple[dict[str, Tensor], int]:
    """State and iteration to continue from: Ray Train's copy, else those of the driver."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        state = safetensors.torch.load(config["state"]) if config["state"] else {}
        return state, config["iteration"]
    with checkpoint.as_directory() as folder:
        state = safetensors.torch.load_file(Path(folder) / _STATE)
    return state, checkpoint.get_metadata()["iteration"]


def _keep_copy(iteration: int, state: bytes | None) -> None:
    """Give Ray Train its copy of the state, which rank 0 has; every worker must call this."""
    import ray.train

    with tempfile.TemporaryDirectory() as folder:
        copy = None
        if state is not None:
            (Path(folder) / _STATE).write_bytes(state)
            copy = ray.train.Checkpoint.from_directory(folder)
            copy.set_metadata({"iteration": iteration})
        ray.train.report({"iteration": iteration}, checkpoint=copy)


def _summed(means: dict[str, float], device: torch.device) -> dict[str, float]:
    """Sum each metric over all workers."""
    total = torch.tensor(list(means.values()), device=device)
    torch.distributed.all_reduce(total)
    return dict(zip(means, total.tolist(), strict=True))


def _reason(error: BaseException) -> str:
    """The last line of an error's message: Ray puts whole stack traces before it."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
