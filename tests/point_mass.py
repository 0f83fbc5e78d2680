"""An environment of a user's own, as the README shows it."""

import gymnasium
import numpy as np
from gymnasium.spaces import Box


class PointMass(gymnasium.Env):
    """A mass on a line is to be brought to a goal and held there; the goal is the task."""

    observation_space = Box(-np.inf, np.inf, (2,))
    action_space = Box(-1.0, 1.0, (1,))
    goal = 0.0

    def set_task(self, task):
        self.goal = task["goal"]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.normal(0, [0.1, 0.0])  # position, velocity
        return self.state.astype(np.float32), {}

    def step(self, action):
        position, velocity = self.state
        velocity = 0.9 * velocity + 0.1 * float(action[0])
        self.state = np.array([position + 0.1 * velocity, velocity])
        reward = -abs(self.state[0] - self.goal)
        return self.state.astype(np.float32), reward, False, False, {}
