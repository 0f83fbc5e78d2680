"""The sections of an experiment, each a typed schema that says what its settings mean."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator

from pipeline.config.section import Rule, Section
from pipeline.config.wording import shown
from tasks.data_root import default_root


class Component(Section):
    """The name of a kind, and the settings of that kind."""

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: str = Field(description="a built-in kind, or 'package.module:name' of your own")

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of the kind's constructor or builder."""
        return dict(self.model_extra or {})


_MOST_STEPS = 10_000
Names = tuple[str, ...]


class Inner(Section):
    """Adaptation to one task (eq. 2). Parameters are named by groups (all, head, body,
    normalisation) or by patterns (*.weight)."""

    lr: float = Field(0.01, gt=0, description="inner learning rate α, for the mean loss")
    steps: int = Field(
        1,
        ge=0,
        le=_MOST_STEPS,
        description="gradient steps of adaptation while meta-training; 0, in reinforcement "
        "learning: one policy for all tasks",
    )
    later_lr_factor: float = Field(
        1.0, gt=0, description="factor on the inner rate of steps at test beyond inner.steps"
    )
    order: Literal["second", "first", "annealed"] = Field(
        "second", description="first: inner gradients are constants of the meta-gradient (FOMAML)"
    )
    second_order_from: int | None = Field(
        None,
        ge=1,
        description="iteration at which annealed order goes from first to second; null: after a "
        "third of outer.iterations, as in MAML++",
    )
    recompute: bool = Field(
        False,
        description="activation checkpointing: inner steps are computed again on the way back, so "
        "that memory does not grow with their number",
    )
    adapted: Names = Field(("all",), description="parameters that adapt")
    not_adapted: Names = Field((), description="of these, parameters that do not")
    per_step: Names = Field(
        (), description="parameters that do not adapt but have a learned value for every step"
    )
    rates: Literal["fixed", "per-layer-and-step", "per-parameter"] = Field(
        "fixed", description="learned rates start at inner.lr"
    )
    optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    momentum: float = Field(
        0.9, ge=0, lt=1, description="momentum: coefficient of the previous update"
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="adam: decay of the first moment")
    batch_size: int | None = Field(
        None, ge=1, description="support examples per step, in turns; null: all"
    )

    @field_validator("adapted", "not_adapted", "per_step", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    rules = (
        Rule(
            "inner.second_order_from",
            lambda inner: inner.order != "annealed" and inner.second_order_from is not None,
            lambda inner: f"only annealed order has it, inner.order is {inner.order}",
        ),
    )


class Outer(Section):
    """The meta-update (eq. 4); the meta-gradient is the mean over the tasks of a meta-batch."""

    lr: float = Field(1e-3, gt=0, description="outer learning rate β")
    iterations: int = Field(..., ge=1, le=10**9, description="meta-updates")
    tasks_per_batch: int = Field(..., ge=1, le=10**6, description="tasks per meta-update")
    tasks_per_chunk: int | None = Field(
        None,
        ge=1,
        description="tasks that a worker adapts at once; null: from the meta-batch and the model",
    )
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd: coefficient of the previous update")
    weight_decay: float = Field(0.0, ge=0)
    scheduler: str | None = Field(
        None, description="a class of torch.optim.lr_scheduler, stepped once per iteration"
    )
    scheduler_args: dict[str, Any] = Field(
        default_factory=dict,
        description="its arguments; T_max, total_iters and total_steps default to outer.iterations",
    )
    clip_norm: float | None = Field(None, gt=0, description="largest norm of the meta-gradient")
    clip_value: float | None = Field(None, gt=0, description="largest size of each of its elements")
    direction: Literal["gradient", "reptile"] = Field(
        "gradient",
        description="what θ descends along: the meta-gradient, or (reptile) θ minus the adapted θ",
    )
    query_losses: Literal["last", "all", "annealed"] | tuple[float, ...] = Field(
        "last", description="query losses that count: after the last step, all, or own weights"
    )
    query_losses_until: int | None = Field(
        None,
        ge=1,
        description="iteration from which annealed query losses are the last alone; null: a "
        "fifteenth of outer.iterations, as in MAML++",
    )
    max_bad_updates: int = Field(
        3, ge=1, description="stop after so many non-finite meta-gradients in a row"
    )

    rules = (
        Rule(
            "outer.momentum",
            lambda outer: outer.momentum and outer.optimizer != "sgd",
            lambda outer: f"only sgd has momentum, not {outer.optimizer}",
        ),
        Rule(
            "outer.tasks_per_chunk",
            lambda outer: (outer.tasks_per_chunk or 0) > outer.tasks_per_batch,
            lambda outer: (
                f"{outer.tasks_per_chunk} is more than outer.tasks_per_batch "
                f"({outer.tasks_per_batch})"
            ),
        ),
        Rule(
            "outer.scheduler_args",
            lambda outer: outer.scheduler_args and not outer.scheduler,
            "given without outer.scheduler",
        ),
    )


_OF_UPDATE = {
    "trpo": (
        "max_kl",
        "cg_iterations",
        "fisher_trajectories",
        "damping",
        "backtrack",
        "backtracks",
    ),
    "promp": ("clip", "outer_steps", "inner_kl"),
}
"""Settings that one `reinforcement.update` alone has."""


def _only_of(update: str, name: str) -> Rule:
    """The rule that a setting of one update stays at its default with the others."""
    return Rule(
        f"reinforcement.{name}",
        # By value, because a resolved configuration holds the defaults of every setting.
        lambda section: (
            section.update != update and getattr(section, name) != _default(section, name)
        ),
        lambda section: f"only {update} has it, reinforcement.update is {section.update}",
    )


def _default(section: Section, name: str) -> Any:
    return type(section).model_fields[name].default


class Reinforcement(Section):
    """Policy gradients: how a policy adapts to a task (eq. 7), and how the meta-policy moves."""

    estimator: Literal["naive", "lvc", "dice"] = Field(
        "lvc",
        description="how the meta-gradient accounts for θ changing which trajectories are "
        "sampled; naive: not at all (as in the original code); lvc: the part of low variance; "
        "dice: exactly, with high variance",
    )
    discount: float = Field(0.99, gt=0, le=1, description="γ of rewards")
    gae_lambda: float = Field(1.0, ge=0, le=1, description="λ of generalised advantages")
    update: Literal["trpo", "promp", "gradient"] = Field(
        "trpo",
        description="trpo: a step within a trust region; promp: clipped steps on the same "
        "trajectories; gradient: one step; the last two by outer.optimizer",
    )
    max_kl: float = Field(0.01, gt=0, description="trpo: mean KL that the adapted policies move")
    cg_iterations: int = Field(10, ge=1, description="trpo: conjugate gradient iterations")
    fisher_trajectories: int | None = Field(
        None,
        ge=1,
        description="trpo: of each task and step, that the Fisher matrix is estimated from; null: "
        "all. Fewer are faster; a step's improvement and KL are judged on all",
    )
    damping: float = Field(1e-5, ge=0, description="trpo: added to the Fisher matrix's diagonal")
    backtrack: float = Field(0.8, gt=0, lt=1, description="trpo: a refused step is cut by this")
    backtracks: int = Field(15, ge=1, description="trpo: at most so many cuts; after that θ stays")
    clip: float = Field(
        0.3, gt=0, lt=1, description="promp: probability ratios count within [1 - clip, 1 + clip]"
    )
    outer_steps: int = Field(5, ge=1, description="promp: updates on the same trajectories")
    inner_kl: float = Field(
        5e-4,
        ge=0,
        description="promp: weight of the KL from the policies that collected the support "
        "trajectories",
    )

    rules = tuple(_only_of(update, name) for update, names in _OF_UPDATE.items() for name in names)


class Compute(Section):
    """How a chunk is computed, in this process or in an actor."""

    compile: Literal["auto", "always", "never"] = Field(
        "auto", description="torch.compile; auto: when the iterations to come pay for it"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "float64"] = "float32"
    threads: int | None = Field(
        None,
        ge=1,
        description="per chunk; null: one for a small model, else in process the CPUs that this "
        "process may use, in an actor cluster.cpus_per_worker",
    )


_MOST_WORKERS = 100_000


class Cluster(Section):
    """Who computes the chunks."""

    workers: Literal["auto"] | int = Field(
        "auto", description="Ray actors; 0: in process; auto: measured at the start"
    )
    cpus_per_worker: float = Field(1.0, ge=0)
    gpus_per_worker: float | None = Field(
        None,
        ge=0,
        description="0.5: two workers share a GPU; null: the GPUs that are there, shared evenly",
    )
    resources_per_worker: dict[str, float] = Field(
        default_factory=dict, description="of the cluster's own kinds, by name"
    )
    accelerator: str | None = Field(
        None, description="the kind of GPU that workers need, by Ray's name, as in A100"
    )
    labels: dict[str, str] = Field(
        default_factory=dict,
        description="of the nodes that workers may be on, as Ray selects them",
    )
    spread: bool = Field(
        False, description="over as many nodes as there are; else nodes are filled one by one"
    )
    address: str | None = Field(
        None, description="of a running Ray cluster; null: RAY_ADDRESS, else a local Ray"
    )
    chunk_timeout: float | None = Field(
        None, gt=0, description="seconds until a chunk is issued again; null: from chunks before it"
    )

    rules = (
        Rule(
            "cluster.workers",
            lambda cluster: cluster.workers != "auto" and not 0 <= cluster.workers <= _MOST_WORKERS,
            lambda cluster: (
                f"must be 'auto' or at least 0, at most {_MOST_WORKERS:,}, got "
                f"{shown(cluster.workers)}"
            ),
        ),
    )


class Evaluation(Section):
    """Validation while training, and the meta-test at the end."""

    every: int | None = Field(
        None, ge=1, description="iterations between validations; null: ten times per run"
    )
    validation_tasks: int = Field(200, ge=2, le=10**6)
    tasks: int = Field(600, ge=2, le=10**6, description="test tasks")
    steps: tuple[int, ...] | None = Field(
        None,
        description="gradient steps to report; null: 0 to inner.steps, and ten if that is fewer",
    )
    selection_step: int | None = Field(
        None, ge=0, description="step whose validation metric chooses the best; null: inner.steps"
    )
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="further meta-tests by name, as changed task settings ('K=5': {shots: 5})",
    )
    baselines: tuple[Literal["random-init", "oracle", "nearest-centroid"], ...] = ("random-init",)

    rules = (
        Rule(
            "evaluation.steps",
            lambda evaluation: evaluation.steps is not None and not _ascends(evaluation.steps),
            lambda evaluation: (
                f"must be ascending, from 0 to {_MOST_STEPS:,}, got {shown(list(evaluation.steps))}"
            ),
        ),
    )


def _ascends(steps: tuple[int, ...]) -> bool:
    """Whether there are steps, within what is possible, each larger than the one before."""
    possible = bool(steps) and min(steps) >= 0 and max(steps) <= _MOST_STEPS
    return possible and list(steps) == sorted(set(steps))


class Pretraining(Section):
    """Transfer learning instead of meta-learning (section 4.1): one network is trained on all
    training tasks without adaptation, as `outer` says; then it is fine-tuned to each test task as
    `inner` says. Distributed by Ray Train over `cluster.workers`."""

    objective: Literal["pooled", "multi-task"] = Field(
        "pooled",
        description="pooled: one output for all tasks, or one per training class; multi-task: a "
        "head for each of `tasks` training tasks on one body",
    )
    batch_size: int = Field(
        128,
        ge=1,
        le=10**6,
        description="examples per update; of multi-task, tasks with all their examples",
    )
    tasks: int = Field(100, ge=1, le=10**6, description="training tasks of multi-task")
    part_size: int = Field(
        64,
        ge=1,
        description="examples (multi-task: tasks) per forward pass: batch normalisation sees one "
        "part at a time, and workers share out parts",
    )
    report_every: int = Field(
        100, ge=1, description="iterations between records, which are also checkpoints"
    )


class Diagnostics(Section):
    """Diagnoses of whether training is healthy, plotted as health_*.png."""

    every: int | None = Field(
        None, ge=1, description="iterations between diagnoses of the meta-gradient; null: none"
    )
    tasks: int = Field(32, ge=1, le=10**6, description="validation tasks that are looked at")


class Tracking(Section):
    """The MLflow record of a run."""

    enabled: bool = True
    uri: str | None = Field(
        None, description="null: MLFLOW_TRACKING_URI, else sqlite beside the runs"
    )
    experiment: str = Field("maml", min_length=1)
    every: int | None = Field(
        None, ge=1, description="iterations per record, their means; null: at most 1,000 records"
    )
    tags: dict[str, str] = Field(default_factory=dict)


class Checkpointing(Section):
    """Which states of a run are kept, and where."""

    every: int | None = Field(
        None, ge=1, description="iterations between checkpoints; null: with every validation"
    )
    minutes: float | None = Field(
        10.0, ge=0, description="after which there is one in any case; 0 or null: only by `every`"
    )
    keep: int = Field(2, ge=1, description="newest checkpoints kept, beside the best one")
    uri: str | None = Field(
        None, description="any folder that pyarrow.fs knows (s3://...); null: in the run's folder"
    )


class Data(Section):
    """Where image stores are."""

    root: str = Field(
        default_factory=default_root,
        min_length=1,
        description="folder of the image stores, or a URI (s3://...) that every node copies them "
        "from; by default MAML_DATA_ROOT, else data",
    )
