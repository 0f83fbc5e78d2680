"""Simulates many robots at once with MuJoCo, behind gymnasium's vector API.

All robots of a kind share one compiled model; each is a row of numbers, its physical state. A time
step is one call of MuJoCo's `rollout` for all rows, which is several times faster than stepping
environments one by one. The motion of a robot depends on its own row alone: not even the solver's
initial guess is carried over from the step before.

Shapes: N robots, nq coordinates, nv velocities, nu motors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import mujoco
import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from mujoco.rollout import Rollout

from tasks.random import normal

Numbers = npt.NDArray[np.float64]
Gain = Callable[[Numbers, Numbers], Numbers]
"""(forward velocity [N], goal [N]) -> reward for running so [N]."""

_MODELS = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
_WHOLE = mujoco.mjtState.mjSTATE_FULLPHYSICS
_FIRST = 1  # column of the first coordinate, x, in a state; column 0 is the time
_POSITION_NOISE, _VELOCITY_NOISE = 0.01, 0.1
_START = 0  # random stream


class Robot(NamedTuple):
    """The properties of a kind of robot that its model does not contain."""

    file: str
    """The file of the model, among those that come with gymnasium."""
    height_at: int
    """Which coordinate is the height."""
    heights: tuple[float, float]
    """An episode ends where the height is not between these."""
    survival: float
    """Reward for each time step."""
    control_cost: float
    """Factor of the squared actions, subtracted from the reward."""
    contact_cost: float
    """Factor of the squared contact forces, clipped to [-1, 1]; 0: forces are not computed."""


ROBOTS = {
    "cheetah": Robot("half_cheetah.xml", 1, (-np.inf, np.inf), 0.0, 0.05, 0.0),
    "ant": Robot("ant.xml", 2, (0.2, 1.0), 0.05, 0.005, 0.0005),
}


class Robots(VectorEnv[Numbers, Numbers, Any]):
    """N robots of a kind, each with a goal. A fallen robot is not reset: it moves on as it lies."""

    def __init__(
        self,
        robot: Robot,
        gain: Gain,
        goals: Numbers,
        *,
        time_step: float,
        frame_skip: int,
        threads: int = 1,
    ):
        """`goals` [N]; an action is held for `frame_skip` steps of `time_step` seconds."""
        self._model = _model(robot.file, time_step)
        self._robot, self._gain, self._goals = robot, gain, goals
        self._frame_skip, self._seconds = frame_skip, time_step * frame_skip
        self._rollout = Rollout(nthread=threads if threads > 1 else 0)
        self._scratch = [mujoco.MjData(self._model) for _ in range(threads)]
        self._state = np.zeros((len(goals), mujoco.mj_stateSize(self._model, _WHOLE)))
        self.num_envs = len(goals)
        self.metadata = {"autoreset_mode": AutoresetMode.DISABLED}
        observed = (self._model.nq + self._model.nv,)
        self.single_observation_space = Box(-np.inf, np.inf, observed, np.float64)
        self.single_action_space = Box(-1.0, 1.0, (self._model.nu,), np.float64)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Numbers, dict[str, Any]]:
        """`seed` holds one number per robot, which determines its start."""
        nq, nv = self._model.nq, self._model.nv
        noise = normal(np.array(seed, dtype=np.uint64), _START, nq + nv)
        self._state = np.zeros_like(self._state)
        self._state[:, _FIRST : _FIRST + nq] = _pose(self._model) + _POSITION_NOISE * noise[:, :nq]
        self._state[:, _FIRST + nq : _FIRST + nq + nv] = _VELOCITY_NOISE * noise[:, nq:]
        return self._observation(), {}

    def step(
        self, actions: Numbers
    ) -> tuple[Numbers, Numbers, npt.NDArray[np.bool_], npt.NDArray[np.bool_], dict[str, Any]]:
        states, _ = self._rollout.rollout(
            self._model,
            self._scratch,
            self._state,
            np.ascontiguousarray(actions[:, None], dtype=np.float64),
            nstep=self._frame_skip,
        )
        before, self._state = self._state, states[:, -1].copy()
        velocity = (self._state[:, _FIRST] - before[:, _FIRST]) / self._seconds
        reward = self._gain(velocity, self._goals) + self._robot.survival
        reward -= self._robot.control_cost * (actions**2).sum(-1)
        if self._robot.contact_cost:
            forces = np.clip(self._contact_forces(actions), -1, 1)
            reward -= self._robot.contact_cost * (forces**2).sum((1, 2))
        return self._observation(), reward, self._fallen(), np.zeros(self.num_envs, dtype=bool), {}

    def _observation(self) -> Numbers:
        return self._state[:, _FIRST : _FIRST + self._model.nq + self._model.nv].copy()

    def _fallen(self) -> npt.NDArray[np.bool_]:
        lowest, highest = self._robot.heights
        height = self._state[:, _FIRST + self._robot.height_at]
        standing = (height >= lowest) & (height <= highest) & np.isfinite(self._state).all(-1)
        return ~standing

    def _contact_forces(self, actions: Numbers) -> Numbers:
        """Contact forces and torques on each body, [N, bodies, 6]; states do not contain them."""
        data, forces = self._scratch[0], np.empty((self.num_envs, self._model.nbody, 6))
        for row, state in enumerate(self._state):
            mujoco.mj_setState(self._model, data, state, _WHOLE)
            data.ctrl[:] = actions[row]
            data.qacc_warmstart[:] = 0  # or the robot before would influence this one
            mujoco.mj_forward(self._model, data)
            mujoco.mj_rnePostConstraint(self._model, data)
            forces[row] = data.cfrc_ext
        return forces

    def close_extras(self, **kwargs: Any) -> None:
        self._rollout.close()


@lru_cache
def _model(file: str, time_step: float) -> mujoco.MjModel:
    """The compiled model of a file; a process compiles it once."""
    with warnings.catch_warnings():
        # MuJoCo warns of an old tag in gymnasium's file, which it still understands.
        warnings.filterwarnings("ignore", message=".*settotalmass")
        model = mujoco.MjSpec.from_file(str(_MODELS / file)).compile()
    model.opt.timestep = time_step
    return model


def _pose(model: mujoco.MjModel) -> Numbers:
    """The coordinates at the start, without noise: the model's own, or its `init_qpos`."""
    pose: Numbers = model.numeric("init_qpos").data if model.nnumeric else model.qpos0
    return pose
