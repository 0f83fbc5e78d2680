"""2D navigation against the obvious one-point-at-a-time environment; tasks as pure functions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.rl.policies import GAUSSIAN
from pipeline.rl.rollouts import expert_returns, rollout
from tasks.control.mdp import Trajectories
from tasks.control.navigation import Navigation
from tasks.random import task_keys

LIKE = torch.zeros(0, dtype=torch.float64)


def acted(
    task: Navigation, indices: list[int], spread: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Actions, rewards and mask of a policy that draws from N(0.3, spread²)."""
    keys = task_keys(0, "train", indices)
    goals = torch.from_numpy(task.parameters(keys))
    noise = GAUSSIAN.noise(keys, 7, task.trajectories, task.horizon, 4)
    prediction = torch.tensor([0.3, 0.3, math.log(spread), math.log(spread)], dtype=torch.float64)
    past = rollout(
        lambda o: prediction.expand(*o.shape[:-1], 4),
        GAUSSIAN,
        task.environment(goals, keys, task.trajectories, LIKE),
        noise,
        0,
        goals,
    )
    return past.actions, past.rewards, past.mask


def test_it_is_the_scalar_environment() -> None:
    task = Navigation(trajectories=4, horizon=60, goal_range=0.15)
    indices = list(range(30))
    actions, rewards, mask = acted(task, indices, spread=0.4)
    goals = task.parameters(task_keys(0, "train", indices))
    ended_early = 0
    for i, (goal_x, goal_y) in enumerate(goals):
        for n in range(4):
            x = y = 0.0
            ended = False
            for t in range(60):
                assert bool(mask[i, n, t]) is not ended
                if ended:
                    assert float(rewards[i, n, t]) == 0
                    continue
                right, up = (float(a) for a in actions[i, n, t])
                x += 0.1 * min(max(right, -1.0), 1.0)
                y += 0.1 * min(max(up, -1.0), 1.0)
                expected = -math.hypot(x - goal_x, y - goal_y)
                assert float(rewards[i, n, t]) == pytest.approx(expected, rel=1e-12)
                ended = abs(x - goal_x) < 0.01 and abs(y - goal_y) < 0.01
            ended_early += ended
    assert ended_early > 0


def test_a_task_does_not_depend_on_its_neighbours() -> None:
    task = Navigation(trajectories=3, horizon=20)
    together, alone = acted(task, [5, 6, 7, 8]), acted(task, [7])
    for all_of_them, one in zip(together, alone, strict=True):
        assert torch.equal(all_of_them[2:3], one)


def test_goals_fill_the_square() -> None:
    goals = Navigation().parameters(task_keys(0, "train", np.arange(4000)))
    assert np.abs(goals).max() <= 0.5
    assert np.abs(goals.mean(0)).max() < 0.02
    assert goals.std(0) == pytest.approx(1 / math.sqrt(12), rel=0.03)
    test = Navigation().parameters(task_keys(0, "test", np.arange(4000)))
    assert not set(map(tuple, goals)) & set(map(tuple, test))


def test_the_expert_gets_to_the_goal_as_fast_as_can_be() -> None:
    task = Navigation(trajectories=2)
    keys = task_keys(0, "test", np.arange(50))
    goals = task.parameters(keys)
    measured = expert_returns(task, keys, LIKE)
    for (x, y), value in zip(goals, measured, strict=True):
        left = [
            math.hypot(*(max(0.0, abs(side) - 0.1 * (t + 1)) for side in (x, y)))
            for t in range(100)
        ]
        assert float(value) == pytest.approx(-sum(left), abs=1e-9)


def test_positions_lead_from_the_start_to_the_last_step() -> None:
    task = Navigation(trajectories=3, horizon=4)
    keys = task_keys(0, "test", [0])
    environment = task.environment(torch.zeros(1, 2), keys, 3, torch.zeros(()))
    seen, actions = [environment.reset(0)], []
    for step in range(4):
        actions.append(torch.linspace(-2 + step, 0.5, 6).reshape(1, 3, 2))  # some are clipped
        seen.append(environment.step(actions[-1]).observation)
    observations, acted = torch.stack(seen[:-1], 2)[0], torch.stack(actions, 2)[0]
    unused = torch.zeros(3, 4)
    past = Trajectories(observations, acted, acted, unused, unused, unused, torch.zeros(2))
    assert torch.equal(task.positions(past), torch.stack(seen, 2)[0])
