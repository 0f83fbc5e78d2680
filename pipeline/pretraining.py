"""Transfer learning (section 4.1), the comparison that meta-learning must win.

One network is trained on all training tasks at once, without adaptation: on one output per training
class (or, in regression, on the examples of all tasks pooled), or with a head per training task on
one body. Then its parameters serve as θ: `inner` says how they are fine-tuned to a new task, and
the test protocol is the same as for meta-learned ones.

The work is Ray Train's: `TorchTrainer` runs `_worker` on every worker, torch's DDP averages their
gradients, and a lost worker means that all go on from the last checkpoint, in RUN_DIR/pretraining.
Example i of update t is the same for any number of workers; batch normalisation sees the examples
of one worker only.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.adaptation import matching
from pipeline.chunk import compute_device, initial_parameters
from pipeline.components import build_model
from pipeline.config import Experiment
from pipeline.outer_update import OuterUpdate
from pipeline.parameters import Layout, Params
from pipeline.ray_workers import connect
from pipeline.session import Interrupted, Session, TrainingFailed
from tasks.random import integers, task_keys

_POLL = 0.2  # seconds
_MAX_FAILURES = 3  # lost workers before a run is given up
_WHICH = 2**16  # a random stream of its own: which of the tasks of multi-task an update sees


class Pretrainer:
    """One worker's share of ordinary training; `outer` says how, as for the meta-update."""

    def __init__(self, experiment: Experiment, device: torch.device):
        assert experiment.pretraining is not None
        self._experiment, self._settings = experiment, experiment.pretraining
        self._task = experiment.build_task()
        self._device = device
        self._dtype: torch.dtype = getattr(torch, experiment.compute.dtype)
        self.model = wide_model(experiment).to(device, self._dtype)
        params = {name: p.detach() for name, p in self.model.named_parameters()}
        self._update = OuterUpdate(params, experiment.outer)
        # The model looks into the memory that the optimiser updates.
        for name, value in self._update.theta.items():
            self.model.get_parameter(name).data = value
        self.iteration = 0
        """Completed updates."""
        self._bad_updates = 0

    @property
    def theta(self) -> Params:
        """The wide network's parameters."""
        return self._update.theta

    def run(
        self, until: int, forward: Callable[[Tensor], Tensor], rank: int = 0, size: int = 1
    ) -> dict[str, float]:
        """Train to iteration `until` on this worker's share; returns the means of its metrics.

        `forward` is the model, or what DDP has made of it.
        """
        sums: dict[str, float] = {}
        first = self.iteration
        while self.iteration < until:
            self.model.zero_grad(set_to_none=True)
            loss, metrics = self._loss(forward, rank, size)
            loss.backward()  # type: ignore[no-untyped-call]
            gradient = self._update.layout.join(
                {
                    name: torch.zeros_like(p) if p.grad is None else p.grad
                    for name, p in self.model.named_parameters()
                }
            )
            norm = self._update.step(gradient)
            self.iteration += 1
            self._guard(norm)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return {name: total / max(1, until - first) for name, total in sums.items()}

    def _guard(self, norm: float) -> None:
        """As in meta-training: a gradient that is not finite is not applied; many end the run."""
        self._bad_updates = 0 if math.isfinite(norm) else self._bad_updates + 1
        if self._bad_updates == self._experiment.outer.max_bad_updates:
            raise TrainingFailed(
                f"iteration {self.iteration - 1}: the gradient is not finite, the "
                f"{self._bad_updates}th time in a row; lower outer.lr, or set outer.clip_norm"
            )

    def _loss(
        self, forward: Callable[[Tensor], Tensor], rank: int, size: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of this worker's share of an update's examples, so scaled that DDP's mean over workers is
        the mean over all examples, whatever the shares."""
        seed, count = self._experiment.seed, self._settings.batch_size
        numbers = np.arange(rank, count, size) + self.iteration * count
        share = len(numbers) * size / count
        if self._settings.objective == "pooled":
            x, y = self._task.pooled(seed, numbers)
            y = y.to(self._device, self._dtype if y.is_floating_point() else y.dtype)
            prediction = forward(x.to(self._device, self._dtype))
            loss = self._task.loss(prediction, y)
            metrics = self._task.metrics(prediction.detach(), y)
            return share * loss, {"loss": loss.detach(), **metrics}
        keys = task_keys(seed, "train", numbers)
        which = integers(keys, _WHICH, 1, self._settings.tasks)[:, 0]
        batch = self._task.sample(seed, "train", which).to(self._device, self._dtype)
        x, y = (torch.cat([s, q], dim=1) for s, q in zip(batch.support, batch.query, strict=True))
        prediction = forward(x.flatten(0, 1))
        heads = prediction.view(len(which), x.shape[1], self._settings.tasks, -1)
        own = torch.stack([heads[i, :, head] for i, head in enumerate(which)])
        losses = [self._task.loss(p, t) for p, t in zip(own, y, strict=True)]
        judged = [self._task.metrics(p, t) for p, t in zip(own.detach(), y, strict=True)]
        metrics = {name: torch.stack([m[name] for m in judged]).mean() for name in judged[0]}
        loss = torch.stack(losses).mean()
        return share * loss, {"loss": loss.detach(), **metrics}

    def save(self, folder: Path) -> None:
        """Write the state; no pickle."""
        tensors = {name: value.cpu() for name, value in self._update.tensors().items()}
        safetensors.torch.save_file(tensors, folder / "state.safetensors")
        manifest = {"iteration": self.iteration, "scheduler": self._update.scheduler_state()}
        (folder / "state.json").write_text(json.dumps(manifest))

    def load(self, folder: Path) -> None:
        """Go on from a state that `save` wrote."""
        manifest = json.loads((folder / "state.json").read_text())
        tensors = safetensors.torch.load_file(folder / "state.safetensors")
        placed = {name: value.to(self._device) for name, value in tensors.items()}
        self._update.restore(placed, manifest["scheduler"])
        self.iteration = manifest["iteration"]


def wide_model(experiment: Experiment) -> nn.Module:
    """The experiment's model with an output for every training class, or a head for every task."""
    assert experiment.pretraining is not None
    task = experiment.build_task()
    outputs = task.pooled_size
    if experiment.pretraining.objective == "multi-task":
        outputs = experiment.pretraining.tasks * task.output_size
    return build_model(
        experiment.model.kind,
        experiment.model.settings,
        task.input_shape,
        outputs,
        experiment.seed,
    )


def narrowed(experiment: Experiment, wide: Params) -> Params:
    """θ for new tasks: the body as it was trained. The head is the trained one where it fits, the
    mean of all heads after multi-task training, and a new one otherwise."""
    assert experiment.pretraining is not None
    theta = initial_parameters(experiment)
    head = set(matching(wide_model(experiment), ["head"], "pretraining"))
    for name, new in theta.items():
        old = wide[name].detach().to("cpu", new.dtype)
        if experiment.pretraining.objective == "multi-task" and name in head:
            theta[name] = old.view(experiment.pretraining.tasks, *new.shape).mean(0)
        elif old.shape == new.shape:
            theta[name] = old.clone()
    return theta


def pretrain(session: Session, should_stop: Callable[[], bool] = lambda: False) -> None:
    """Pretraining in place of the meta-training loop. Raises TrainingFailed, Interrupted."""
    experiment = session.experiment
    session.save_checkpoint()
    if session.iteration < experiment.outer.iterations:
        workers = number_of_workers(experiment)
        work = _in_process if workers == 0 else _by_ray_train
        wide = work(session, workers, should_stop)
        if session.iteration < experiment.outer.iterations:
            session.save_checkpoint()
            raise Interrupted(f"stopped after iteration {session.iteration}")
        session.update.replace(Layout.of(session.update.theta).join(narrowed(experiment, wide)))


def number_of_workers(experiment: Experiment) -> int:
    """`cluster.workers`; auto is one per core here, and one per GPU or CPU of a cluster."""
    wanted = experiment.cluster.workers
    if wanted != "auto":
        return wanted
    if experiment.cluster.address is None and "RAY_ADDRESS" not in os.environ:
        return max(1, int((os.cpu_count() or 1) / max(1.0, experiment.cluster.cpus_per_worker)))
    import ray

    started = connect(experiment, 1)
    resources = ray.cluster_resources()
    if started:
        ray.shutdown()
    return max(1, int(resources.get("GPU", 0) or resources.get("CPU", 1)))


def _in_process(session: Session, workers: int, should_stop: Callable[[], bool]) -> Params:
    trainer = Pretrainer(session.experiment, compute_device(session.experiment))
    folder = session.run_dir / "pretraining"
    folder.mkdir(exist_ok=True)
    if (folder / "state.json").exists():
        trainer.load(folder)
    while trainer.iteration < session.experiment.outer.iterations and not should_stop():
        began = time.perf_counter()
        means = trainer.run(_next_report(session.experiment, trainer.iteration), trainer.model)
        trainer.save(folder)
        _take(session, trainer.iteration, means, time.perf_counter() - began)
    return trainer.theta


def _next_report(experiment: Experiment, iteration: int) -> int:
    assert experiment.pretraining is not None
    every = experiment.pretraining.report_every
    return min(experiment.outer.iterations, iteration - iteration % every + every)


def _take(session: Session, iteration: int, means: dict[str, float], seconds: float) -> None:
    """What the workers report, into the run's record."""
    updates = iteration - session.iteration
    if updates <= 0:
        return  # done again after a worker was lost
    assert session.experiment.pretraining is not None
    session.iteration = iteration
    per_second = updates * session.experiment.pretraining.batch_size / seconds
    metrics = {f"train/{name}": value for name, value in means.items()}
    metrics["examples_per_second"] = per_second
    session.log(metrics)
    session.watcher.iteration(iteration, metrics)
    session.save_checkpoint()


class _Board:
    """Where workers, wherever they are, leave their records and learn that they should stop."""

    def __init__(self) -> None:
        self._records: list[tuple[int, dict[str, float], float]] = []
        self._stop = False
        self._decided: dict[int, bool] = {}

    def put(self, iteration: int, means: dict[str, float], seconds: float) -> None:
        self._records.append((iteration, means, seconds))

    def take(self) -> list[tuple[int, dict[str, float], float]]:
        records, self._records = self._records, []
        return records

    def request_stop(self) -> None:
        self._stop = True

    def should_stop(self, iteration: int) -> bool:
        """The same answer to all workers: those that go on would wait for the others forever."""
        return self._decided.setdefault(iteration, self._stop)


def _by_ray_train(session: Session, workers: int, should_stop: Callable[[], bool]) -> Params:
    import ray
    from ray.train import (
        CheckpointConfig,
        FailureConfig,
        RunConfig,
        ScalingConfig,
    )
    from ray.train.torch import TorchTrainer

    experiment = session.experiment
    cluster = experiment.cluster
    started = connect(experiment, workers)
    try:
        board = ray.remote(num_cpus=0)(_Board).remote()
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "experiment": experiment.without_gpu().model_dump_json(),
                "board": board,
                "import_paths": [os.getcwd()],
            },
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=cluster.gpus_per_worker > 0,
                resources_per_worker={
                    "CPU": cluster.cpus_per_worker,
                    **({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}),
                },
            ),
            # With the same name and place, a later call goes on from the last checkpoint.
            run_config=RunConfig(
                name="pretraining",
                storage_path=experiment.checkpoint.uri or str(session.run_dir),
                failure_config=FailureConfig(max_failures=_MAX_FAILURES),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        )
        outcome: dict[str, Any] = {}

        def fit() -> None:
            try:
                outcome["result"] = trainer.fit()
            except BaseException as error:
                outcome["error"] = error

        thread = threading.Thread(target=fit, name="ray-train", daemon=True)
        thread.start()
        asked = False
        while True:
            alive = thread.is_alive()
            for record in ray.get(board.take.remote()):
                _take(session, *record)
            if not alive:
                break
            if should_stop() and not asked:
                asked = bool(ray.get(board.request_stop.remote()) or True)
            thread.join(_POLL)
        if "error" in outcome:
            raise TrainingFailed(
                f"pretraining ended after iteration {session.iteration}, {_MAX_FAILURES} times "
                f"taken up again: {_reason(outcome['error'])}"
            ) from outcome["error"]
        with outcome["result"].checkpoint.as_directory() as folder:
            last = Pretrainer(experiment, torch.device("cpu"))
            last.load(Path(folder))
        session.iteration = last.iteration
        return last.theta
    finally:
        if started:
            ray.shutdown()


def _worker(config: dict[str, Any]) -> None:
    """What Ray Train runs on every worker."""
    import ray
    import ray.train
    import ray.train.torch

    sys.path += [path for path in config["import_paths"] if path not in sys.path]
    experiment = Experiment.model_validate_json(config["experiment"])
    torch.set_num_threads(max(1, int(experiment.cluster.cpus_per_worker)))
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    trainer = Pretrainer(experiment, compute_device(experiment))
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            trainer.load(Path(folder))
    forward = ray.train.torch.prepare_model(trainer.model, move_to_device=False)
    while trainer.iteration < experiment.outer.iterations:
        began = time.perf_counter()
        until = _next_report(experiment, trainer.iteration)
        means = trainer.run(until, forward, rank, size)
        with tempfile.TemporaryDirectory() as folder:
            if rank == 0:
                trainer.save(Path(folder))
                saved = ray.train.Checkpoint.from_directory(folder)
                ray.train.report({"iteration": trainer.iteration, **means}, checkpoint=saved)
                seconds = time.perf_counter() - began
                ray.get(config["board"].put.remote(trainer.iteration, means, seconds))
            else:
                ray.train.report({"iteration": trainer.iteration, **means})
        if ray.get(config["board"].should_stop.remote(trainer.iteration)):
            return


def _reason(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
