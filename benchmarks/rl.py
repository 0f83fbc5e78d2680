"""What reinforcement learning reaches, and what it costs.

    python benchmarks/rl.py train             every run that is not there yet (hours)
    python benchmarks/rl.py train navigation  some of them; interrupted ones go on
    python benchmarks/rl.py table             returns of the runs that are there
    python benchmarks/rl.py variance          of the meta-gradient, by estimator
    python benchmarks/rl.py speed             navigation against one environment in a Python loop

Every run is `maml train` with a shipped experiment and the overrides below, in its own folder of
`runs/rl`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from trained import minutes, train

from pipeline.chunk import ChunkComputer, GradientJob, flat_vector, initial_parameters
from pipeline.experience import rollout
from pipeline.experiments import load
from pipeline.policies import GAUSSIAN
from tasks.control.navigation import Navigation
from tasks.random import task_keys

FOLDER = Path("runs/rl")
RUNS: dict[str, tuple[str, ...]] = {
    "navigation": ("navigation",),
    "navigation-pretrained": ("navigation-pretrained",),
    "navigation-first-order": ("navigation", "algorithm=fomaml"),
    "navigation-naive": ("navigation", "reinforcement.estimator=naive"),
    "navigation-dice": ("navigation", "reinforcement.estimator=dice"),
}
ESTIMATORS = ("naive", "lvc", "dice")
_REPEATS, _CALLS = 12, 20


def table(names: list[str]) -> list[str]:
    """Returns after each step, and those of the baselines."""
    lines = [
        "| run | who | 0 steps | 1 step | 2 steps | 3 steps | iterations | minutes of updates |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        folder = FOLDER / name
        if not (folder / "results.json").exists():
            continue
        outer = load(str(folder / "config.yaml")).outer
        cost = f"{outer.iterations:,} | {minutes(folder, outer.tasks_per_batch):.0f}"
        for curve in json.loads((folder / "results.json").read_text()):
            pairs = zip(curve["mean"]["return"], curve["ci95"]["return"], strict=True)
            cells = " | ".join(f"{mean:.1f} ± {half:.1f}" for mean, half in pairs)
            lines.append(f"| {name} | {curve['who']} | {cells} | {cost} |")
    return lines


def variance(iterations: int = 2) -> list[str]:
    """Noise of the meta-gradient at θ: seeds differ, so tasks and trajectories do."""
    lines = [
        "| estimator | noise / signal of the meta-gradient | ms per chunk of 10 tasks |",
        "|---|---|---|",
    ]
    for estimator in ESTIMATORS:
        found, seconds = [], 0.0
        for seed in range(_REPEATS):
            experiment = load(
                "navigation",
                [f"reinforcement.estimator={estimator}", f"seed={seed}", "compute.threads=1"],
            )
            theta = flat_vector(initial_parameters(experiment, seed=0))
            computer = ChunkComputer(experiment, compile=False)
            computer.run(theta, GradientJob(0, 0))
            for iteration in range(1, iterations + 1):
                began = time.process_time()
                result = computer.run(theta, GradientJob(iteration, 0))
                seconds += time.process_time() - began
                assert result.gradient is not None
                found.append(result.gradient / result.num_tasks)
        gradients = np.stack(found)
        noise = float(gradients.var(0, ddof=1).sum())
        # The mean of so many draws has noise of its own.
        signal = max(0.0, float((gradients.mean(0) ** 2).sum()) - noise / len(found))
        ratio = math.sqrt(noise / signal) if signal else math.inf
        lines.append(f"| {estimator} | {ratio:.1f} | {1e3 * seconds / len(found):.0f} |")
    return lines


def speed() -> list[str]:
    """Environment steps per second of collecting, policy included, in this process."""
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
    """The same tasks as anybody would write them for gymnasium, one point at a time."""
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
    parser.add_argument("what", choices=["train", "table", "variance", "speed"])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}")
    arguments = parser.parse_args()
    names = arguments.names or list(RUNS)
    if unknown := [name for name in names if name not in RUNS]:
        parser.error(f"no run is called {', '.join(unknown)}; there are {', '.join(RUNS)}")
    if arguments.what == "train":
        train(RUNS, FOLDER, names)
        return
    made = {"table": lambda: table(names), "variance": variance, "speed": speed}
    print("\n".join(made[arguments.what]()))


if __name__ == "__main__":
    main()
