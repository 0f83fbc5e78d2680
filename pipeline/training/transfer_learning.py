"""Transfer learning as the method of a run: what differs from meta-learning around it.

`pretraining` computes it, `ray_train` runs it. The meta-test is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.cluster.capacity import refuse_crowd
from pipeline.cluster.group import InProcess, WorkerGroup, on_driver
from pipeline.config.experiment import Experiment
from pipeline.config.settings import Pretraining
from pipeline.training.placement import Placement, gpu_share
from pipeline.training.pretraining import check_pretraining
from pipeline.training.ray_train import pretrain
from pipeline.training.session import Session, Updates
from pipeline.training.validation import validate


@dataclass(frozen=True)
class TransferLearning:
    """A `Method`: pretrain one network on all training tasks, then make θ of it."""

    settings: Pretraining

    def check(self, experiment: Experiment) -> None:
        refuse_crowd(experiment)
        check_pretraining(experiment, self.settings)

    def place(self, experiment: Experiment, compile: bool) -> Placement:
        return Placement(0, "Ray Train has workers of its own", gpu_share(experiment))

    def compiles(self, experiment: Experiment) -> bool:
        return False  # chunk functions run in a few evaluations only

    def start_workers(self, session: Session, placement: Placement) -> WorkerGroup:
        return InProcess(on_driver(session.experiment), compile=False, warm_up=False)

    def run(self, session: Session, should_stop: Callable[[], bool]) -> None:
        pretrain(session, self.settings, should_stop)
        validate(session)
        session.save_theta()

    def updates(self, experiment: Experiment) -> Updates:
        size = self.settings.batch_size
        return Updates(size, "examples", f"updates of {size} examples")

    def describe(self, session: Session) -> str:
        return f"{self.settings.objective} pretraining, batches of {self.settings.batch_size}"

    def tags(self, experiment: Experiment) -> dict[str, str]:
        return {}
