"""Measures tasks per second, of this pipeline and of other ways to the same meta-gradient.

    python benchmarks/peers.py                                     everything (long on a CPU)
    python benchmarks/peers.py --cases sinusoid-1 sinusoid-5       the sinusoid alone
    python benchmarks/peers.py --peers ours loop --order first     first-order MAML

All peers take turns in one process, on the same tasks from the same parameters. First, losses and
meta-gradients are compared with a hand-written autograd loop in float64: those of peers in float64
to 1e-8 (`ours` by its eager twin), and in float32, as timed, losses to 1e-3 and gradients to the
case's tolerance; it is loose for images, where rounding flips a few ReLUs. Errors are relative to
the largest absolute value, TF32 is off. Only the meta-gradient of a meta-batch is timed, with the
tasks on the device: no sampling, no outer update.

Peers: `ours` (compiled) and `ours eager`; `loop`, plain autograd, task after task; `higher` and
`torchopt`, as their documentation does MAML; `jax` with vmap over the tasks, `jax map` with task
after task, both in jit. What is not installed (extra `bench`) or fails is skipped, with its reason.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from memory import NoiseImages, compilation_must_succeed, hardware, use_threads
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.maml.adaptation import Adaptation
from pipeline.maml.flat_vector import Layout
from pipeline.maml.meta_gradient import Knobs, chunk_function
from pipeline.maml.meta_loss import Objective
from pipeline.maml.models import Conv3x3, conv4, mlp
from tasks.base import Examples, TaskBatch, TaskDistribution
from tasks.sinusoid import Sinusoid

EXACT, LOSSES = 1e-8, 1e-3  # tolerances: of everything in float64, of losses in float32
TURN_SECONDS = 0.1  # in a turn, shorter steps are repeated


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
_POINTS = "10 support and 10 query points, MLP 1-40-40-1"
_IMAGES = "5-way 1-shot, 28x28 uniform noise, conv4 (64 filters, stride 2), queries per class: "
CASES = {
    "sinusoid-1": Case(_POINTS, Sinusoid(), _MLP, 25, 1, 0.01, 1e-4),
    "sinusoid-5": Case(_POINTS, Sinusoid(), _MLP, 25, 5, 0.01, 1e-3),
    "omniglot-1": Case(_IMAGES + "1", NoiseImages(queries=1), conv4, 32, 1, 0.1, 1e-1),
    "omniglot-5": Case(_IMAGES + "15", NoiseImages(queries=15), conv4, 8, 5, 0.1, 1e-1),
}


class Problem:
    """A case with parameters and tasks, on a device; the same float32 numbers in any precision."""

    def __init__(self, case: Case, dtype: torch.dtype, arguments: argparse.Namespace):
        torch.manual_seed(0)
        self.case, self.order = case, arguments.order
        model = case.build(case.task.input_shape, case.task.output_size)
        self.model = model.to(arguments.device, dtype)
        self.theta = {name: p.detach() for name, p in model.named_parameters()}
        self.num_tasks = arguments.tasks or case.tasks
        self.chunk = (isinstance(case.task, NoiseImages) and arguments.chunk) or self.num_tasks
        batch = case.task.sample(0, "train", np.arange(self.num_tasks))
        self.batch = batch.to("cpu", torch.float32).to(arguments.device, dtype)
        # One after the other: (support, query).
        self.tasks = list(zip(*(map(Examples, *part) for part in self.batch), strict=True))

    def plain_parameters(self) -> list[Tensor]:
        """In torch's own layout: our convolution weights [9·C, C_out] as [C_out, C, 3, 3]."""
        plain = {name: p.clone() for name, p in self.theta.items()}
        for name, module in self.model.named_modules():
            if isinstance(module, Conv3x3):
                kernel = plain[f"{name}.weight"].unflatten(0, (3, 3, -1))
                plain[f"{name}.weight"] = kernel.permute(3, 2, 0, 1).contiguous()
        return [p.requires_grad_() for p in plain.values()]


Step = Callable[[], tuple[Any, list[Any]]]
"""() -> (query loss of every task, gradient sum over the tasks by parameter); this is timed."""


def ours(problem: Problem, *, compile: bool) -> Step:
    """The pipeline, in chunks as in training."""
    case, size = problem.case, problem.chunk
    layout = Layout.of(problem.theta)
    theta = layout.join(problem.theta)
    knobs = Knobs(theta.new_tensor(case.rate))
    adaptation = Adaptation.of(problem.model, steps=case.steps)
    objective = Objective(problem.model, case.task)
    function = chunk_function(objective, adaptation, layout, order=problem.order, compile=compile)
    chunks = [
        TaskBatch(*(Examples(*(t[first : first + size] for t in part)) for part in problem.batch))
        for first in range(0, problem.num_tasks, size)
    ]

    def step() -> tuple[Tensor, list[Tensor]]:
        gradients, metrics = zip(*(function(theta, chunk, knobs) for chunk in chunks), strict=True)
        return torch.cat([m["query_loss"] for m in metrics]), [reduce(torch.add, gradients)]

    return step


def predict(parameters: list[Tensor], x: Tensor) -> Tensor:
    """Both networks by hand; parameters are pairs: weight, and bias (after the norm if any)."""
    for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
        if x.dim() == 4:
            x = F.conv2d(x, weight, stride=2, padding=1)
            x = F.relu(F.batch_norm(x, None, None, training=True) + bias[:, None, None])
        else:
            x = F.relu(F.linear(x, weight, bias))
    return F.linear(x.mean((2, 3)) if x.dim() == 4 else x, *parameters[-2:])


def one_by_one(problem: Problem, theta: list[Tensor], query_loss: Callable[..., Tensor]) -> Step:
    """Query loss and meta-gradient of one task, then of the next: no graph but one task's."""

    def step() -> tuple[Tensor, list[Tensor]]:
        losses, total = [], [torch.zeros_like(p) for p in theta]
        for task in problem.tasks:
            value = query_loss(*task)
            for part, gradient in zip(total, torch.autograd.grad(value, theta), strict=True):
                part += gradient
            losses.append(value.detach())
        return torch.stack(losses), total

    return step


def loop(problem: Problem) -> Step:
    """The definition; first order by taking the inner gradients for constants."""
    loss, rate = problem.case.task.loss, problem.case.rate
    theta, second = problem.plain_parameters(), problem.order == "second"

    def query_loss(support: Examples, query: Examples) -> Tensor:
        adapted = theta
        for _ in range(problem.case.steps):
            value = loss(predict(adapted, support.x), support.y)
            gradients = torch.autograd.grad(value, adapted, create_graph=second)
            adapted = [p - rate * g for p, g in zip(adapted, gradients, strict=True)]
        return loss(predict(adapted, query.x), query.y)

    return one_by_one(problem, theta, query_loss)


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
    sgd = torch.optim.SGD(module.parameters(), lr=problem.case.rate)
    context = partial(library.innerloop_ctx, copy_initial_weights=False, track_higher_grads=True)

    def query_loss(support: Examples, query: Examples) -> Tensor:
        with context(module, sgd) as (adapted, inner):
            for _ in range(problem.case.steps):
                inner.step(loss(adapted(support.x), support.y))
            return loss(adapted(query.x), query.y)

    return one_by_one(problem, list(module.parameters()), query_loss)


def torchopt(problem: Problem) -> Step:
    """As in the MAML example of TorchOpt: go back to θ, adapt the module in place."""
    import torchopt as library

    loss, module = problem.case.task.loss, Plain(problem.plain_parameters())
    inner = library.MetaSGD(module, lr=problem.case.rate)
    theta, state = (library.extract_state_dict(x, by="reference") for x in (module, inner))

    def query_loss(support: Examples, query: Examples) -> Tensor:
        library.recover_state_dict(module, theta)
        library.recover_state_dict(inner, state)
        for _ in range(problem.case.steps):
            inner.step(loss(module(support.x), support.y))
        return loss(module(query.x), query.y)

    return one_by_one(problem, list(module.parameters()), query_loss)


def jax(problem: Problem, *, vmap: bool) -> Step:
    """jit(grad) of the inner loop, channels last, on JAX's default backend."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU is shared with torch
    import jax as library

    lax, jnp = library.lax, library.numpy
    library.config.update("jax_enable_x64", True)  # allows float64, changes no float32
    library.config.update("jax_default_matmul_precision", "highest")

    def placed(tensor: Tensor) -> Any:
        tensor = tensor.permute(0, 1, 3, 4, 2) if tensor.dim() == 5 else tensor  # channels last
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
        (support_x, support_y, query_x, query_y), adapted = task, parameters
        for _ in range(problem.case.steps):
            gradients = library.grad(loss)(adapted, support_x, support_y)
            adapted = [p - problem.case.rate * g for p, g in zip(adapted, gradients, strict=True)]
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
    **{"loop": loop, "higher": higher, "torchopt": torchopt},
    "jax": partial(jax, vmap=True),
    "jax map": partial(jax, vmap=False),
}


def flat(result: tuple[Any, list[Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Losses [B] and gradient [D] in the order of our flat vector."""
    arrays = [t.cpu().numpy() if isinstance(t, Tensor) else t for t in (result[0], *result[1])]
    losses, *gradients = [a.transpose(2, 3, 1, 0) if a.ndim == 4 else a for a in arrays]
    return np.asarray(losses), np.concatenate([np.ravel(g) for g in gradients])


def check(result: Any, reference: Any, dtype: str, tolerances: tuple[float, float]) -> list[float]:
    """Errors of losses and gradient, relative to the largest absolute value; raises if large."""
    pairs = list(zip(flat(result), reference, strict=True))
    assert all(value.dtype == dtype for value, _ in pairs), f"not computed in {dtype}"
    errors = [float(abs(value - right).max() / abs(right).max()) for value, right in pairs]
    if not all(error <= limit for error, limit in zip(errors, tolerances, strict=True)):
        raise ValueError(f"wrong in {dtype}: errors {errors[0]:.1e}, {errors[1]:.1e}")
    return errors


@dataclass
class Racer:
    """A peer that computes what it should, and how long its steps take."""

    name: str
    timed_step: Callable[[], float]
    first_call: float
    errors: list[float]
    steps: int  # in a turn
    seconds: dict[int, float] = field(default_factory=dict)  # of a step, by turn


def enter(name: str, reference: Any, case: Case, arguments: argparse.Namespace) -> Racer:
    """Build a peer and check what it computes; raises where that is wrong."""
    if name != "ours":
        exact = PEERS[name](Problem(case, torch.float64, arguments))
        check(exact(), reference, "float64", (EXACT, EXACT))
    step = PEERS[name](Problem(case, torch.float32, arguments))

    def timed_step() -> float:
        started = time.perf_counter()
        step()
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    with compilation_must_succeed():
        first_call = timed_step()
    errors = check(step(), reference, "float32", (LOSSES, case.tolerance))
    return Racer(name, timed_step, first_call, errors, max(1, round(TURN_SECONDS / timed_step())))


def race(name: str, arguments: argparse.Namespace) -> list[str]:
    """All peers on one case; the lines of its report."""
    case = CASES[name]
    reference = flat(loop(Problem(case, torch.float64, arguments))())
    racers, skipped = [], []
    for peer in arguments.peers:
        print(f"{name}: checking {peer}", file=sys.stderr, flush=True)
        try:
            racers.append(enter(peer, reference, case, arguments))
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            skipped.append(f"- {peer} skipped: {reason}")
    for turn in range(arguments.repeats):
        print(f"{name}: turn {turn + 1} of {arguments.repeats}", file=sys.stderr, flush=True)
        for racer in racers:
            spent = racer.steps * sum(racer.seconds.values())
            if turn >= 3 and spent > arguments.seconds:
                continue
            if racer.steps > 1:  # the others' turns have emptied the caches
                racer.timed_step()
            racer.seconds[turn] = statistics.mean(racer.timed_step() for _ in range(racer.steps))
    num_tasks = len(reference[0])
    on = f", jax on {sys.modules['jax'].default_backend()}" if "jax" in sys.modules else ""
    return [
        f"### {name}\n\n{num_tasks} tasks, inner steps: {case.steps} of {case.rate}, {case.title}; "
        f"{arguments.order} order{on}; tolerance of float32 gradients {case.tolerance:.0e}.\n",
        "| peer | tasks/s (median) | p10 - p90 | ours / peer | first call, s | errors | turns |",
        "|---|---|---|---|---|---|---|",
        *(row(racer, racers[0], num_tasks) for racer in racers),
        *([""] * bool(skipped) + skipped),
        "",
    ]


def row(racer: Racer, first: Racer, num_tasks: int) -> str:
    """The ratio is a median over the turns that both took."""
    rates = [num_tasks / seconds for seconds in racer.seconds.values()]
    low, high = np.quantile(rates, [0.1, 0.9])
    ratios = [racer.seconds[t] / first.seconds[t] for t in racer.seconds if t in first.seconds]
    ratio = f"{statistics.median(ratios):.2f}x" if first.name.startswith("ours") else ""
    return (
        f"| {racer.name} | {statistics.median(rates):,.1f} | {low:,.1f} - {high:,.1f} | {ratio} | "
        f"{racer.first_call:.1f} | {racer.errors[0]:.0e}, {racer.errors[1]:.0e} | {len(rates)} |"
    )


def main() -> None:
    """Print a table per case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of all but jax")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--order", choices=["second", "first"], default="second")
    parser.add_argument("--repeats", type=int, default=21, help="turns of every peer")
    parser.add_argument("--seconds", type=float, default=60, help="budget, from turn 4 on")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--chunk", type=int, default=8, help="of images, for ours; 0: whole")
    parser.add_argument("--tasks", type=int, help="in the meta-batch, instead of the case's")
    arguments = parser.parse_args()
    able = {"ours", "ours eager", "loop"} if arguments.order == "first" else {*PEERS}
    arguments.peers = [name for name in PEERS if name in able.intersection(arguments.peers)]
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # empty: first calls compile
        threads, libraries = use_threads(arguments.threads), ("torch", "higher", "torchopt", "jax")
        print(hardware(arguments.device, threads, *libraries))
        print("Ours: images in chunks of", arguments.chunk or "all", "tasks.\n", flush=True)
        for name in arguments.cases:
            print(*race(name, arguments), sep="\n", flush=True)


if __name__ == "__main__":
    main()
