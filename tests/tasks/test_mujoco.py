"""Robots of MuJoCo, and gymnasium environments of a user's own."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.components import build_task, kinds
from pipeline.config.loading import ConfigError, from_dict, load
from pipeline.evaluation.meta_test import check_tasks
from pipeline.evaluation.run_report import write_video
from pipeline.maml.flat_vector import flat_vector
from pipeline.rl.policies import distribution_of
from pipeline.rl.rollouts import rollout
from pipeline.training.loop import train
from pipeline.worker.chunk import ChunkComputer
from pipeline.worker.learner import initial_parameters
from tasks.control import gym
from tasks.control.mdp import MDPs, Trajectories
from tasks.random import task_keys
from tests.conftest import experiment_of

gymnasium: Any = pytest.importorskip("gymnasium", reason="needs the extra mujoco")
pytest.importorskip("mujoco", reason="needs the extra mujoco")

from gymnasium.spaces import Box, Discrete  # noqa: E402
from gymnasium.utils.env_checker import check_env  # noqa: E402

from tests.point_mass import PointMass  # noqa: E402
from tests.readme import blocks  # noqa: E402

UNBOUNDED = pytest.mark.filterwarnings("ignore:.*infinity")  # as gymnasium's own robots
LIKE = torch.zeros(0, dtype=torch.float64)
ROBOTS = [kind for kind in kinds("task") if kind.startswith(("cheetah", "ant"))]
MINE: dict[str, Any] = {"make": "tests.point_mass:PointMass", "ranges": {"goal": [-1, 1]}}
POINT_MASS = {"kind": "gymnasium", **MINE}


def task_of(kind: str, **settings: Any) -> Any:
    return build_task(kind, settings, "")


def acted(task: MDPs, indices: list[int], trajectories: int = 3, episode: int = 0) -> Trajectories:
    """What a policy that knows nothing does."""
    keys = task_keys(0, "train", indices)
    parameters = torch.from_numpy(task.parameters(keys))
    distribution = distribution_of(task.actions)
    noise = distribution.noise(keys, 7, trajectories, task.horizon, task.output_size)
    environment = task.environment(parameters, keys, trajectories, LIKE)
    try:
        return rollout(
            lambda o: torch.zeros(*o.shape[:-1], task.output_size, dtype=o.dtype),
            distribution,
            environment,
            noise,
            episode,
            parameters,
        )
    finally:
        environment.close()


class Only(gymnasium.Env):
    """One robot, as gymnasium's checker wants it."""

    def __init__(self, task: Any):
        self.many = task.environment(torch.ones(1, 1), task_keys(0, "train", [0]), 1, LIKE)._vector
        self.observation_space = self.many.single_observation_space
        self.action_space = self.many.single_action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        observation, info = self.many.reset(seed=[int(self.np_random.integers(2**32))])
        return observation[0], info

    def step(self, action: Any) -> Any:
        observation, reward, ended, cut, info = self.many.step(action[None])
        return observation[0], float(reward[0]), bool(ended[0]), bool(cut[0]), info


@UNBOUNDED
@pytest.mark.parametrize("kind", ROBOTS)
def test_gymnasium_finds_nothing_wrong_with_the_robots(kind: str) -> None:
    task = task_of(kind)
    one = Only(task)
    check_env(one, skip_render_check=True)
    assert (one.observation_space.shape, one.action_space.shape) == (
        task.input_shape,
        (task.num_actions,),
    )


@pytest.mark.parametrize("kind", ROBOTS)
def test_rewards_follow_from_how_far_the_torso_came(kind: str) -> None:
    task = task_of(kind, horizon=12, frame_skip=2)
    past = acted(task, [0, 1, 2, 3])
    goal, seconds = past.task[:, :, None], 2 * task.time_step
    x = past.observations[..., 0]
    velocity = (x[..., 1:] - x[..., :-1]) / seconds
    action = past.actions.clamp(-1, 1)[:, :, :-1]
    running = goal * velocity if "direction" in kind else -(velocity - goal).abs()
    if kind.startswith("cheetah"):
        expected = running - 0.05 * (action**2).sum(-1)
        torch.testing.assert_close(past.rewards[..., :-1], expected, rtol=0, atol=1e-12)
        return
    alive = 1.05 if "velocity" in kind else 0.05
    without_contacts = running + alive - 0.005 * (action**2).sum(-1)
    contacts = (without_contacts - past.rewards[..., :-1]) * past.mask[..., 1:]
    # Thirteen bodies with six numbers each, none beyond 1.
    assert contacts.min() > -1e-12
    assert 1e-4 < contacts.max() < 0.0005 * 13 * 6


@pytest.mark.parametrize("kind", ["cheetah-direction", "ant-direction"])
def test_a_time_step_is_that_of_the_original_code(kind: str) -> None:
    seconds = {"cheetah-direction": 0.01, "ant-direction": 0.02}[kind]
    environment = Only(task_of(kind)).many
    environment.reset(seed=[1])
    environment.step(np.zeros((1, task_of(kind).num_actions)))
    assert environment._state[0, 0] == pytest.approx(seconds)
    gym = load(f"{kind}-gym").build_task()
    assert gym.time_step * gym.frame_skip == pytest.approx(0.05)


def test_an_ant_that_falls_has_ended() -> None:
    # Time steps as long as these throw it about.
    past = acted(task_of("ant-velocity", horizon=60, frame_skip=5), list(range(8)))
    fallen = past.mask.sum(-1) < 60
    assert fallen.any()
    for trajectory in zip(past.observations[fallen], past.mask[fallen], strict=True):
        heights, mask = trajectory[0][:, 2], trajectory[1].bool()
        assert ((heights[mask] >= 0.2) & (heights[mask] <= 1.0)).all()


@pytest.mark.parametrize("kind", ["cheetah-velocity", "ant-direction", "gymnasium"])
def test_a_trajectory_is_the_same_whoever_runs_it(kind: str) -> None:
    task = task_of(kind, horizon=8, **(MINE if kind == "gymnasium" else {}))
    together = acted(task, [5, 6, 7, 8])
    torch.set_num_threads(2)
    alone, fewer, later = (
        acted(task, [7]),
        acted(task, [7], trajectories=2),
        acted(task, [7], episode=1),
    )
    assert torch.equal(together.rewards[2:3], alone.rewards)
    assert torch.equal(together.observations[2:3], alone.observations)
    assert torch.equal(fewer.observations[:, :, 0], alone.observations[:, :2, 0])
    starts = torch.cat([together.observations[:, :, 0].flatten(0, 1), later.observations[0, :, 0]])
    assert len(torch.unique(starts, dim=0)) == len(starts)


def test_goals() -> None:
    keys = task_keys(0, "train", np.arange(1000))
    direction = task_of("cheetah-direction").parameters(keys)
    assert set(direction.ravel()) == {-1.0, 1.0}
    assert abs(direction.mean()) < 0.1
    velocity = task_of("ant-velocity").parameters(keys)
    assert velocity.shape == (1000, 1)
    assert 0 <= velocity.min() < 0.05
    assert 2.95 < velocity.max() <= 3


def small(quick: dict[str, Any], task: dict[str, Any], iterations: int) -> dict[str, Any]:
    return {
        **quick,
        "task": task,
        "model": {"kind": "gaussian-policy", "hidden": [8]},
        "inner": {"lr": 0.1, "steps": 1},
        "outer": {"iterations": iterations, "tasks_per_batch": 4, "tasks_per_chunk": 4},
        "evaluation": {"tasks": 4, "validation_tasks": 4, "steps": [0, 1]},
    }


def test_a_cheetah_trains(quick: dict[str, Any], tmp_path: Path, drawn: list[Any]) -> None:
    task = {"kind": "cheetah-direction", "trajectories": 4, "horizon": 10}
    trained = train(experiment_of(small(quick, task, 2)), tmp_path / "run")[0]
    assert np.isfinite(trained.mean["return"]).all()
    assert (tmp_path / "run" / "plots" / "trajectories.png").exists()
    panels = drawn[-1].axes
    assert {axes.get_title() for axes in panels} <= {"forwards", "backwards"}
    assert panels[0].get_ylabel() == "forward position"
    assert len(panels[0].lines[0].get_ydata()) == 10


def test_what_has_no_plane_is_drawn_by_its_returns(
    quick: dict[str, Any], tmp_path: Path, drawn: list[Any]
) -> None:
    experiment = experiment_of(small(quick, {**POINT_MASS, "trajectories": 3, "horizon": 6}, 1))
    theta = initial_parameters(experiment)
    (written,) = write_video(experiment, theta, tmp_path / "video", num_tasks=2, steps=(0, 2))
    assert written.name == "trajectories.png"
    past = ChunkComputer(experiment, compile=False).collect(flat_vector(theta), "test", 2, 2)
    (first, second), task = drawn[0].axes, past.steps[0].trajectories.task
    assert first.get_ylabel() == "return so far"
    assert second.get_title() == f"goal {float(task[1, 0]):.2g}"
    whole = [line.get_ydata() for line in second.lines if len(line.get_ydata()) == 6]
    assert len(whole) == 2 * 3
    returns = [float(course[-1]) for course in whole]
    expected = [past.steps[step].trajectories.returns[1] for step in (0, 2)]
    assert returns == pytest.approx(torch.cat(expected).tolist(), rel=1e-5)


def test_without_mujoco_it_is_said_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experiment = load("cheetah-direction")
    monkeypatch.delitem(sys.modules, "tasks.control.robots", raising=False)
    monkeypatch.delattr("tasks.control.robots", raising=False)
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ValueError, match=r"task\.kind: needs MuJoCo: pip install -e .\.\[mujoco"):
        check_tasks(experiment)


def test_without_gymnasium_it_is_said_at_once(
    quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gym, "_idle", {})
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ConfigError, match=r"task\.kind: needs gymnasium: pip install -e"):
        from_dict(small(quick, POINT_MASS, 1))


def test_robots_have_no_oracle() -> None:
    experiment = load("cheetah-direction", ["evaluation.baselines=[oracle]"])
    with pytest.raises(ValueError, match=r"baselines: cheetah-direction tasks have no oracle"):
        check_tasks(experiment)


# Environments of a user's own.


class NoTask(gymnasium.Env):
    observation_space, action_space = Box(-1, 1, (1,)), Discrete(2)


class Steps(gymnasium.Env):
    """Goes up or down; what it was told, seeds included, is what it shows. Ends at 3."""

    observation_space, action_space = Box(-np.inf, np.inf, (2, 1)), Discrete(2, start=5)

    def set_task(self, task: dict[str, float]) -> None:
        self.size = task["size"]

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.height, self.steps = 0, 0
        return self._seen(), {}

    def step(self, action: int) -> Any:
        assert self.action_space.contains(action)
        self.height += 1 if action == 6 else -1
        self.steps += 1
        return self._seen(), self.size * self.height, self.height == 3, False, {}

    def _seen(self) -> Any:
        return np.array([[self.height], [self.size]], dtype=np.float32)


def hurried() -> Any:
    return gymnasium.wrappers.TimeLimit(PointMass(), max_episode_steps=5)


class Closing(PointMass):
    """Cannot be used once it is closed."""

    closed = False

    def reset(self, **settings: Any) -> Any:
        assert not self.closed
        return super().reset(**settings)

    def close(self) -> None:
        self.closed = True


def test_what_was_given_back_can_be_acted_in_again() -> None:
    task = task_of("gymnasium", **{**MINE, "make": "tests.tasks.test_mujoco:Closing"}, horizon=3)
    first = acted(task, [0, 1])
    keys = task_keys(0, "train", [0])
    environment = task.environment(torch.from_numpy(task.parameters(keys)), keys, 1, LIKE)
    environment.close()
    environment._vector.close()  # as gymnasium 1.1 does when it is forgotten
    assert torch.equal(acted(task, [0, 1]).rewards, first.rewards)


def test_the_readme_shows_the_example() -> None:
    (block,) = (each for each in blocks("python") if each.startswith("# point_mass.py\n"))
    shown = block.removeprefix("# point_mass.py\n")
    assert inspect.getsource(sys.modules[PointMass.__module__]).endswith(shown)


@UNBOUNDED
def test_the_example_of_the_readme_learns(quick: dict[str, Any], tmp_path: Path) -> None:
    check_env(PointMass(), skip_render_check=True)
    task = {**POINT_MASS, "trajectories": 10, "horizon": 20}
    settings = small(quick, task, 6)
    settings["outer"].update(tasks_per_batch=8, tasks_per_chunk=8)
    settings["reinforcement"] = {"max_kl": 0.05}
    settings["evaluation"] = {
        "tasks": 10,
        "validation_tasks": 4,
        "steps": [0, 1],
        "baselines": ["random-init"],
    }
    trained, random = train(from_dict(settings), tmp_path / "run")
    assert trained.mean["return"][1] > random.mean["return"][1] + 1


def test_discrete_actions_and_ends() -> None:
    steps = {"make": "tests.tasks.test_mujoco:Steps", "ranges": {"size": [1.0, 2.0]}}
    task = task_of("gymnasium", horizon=9, **steps)
    assert (task.actions, task.num_actions, task.input_shape) == ("discrete", 2, (2,))
    past = acted(task, [0, 1, 2], trajectories=20)
    goes = 2 * past.actions - 1
    heights = torch.cumsum(goes, -1)
    ended = torch.cumsum(heights == 3, -1) > 0
    before = torch.cat([torch.zeros_like(ended[..., :1]), ended[..., :-1]], -1)
    # Actions are zero where they do not count, so heights are right up to the end.
    torch.testing.assert_close(past.mask, (~before).double())
    assert before.any()
    expected = (past.task[:, :, None] * heights).where(~before, torch.zeros(()).double())
    torch.testing.assert_close(past.rewards, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"make": "tests.tasks.test_mujoco:NoTask"},
            r"task\.make: NoTask has no method set_task",
        ),
        (
            {"make": "tests.tasks.test_mujoco:Nothing"},
            r"task\.make: tests.tasks.test_mujoco:Nothing fails",
        ),
        ({"make": "PointMass"}, r"task\.make: must look like my_module:MyEnvironment"),
        ({"make": "pathlib:Path"}, r"task\.make: pathlib:Path makes PosixPath"),
        ({"ranges": {}}, r"task\.ranges: name at least one"),
        ({"ranges": {"goal": [1, -1]}}, r"task\.ranges\.goal: must be \[low, high\]"),
        ({"ranges": {"gaol": [0, 1]}}, r"task\.ranges: set_task\({'gaol': 0.0}\) fails: KeyError"),
        (
            {"make": "tests.tasks.test_mujoco:Steps", "ranges": {"size": [0, 1]}},
            "discrete actions need",
        ),
    ],
)
def test_what_cannot_be_acted_in_is_refused(
    quick: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(small(quick, {**POINT_MASS, **changes}, 2))


def test_a_time_limit_of_its_own_is_refused_where_it_would_count() -> None:
    settings: dict[str, Any] = {
        "make": "tests.tasks.test_mujoco:hurried",
        "ranges": {"goal": (0.0, 1.0)},
    }
    acted(task_of("gymnasium", horizon=5, **settings), [0])
    with pytest.raises(ValueError, match=r"task\.horizon: 6 is more than .* at time step 5"):
        acted(task_of("gymnasium", horizon=6, **settings), [0])


def test_actions_beyond_the_bounds_are_clipped_and_scaled() -> None:
    from tasks.control.gym import _played

    bounded = _played(Box(np.float32([0, -np.inf]), np.float32([4, np.inf])))
    np.testing.assert_array_equal(bounded(np.array([[-9.0, -9], [0.5, 0.5]])), [[0, -9], [3, 0.5]])
