"""Measures what reinforcement learning reaches, and what it costs.

    python benchmarks/rl.py train             every run that is not there yet (hours)
    python benchmarks/rl.py train navigation  some of them; interrupted ones go on
    python benchmarks/rl.py table             returns of the runs that are there, and their curves
    python benchmarks/rl.py variance          of the meta-gradient, by estimator
    python benchmarks/rl.py speed             navigation against one environment in a Python loop
    python benchmarks/rl.py actors            cheetahs: two actors against one

Every run is `maml train` with a shipped experiment and the overrides below, in its own folder of
`runs/rl`.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scaling import ready_actors
from trained import finished, minutes, parse, train

from pipeline.config.loading import load
from pipeline.evaluation.plot_style import COLORS, legend, new_panels, save
from pipeline.maml.flat_vector import FlatVector, flat_vector
from pipeline.rl.policies import GAUSSIAN
from pipeline.rl.rollouts import rollout
from pipeline.runs.checkpoint import load_theta
from pipeline.runs.folder import History
from pipeline.worker.chunk import ChunkComputer
from pipeline.worker.jobs import GradientJob
from pipeline.worker.learner import initial_parameters
from pipeline.worker.tree import Span
from tasks.control.navigation import Navigation
from tasks.random import task_keys

FOLDER = Path("runs/rl")
RUNS: dict[str, tuple[str, ...]] = {
    "navigation": ("navigation",),
    "navigation-pretrained": ("navigation-pretrained",),
    "navigation-first-order": ("navigation", "algorithm=fomaml"),
    "navigation-naive": ("navigation", "reinforcement.estimator=naive"),
    "navigation-dice": ("navigation", "reinforcement.estimator=dice"),
    "navigation-lambda-1": ("navigation", "reinforcement.gae_lambda=1"),
    "cheetah-direction": ("cheetah-direction",),
    "cheetah-direction-pretrained": (
        "cheetah-direction",
        "inner.steps=0",
        "evaluation.selection_step=1",
        "evaluation.baselines=[]",
        "outer.iterations=300",
    ),
}
ESTIMATORS = ("naive", "lvc", "dice")
_REPEATS, _CALLS = 12, 20


def table(names: list[str]) -> list[str]:
    """The returns after each step, of trained parameters and baselines."""
    lines = [
        "| run | who | 0 steps | 1 step | 2 steps | 3 steps | iterations | minutes of updates |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, folder, experiment, curves in finished(FOLDER, names):
        outer = experiment.outer
        cost = f"{outer.iterations:,} | {minutes(folder, outer.tasks_per_batch):.0f}"
        for curve in curves:
            if curve["who"] != "trained" and name != experiment.task.kind:
                continue  # the baselines are the same for all runs on these tasks
            pairs = zip(curve["mean"]["return"], curve["ci95"]["return"], strict=True)
            cells = " | ".join(f"{mean:.1f} ± {half:.1f}" for mean, half in pairs)
            lines.append(f"| {name} | {curve['who']} | {cells} | {cost} |")
    return lines


def variance(iterations: int = 2) -> list[str]:
    """The noise of the meta-gradient over seeds, at a random θ and at the trained one."""
    trained = FOLDER / "navigation" / "theta.safetensors"
    thetas = {"random": flat_vector(initial_parameters(load("navigation"), seed=0))}
    if trained.exists():
        thetas["trained"] = flat_vector(load_theta(trained))
    lines = [
        "| estimator | θ | noise / signal of the meta-gradient | ms per chunk of 10 tasks |",
        "|---|---|---|---|",
    ]
    for name, theta in thetas.items():
        for estimator in ESTIMATORS:
            ratio, seconds = _noise(estimator, theta, iterations)
            lines.append(f"| {estimator} | {name} | {ratio:.1f} | {1e3 * seconds:.0f} |")
    return lines


def _noise(estimator: str, theta: FlatVector, iterations: int) -> tuple[float, float]:
    """Noise over signal, and processor time per chunk in seconds."""
    found, seconds = [], 0.0
    for seed in range(_REPEATS):
        experiment = load(
            "navigation",
            [f"reinforcement.estimator={estimator}", f"seed={seed}", "compute.threads=1"],
        )
        computer = ChunkComputer(experiment, compile=False)
        computer.run(theta, GradientJob(0, Span(0, 1)))
        for iteration in range(1, iterations + 1):
            began = time.process_time()
            result = computer.run(theta, GradientJob(iteration, Span(0, 1)))
            seconds += time.process_time() - began
            assert result.gradient is not None
            found.append(result.gradient / result.num_tasks)
    gradients = np.stack(found)
    noise = float(gradients.var(0, ddof=1).sum())
    # The squared mean of a few draws contains noise, which is subtracted.
    signal = max(0.0, float((gradients.mean(0) ** 2).sum()) - noise / len(found))
    return math.sqrt(noise / signal) if signal else math.inf, seconds / len(found)


def actors(turns: int = 5) -> list[str]:
    """Time gradient jobs of cheetahs on two actors against one, in turns: environment steps/s."""
    import ray

    experiment = load("cheetah-direction", ["compute.threads=1", "cluster.cpus_per_worker=1"])
    theta = flat_vector(initial_parameters(experiment))
    task, outer = experiment.build_task(), experiment.outer
    steps = outer.tasks_per_batch * task.trajectories * task.horizon * (experiment.inner.steps + 1)
    speeds: dict[int, list[float]] = {1: [], 2: []}
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    with ready_actors(experiment, 1) as one, ready_actors(experiment, 2) as two:
        for turn in range(turns + 1):
            jobs = [GradientJob(turn, Span(chunk, chunk + 1)) for chunk in (0, 1)]
            for number, workers in ((1, one), (2, two)):
                began = time.perf_counter()
                workers.run(theta, jobs)
                speeds[number].append(steps / (time.perf_counter() - began))
    ray.shutdown()
    pairs = list(zip(speeds[1], speeds[2], strict=True))[1:]
    ratio = float(np.median([b / a for a, b in pairs]))
    single, both = (float(np.median(values)) for values in zip(*pairs, strict=True))
    return [
        "| cheetahs, environment steps/s, gradients included | one actor | two actors | ratio |",
        "|---|---|---|---|",
        f"| {steps:,} steps a round | {single:,.0f} | {both:,.0f} | {ratio:.2f}x |",
    ]


def plot_validations(path: Path) -> None:
    """Draw validation returns after one step of adaptation; a panel per kind of task."""
    kinds = ("navigation", "cheetah-direction")
    figure, grid = new_panels(11, 3.6, 1, len(kinds))
    for axes, kind in zip(grid[0], kinds, strict=True):
        there = [n for n in RUNS if n.startswith(kind) and (FOLDER / n / "metrics.jsonl").exists()]
        for name, colour in zip(there, COLORS, strict=False):
            records = History(FOLDER / name).records()
            found = [r for r in records if "validation/return_step1" in r]
            mean = np.array([r["validation/return_step1"] for r in found])
            half = np.array([r["validation/return_step1_ci95"] for r in found])
            updates = [r["iteration"] for r in found]
            label = name.removeprefix(kind).strip("-") or "as shipped"
            axes.plot(updates, mean, color=colour, marker="o", markersize=3, label=label)
            axes.fill_between(updates, mean - half, mean + half, color=colour, alpha=0.15)
        axes.set_title(kind)
        axes.set_xlabel("meta-updates")
        axes.set_ylabel("return after 1 step")
        legend(axes)
    save(figure, path, "Mean over 40 validation tasks, band: CI95.")


def speed() -> list[str]:
    """Time collecting in this process, policy included: environment steps per second."""
    torch.set_num_threads(1)
    tasks, task = 20, Navigation()
    keys = task_keys(0, "train", np.arange(tasks))
    goals = torch.from_numpy(task.parameters(keys)).float()
    policy = torch.nn.Sequential(
        torch.nn.Linear(2, 100), torch.nn.ReLU(), torch.nn.Linear(100, 100), torch.nn.ReLU()
    )
    head, log_std = torch.nn.Linear(100, 2), torch.zeros(2)

    @torch.no_grad()
    def act(observation: torch.Tensor) -> torch.Tensor:
        mean = head(policy(observation))
        return torch.cat([mean, log_std.expand_as(mean)], -1)

    def batched() -> float:
        began = time.perf_counter()
        environment = task.environment(goals, keys, task.trajectories, goals)
        noise = GAUSSIAN.noise(keys, 1, task.trajectories, task.horizon, 4).float()
        rollout(act, GAUSSIAN, environment, noise, 0, goals)
        return tasks * task.trajectories * task.horizon / (time.perf_counter() - began)

    def looped() -> float:
        environment = _gymnasium_environment(goals[0].numpy())
        steps, began = 2000, time.perf_counter()
        observation, _ = environment.reset(seed=0)
        for t in range(steps):
            prediction = act(torch.from_numpy(observation))
            mean, spread = prediction[:2], prediction[2:].exp()
            action = (mean + spread * torch.randn(2)).numpy()
            observation, _, ended, _, _ = environment.step(action)
            if ended or (t + 1) % task.horizon == 0:
                observation, _ = environment.reset()
        return steps / (time.perf_counter() - began)

    pairs = [(batched(), looped()) for _ in range(_CALLS)][1:]
    ratio = float(np.median([ours / other for ours, other in pairs]))
    ours, theirs = (float(np.median(values)) for values in zip(*pairs, strict=True))
    return [
        "| environment steps/s, policy included, one thread | | |",
        "|---|---|---|",
        "| 20 tasks x 20 trajectories at once | one gymnasium environment in a loop | ratio |",
        f"| {ours:,.0f} | {theirs:,.0f} | {ratio:.0f}x |",
    ]


def _gymnasium_environment(goal: npt.NDArray[np.float32]) -> Any:
    """The same task as an ordinary environment of gymnasium, one point at a time."""
    import gymnasium

    class Point(gymnasium.Env[npt.NDArray[np.float32], npt.NDArray[np.float32]]):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

        def reset(self, **options: Any) -> Any:
            super().reset(**options)
            self._position = np.zeros(2, np.float32)
            return self._position, {}

        def step(self, action: npt.NDArray[np.float32]) -> Any:
            self._position = self._position + 0.1 * np.clip(action, -1, 1)
            left = self._position - goal
            ended = bool((np.abs(left) < 0.01).all())
            return self._position, -float(np.linalg.norm(left)), ended, False, {}

    return Point()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments = parse(parser, ["train", "table", "variance", "speed", "actors"], RUNS)
    if arguments.what == "train":
        train(RUNS, FOLDER, arguments.names)
        return
    made = {
        "table": lambda: table(arguments.names),
        "variance": variance,
        "speed": speed,
        "actors": actors,
    }
    print("\n".join(made[arguments.what]()))
    if arguments.what == "table":
        plot_validations(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
