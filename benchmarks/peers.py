"""Tasks per second of this pipeline and of other ways to compute the same meta-gradient.

    python benchmarks/peers.py                                     everything (long on a CPU)
    python benchmarks/peers.py --cases sinusoid-1 sinusoid-5       the sinusoid alone
    python benchmarks/peers.py --peers ours loop --order first     first-order MAML

All peers run in one process and take turns, on the same tasks from the same parameters. Before
anything is timed, losses and meta-gradients are compared with those of a hand-written autograd loop
in float64: peers in float64 to 1e-8 (`ours` by its eager twin), and as they are timed, in float32,
losses to 1e-4 and gradients to the tolerance of the case; it is looser for images, where rounding
changes the sign of a few units in front of a ReLU. Errors are relative to the largest absolute
value. TF32 is off everywhere. Only the meta-gradient of a meta-batch is timed: no sampling, no
transfer of tasks, no outer update.

Peers: `ours` (compiled) and `ours eager`; `loop`, plain autograd, task after task; `higher` and
`torchopt`, as their documentation does MAML; `jax` with vmap over the tasks, `jax map` with task
after task, both in jit. What is not installed (extra `bench`) or fails is skipped, with its reason.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.meta_gradient import chunk_function
from pipeline.meta_loss import Objective
from pipeline.models import Conv3x3, conv4, mlp
from pipeline.parameters import Layout
from tasks.base import Classification, Examples, TaskBatch, TaskDistribution, as_tensor
from tasks.sinusoid import Sinusoid

EXACT = 1e-8  # tolerance in float64
LOSSES = 1e-4  # tolerance of losses in float32
TURN_SECONDS = 0.1  # in a turn, shorter steps are repeated
LEAST_TURNS = 3


@dataclass(frozen=True, kw_only=True)
class NoiseImages(Classification):
    """Omniglot's shapes without its content, on which speed does not depend: uniform noise."""

    shots: int = 1
    queries: int = 1
    input_shape = (1, 28, 28)
    output_size = 5

    def sample(self, seed: int, split: str, indices: Any) -> TaskBatch:
        rngs = [np.random.default_rng([seed, int(index)]) for index in indices]

        def examples(count: int) -> Examples:
            shape = (self.output_size * count, *self.input_shape)
            images = np.stack([rng.random(shape, dtype=np.float32) for rng in rngs])
            labels = torch.arange(self.output_size).repeat_interleave(count)
            return Examples(as_tensor(images), labels.repeat(len(rngs), 1))

        return TaskBatch(support=examples(self.shots), query=examples(self.queries))


class Case(NamedTuple):
    """What is computed."""

    title: str
    task: TaskDistribution
    build: Callable[..., nn.Module]
    tasks: int
    steps: int
    rate: float
    tolerance: float  # of float32 gradients


_MLP = partial(mlp, init_std=None)  # Xavier: gradients at the paper's tiny weights say little
_REGRESSION = "25 tasks, 10 support and 10 query points, MLP 1-40-40-1, inner rate 0.01"
_IMAGES = "5-way 1-shot, 28x28 uniform noise, conv4 (64 filters, stride 2), inner rate 0.1"
_FEW, _MANY = NoiseImages(queries=1), NoiseImages(queries=15)
CASES = {
    "sinusoid-1": Case(f"1 step, {_REGRESSION}", Sinusoid(), _MLP, 25, 1, 0.01, 1e-4),
    "sinusoid-5": Case(f"5 steps, {_REGRESSION}", Sinusoid(), _MLP, 25, 5, 0.01, 1e-3),
    "omniglot-1": Case(f"1 step, 32 tasks, 1 query, {_IMAGES}", _FEW, conv4, 32, 1, 0.1, 1e-2),
    "omniglot-5": Case(f"5 steps, 8 tasks, 15 queries, {_IMAGES}", _MANY, conv4, 8, 5, 0.1, 2e-2),
}


class Problem:
    """A case with parameters and tasks, on a device; the same float32 numbers in any precision.

    Parameters come in pairs: a weight, and a bias behind the normalisation if there is one.
    """

    def __init__(self, case: Case, dtype: torch.dtype, arguments: argparse.Namespace):
        torch.manual_seed(0)
        self.case, self.order = case, arguments.order
        model = case.build(case.task.input_shape, case.task.output_size)
        self.model = model.to(arguments.device, dtype)
        self.theta = {name: p.detach() for name, p in model.named_parameters()}
        self.num_tasks = arguments.tasks or case.tasks
        self.chunk = (_is_images(case) and arguments.chunk) or self.num_tasks
        batch = case.task.sample(0, "train", np.arange(self.num_tasks))
        self.batch = batch.to("cpu", torch.float32).to(arguments.device, dtype)
        # One task after the other: support x and y, query x and y.
        self.tasks = list(zip(*self.batch.support, *self.batch.query, strict=True))

    def plain_parameters(self) -> list[Tensor]:
        """In torch's own layout: our convolution weights [9·C, C_out] as [C_out, C, 3, 3]."""
        plain = {name: p.clone() for name, p in self.theta.items()}
        for name, module in self.model.named_modules():
            if isinstance(module, Conv3x3):
                kernel = plain[f"{name}.weight"].unflatten(0, (3, 3, -1))
                plain[f"{name}.weight"] = kernel.permute(3, 2, 0, 1).contiguous()
        return [p.requires_grad_() for p in plain.values()]


def _is_images(case: Case) -> bool:
    return isinstance(case.task, NoiseImages)


Step = Callable[[], tuple[Any, list[Any]]]
"""() -> (query loss of every task, gradient sum over the tasks by parameter); this is timed."""


def ours(problem: Problem, *, compile: bool) -> Step:
    """The pipeline, in chunks as in training."""
    case, batch = problem.case, problem.batch
    layout = Layout.of(problem.theta)
    theta = layout.join(problem.theta)
    alpha = torch.tensor(case.rate, dtype=problem.dtype, device=problem.device)
    function = chunk_function(
        Objective(problem.model, case.task),
        layout,
        steps=case.steps,
        order=problem.order,
        compile=compile,
    )
    size = problem.chunk or problem.num_tasks
    chunks = [
        TaskBatch(*(Examples(*(t[first : first + size] for t in part)) for part in batch))
        for first in range(0, problem.num_tasks, size)
    ]

    def step() -> tuple[Tensor, list[Tensor]]:
        results = [function(theta, chunk, alpha) for chunk in chunks]
        gradient = results[0][0]
        for part, _ in results[1:]:
            gradient = gradient + part
        return torch.cat([metrics["query_loss"] for _, metrics in results]), [gradient]

    return step


def predict(parameters: list[Tensor], x: Tensor) -> Tensor:
    """Both networks as functions of their parameters, as one writes them by hand."""
    for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
        if x.dim() == 4:
            x = F.conv2d(x, weight, stride=2, padding=1)
            x = F.relu(F.batch_norm(x, None, None, training=True) + bias[:, None, None])
        else:
            x = F.relu(F.linear(x, weight, bias))
    return F.linear(x.mean((2, 3)) if x.dim() == 4 else x, *parameters[-2:])


def loop(problem: Problem) -> Step:
    """The definition, one task after the other; first order by inner gradients as constants."""
    loss, rate = problem.case.task.loss, problem.case.rate
    theta = problem.plain_parameters()
    second = problem.order == "second"

    def step() -> tuple[Tensor, list[Tensor]]:
        losses, total = [], [torch.zeros_like(p) for p in theta]
        for support_x, support_y, query_x, query_y in problem.tasks:
            adapted = theta
            for _ in range(problem.case.steps):
                value = loss(predict(adapted, support_x), support_y)
                gradients = torch.autograd.grad(value, adapted, create_graph=second)
                adapted = [p - rate * g for p, g in zip(adapted, gradients, strict=True)]
            value = loss(predict(adapted, query_x), query_y)
            for part, gradient in zip(total, torch.autograd.grad(value, theta), strict=True):
                part += gradient
            losses.append(value.detach())
        return torch.stack(losses), total

    return step


class Plain(nn.Module):
    """The network as a module, for libraries that adapt modules."""

    def __init__(self, parameters: list[Tensor]):
        super().__init__()
        self.names = [f"p{i}" for i in range(len(parameters))]
        for name, p in zip(self.names, parameters, strict=True):
            self.register_parameter(name, nn.Parameter(p.detach()))

    def forward(self, x: Tensor) -> Tensor:
        return predict([getattr(self, name) for name in self.names], x)


def higher(problem: Problem) -> Step:
    """As in the MAML example of higher: one differentiable optimiser per task."""
    import higher as library

    loss, module = problem.case.task.loss, Plain(problem.plain_parameters())
    optimiser = torch.optim.SGD(module.parameters(), lr=problem.case.rate)

    def step() -> tuple[Tensor, list[Tensor]]:
        losses = []
        module.zero_grad()
        for support_x, support_y, query_x, query_y in problem.tasks:
            with library.innerloop_ctx(
                module, optimiser, copy_initial_weights=False, track_higher_grads=True
            ) as (adapted, inner):
                for _ in range(problem.case.steps):
                    inner.step(loss(adapted(support_x), support_y))
                value = loss(adapted(query_x), query_y)
                losses.append(value.detach())
                value.backward()
        return torch.stack(losses), [p.grad for p in module.parameters()]

    return step


def torchopt(problem: Problem) -> Step:
    """As in the MAML example of TorchOpt: adapt in place, go back, next task."""
    import torchopt as library

    loss, module = problem.case.task.loss, Plain(problem.plain_parameters())
    parameters = list(module.parameters())
    inner = library.MetaSGD(module, lr=problem.case.rate)

    def step() -> tuple[Tensor, list[Tensor]]:
        losses = []
        module.zero_grad()
        before = library.extract_state_dict(module, by="reference")
        inner_before = library.extract_state_dict(inner, by="reference")
        for support_x, support_y, query_x, query_y in problem.tasks:
            for _ in range(problem.case.steps):
                inner.step(loss(module(support_x), support_y))
            value = loss(module(query_x), query_y)
            losses.append(value.detach())
            value.backward()
            library.recover_state_dict(module, before)
            library.recover_state_dict(inner, inner_before)
        return torch.stack(losses), [p.grad for p in parameters]

    return step


def jax(problem: Problem, *, vmap: bool) -> Step:
    """jit(grad) of the inner loop, channels last, on JAX's default backend."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU is shared with torch
    import jax as library
    from jax import lax
    from jax import numpy as jnp

    library.config.update("jax_enable_x64", True)  # allows float64, changes no float32
    library.config.update("jax_default_matmul_precision", "highest")
    rate, steps = problem.case.rate, problem.case.steps

    def placed(tensor: Tensor) -> Any:
        if tensor.dim() == 5:
            tensor = tensor.permute(0, 1, 3, 4, 2)  # channels last
        return jnp.asarray(tensor.cpu().numpy())

    def predict(parameters: list[Any], x: Any) -> Any:
        for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
            if x.ndim == 4:
                kernel = weight.reshape(3, 3, -1, weight.shape[-1])
                padding, layout = ((1, 1), (1, 1)), ("NHWC", "HWIO", "NHWC")
                x = lax.conv_general_dilated(x, kernel, (2, 2), padding, dimension_numbers=layout)
                x = x - x.mean((0, 1, 2))
                x = x * lax.rsqrt((x * x).mean((0, 1, 2)) + 1e-5) + bias
            else:
                x = x @ weight.T + bias
            x = library.nn.relu(x)
        return (x.mean((1, 2)) if x.ndim == 4 else x) @ parameters[-2].T + parameters[-1]

    def loss(parameters: list[Any], x: Any, y: Any) -> Any:
        prediction = predict(parameters, x)
        if jnp.issubdtype(y.dtype, jnp.integer):
            return -library.nn.log_softmax(prediction)[jnp.arange(len(y)), y].mean()
        return jnp.square(prediction - y).mean()

    def query_loss(parameters: list[Any], task: tuple[Any, ...]) -> Any:
        support_x, support_y, query_x, query_y = task
        adapted = parameters
        for _ in range(steps):
            gradients = library.grad(loss)(adapted, support_x, support_y)
            adapted = [p - rate * g for p, g in zip(adapted, gradients, strict=True)]
        return loss(adapted, query_x, query_y)

    def total(parameters: list[Any], tasks: tuple[Any, ...]) -> tuple[Any, Any]:
        one = partial(query_loss, parameters)
        losses = library.vmap(one)(tasks) if vmap else lax.map(one, tasks)
        return losses.sum(), losses

    gradient = library.jit(library.value_and_grad(total, has_aux=True))
    theta = [placed(p) for p in problem.theta.values()]
    tasks = tuple(map(placed, (*problem.batch.support, *problem.batch.query)))

    def step() -> tuple[Any, list[Any]]:
        (_, losses), gradients = library.block_until_ready(gradient(theta, tasks))
        return losses, gradients

    return step


PEERS: dict[str, Callable[[Problem], Step]] = {
    "ours": partial(ours, compile=True),
    "ours eager": partial(ours, compile=False),
    "loop": loop,
    "higher": higher,
    "torchopt": torchopt,
    "jax": partial(jax, vmap=True),
    "jax map": partial(jax, vmap=False),
}
FIRST_ORDER = ("ours", "ours eager", "loop")


def flat(result: tuple[Any, list[Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Losses [B] and gradient [D] in the order of our flat vector."""

    def ravelled(gradient: Any) -> np.ndarray:
        array = gradient.cpu().numpy() if isinstance(gradient, Tensor) else np.asarray(gradient)
        return (array.transpose(2, 3, 1, 0) if array.ndim == 4 else array).ravel()

    losses, gradients = result
    return ravelled(losses), np.concatenate([ravelled(g) for g in gradients])


def errors(result: tuple[Any, list[Any]], reference: Any, dtype: torch.dtype) -> list[float]:
    """Of losses and gradient, relative to the largest absolute value."""
    pairs = list(zip(flat(result), reference, strict=True))
    for value, expected in pairs:
        if value.shape != expected.shape or str(value.dtype) != str(dtype).removeprefix("torch."):
            raise ValueError(f"computed {value.dtype}{list(value.shape)}")
    return [float(abs(v - expected).max() / abs(expected).max()) for v, expected in pairs]


@contextlib.contextmanager
def compilation_must_succeed() -> Iterator[None]:
    """Turns the pipeline's warning that it runs eagerly instead into an error."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("pipeline.compilation")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    if messages:
        raise RuntimeError(messages[0])


@dataclass
class Racer:
    """A peer that computes what it should, and its times by turn."""

    name: str
    step: Step
    synchronise: Callable[[], None]
    first_call: float
    errors: list[float]
    steps_per_turn: int = 1
    seconds: dict[int, float] = field(default_factory=dict)
    """Per step."""
    spent: float = 0.0

    def take(self, turn: int, steps: int) -> None:
        """Time a few steps; short ones after one that brings caches and threads back."""
        started = time.perf_counter()
        if steps > 1:
            self.timed_step()
        self.seconds[turn] = statistics.mean(self.timed_step() for _ in range(steps))
        self.spent += time.perf_counter() - started

    def timed_step(self) -> float:
        started = time.perf_counter()
        self.step()
        self.synchronise()
        return time.perf_counter() - started


def enter(
    name: str, reference: Any, case: Case, arguments: argparse.Namespace, synchronise: Any
) -> Racer:
    """Build a peer and check what it computes; raises where that is wrong."""
    if name != "ours":
        exact = PEERS[name](Problem(case, torch.float64, arguments))
        worst = max(errors(exact(), reference, torch.float64))
        if not worst <= EXACT:
            raise ValueError(f"wrong result: error {worst:.1e} in float64")
    step = PEERS[name](Problem(case, torch.float32, arguments))
    started = time.perf_counter()
    with compilation_must_succeed():
        result = step()
    synchronise()
    first_call = time.perf_counter() - started
    of_losses, of_gradient = errors(result, reference, torch.float32)
    if not (of_losses <= LOSSES and of_gradient <= case.tolerance):
        raise ValueError(f"wrong result: errors {of_losses:.1e}, {of_gradient:.1e} in float32")
    racer = Racer(name, step, synchronise, first_call, [of_losses, of_gradient])
    racer.steps_per_turn = max(1, round(TURN_SECONDS / racer.timed_step()))
    return racer


def race(name: str, case: Case, arguments: argparse.Namespace) -> list[str]:
    """All peers on one case; the lines of its report."""
    synchronise = torch.cuda.synchronize if arguments.device == "cuda" else lambda: None
    reference = flat(loop(Problem(case, torch.float64, arguments))())
    racers, skipped = [], []
    for peer in arguments.peers:
        progress(f"{name}: {peer}: checking")
        try:
            racers.append(enter(peer, reference, case, arguments, synchronise))
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            progress(f"{name}: {peer}: skipped, {reason}")
            skipped.append(f"- {peer} skipped: {reason}")
    for turn in range(arguments.repeats):
        for racer in racers:
            if racer.spent < arguments.seconds or turn < LEAST_TURNS:
                racer.take(turn, racer.steps_per_turn)
        progress(f"{name}: turn {turn + 1} of {arguments.repeats}")
    size = "" if arguments.tasks is None else f", reduced to {arguments.tasks} tasks"
    chunk = arguments.chunk if isinstance(case.task, NoiseImages) else 0
    lines = [
        f"### {name}\n",
        f"{case.title}{size}; {arguments.order} order; ours in chunks of {chunk or 'all'} tasks.",
        f"Checked in float32 to {LOSSES:.0e} (losses) and {case.tolerance:.0e} (gradients).\n",
        "| peer | tasks/s (median) | p10 - p90 | ours / peer | first call, s | errors | turns |",
        "|---|---|---|---|---|---|---|",
        *(row(racer, racers[0], arguments.tasks or case.tasks) for racer in racers),
    ]
    return [*lines, *(["", *skipped] if skipped else []), ""]


def row(racer: Racer, first: Racer, num_tasks: int) -> str:
    """The ratio is the median over the turns that both took."""
    rates = [num_tasks / seconds for seconds in racer.seconds.values()]
    low, high = np.quantile(rates, [0.1, 0.9])
    ratio = "-"
    if first.name.startswith("ours"):
        both = [seconds / first.seconds[t] for t, seconds in racer.seconds.items()]
        ratio = f"{statistics.median(both):.2f}x"
    return (
        f"| {racer.name} | {statistics.median(rates):,.1f} | {low:,.1f} - {high:,.1f} | {ratio} | "
        f"{racer.first_call:.1f} | {racer.errors[0]:.0e}, {racer.errors[1]:.0e} | {len(rates)} |"
    )


def progress(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def hardware(device: str, threads: int) -> str:
    """What the numbers were measured on, and when."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        model = next((x.split(":")[1].strip() for x in file if x.startswith("model name")), model)
    versions = []
    for library in ("torch", "numpy", "higher", "torchopt", "jax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{library} {importlib.metadata.version(library)}")
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    return (
        f"{datetime.date.today()}: {gpu}{model}, {os.cpu_count()} cores, {threads} threads; "
        f"Python {platform.python_version()}, {', '.join(versions)}"
    )


def use_threads(threads: int | None) -> int:
    """Give every library as many threads; XLA has no setting but the cores that it may use."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    threads = threads or len(allowed) or os.cpu_count() or 1
    if threads < len(allowed):
        os.sched_setaffinity(0, allowed[:threads])
    torch.set_num_threads(threads)
    return threads


def main() -> None:
    """Print a table per case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of torch's peers")
    parser.add_argument("--cases", nargs="+", choices=cases(), default=list(cases()))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--order", choices=["second", "first"], default="second")
    parser.add_argument("--repeats", type=int, default=21, help="turns of every peer")
    parser.add_argument("--seconds", type=float, default=60, help="budget per peer and case")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--chunk", type=int, default=8, help="of images, for ours; 0: whole")
    parser.add_argument("--tasks", type=int, help="per meta-batch, instead of the case's")
    parser.add_argument("--no-compile", action="store_true", help="leave out `ours`")
    parser.add_argument("--warm-cache", action="store_true", help="use inductor's usual cache")
    arguments = parser.parse_args()
    first_order = FIRST_ORDER if arguments.order == "first" else PEERS
    peers = [name for name in PEERS if name in arguments.peers and name in first_order]
    arguments.peers = [name for name in peers if not (arguments.no_compile and name == "ours")]
    threads = use_threads(arguments.threads)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    with tempfile.TemporaryDirectory() as cache:
        if not arguments.warm_cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        print(hardware(arguments.device, threads), flush=True)
        print("First calls compile, with a", "warm" if arguments.warm_cache else "cold", "cache.\n")
        for name in arguments.cases:
            print(*race(name, cases()[name], arguments), sep="\n", flush=True)


if __name__ == "__main__":
    main()
