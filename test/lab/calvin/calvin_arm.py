"""A small controller that moves CALVIN's arm along a path by relative actions, for scripted motions."""

import numpy as np

from deer_vla_ros.lab.calvin.calvin_process import CalvinProcess, CalvinView

UNITS = np.array([0.02] * 3 + [0.05] * 3)
"""What 1 of an action's relative pose is [m], [rad]."""
SPEED = 0.5
"""The largest component of an action on the way."""
NEAR_M = 0.004
MOST_STEPS = 60
"""The most steps on the way to one point."""
OPEN, CLOSED = 1, -1


class ScriptedArm:
    """The arm of a simulator in which an episode has begun. It points down, with its fingers apart along x.

    view: what the simulator showed last. done: what its oracle said after each step.
    """

    def __init__(self, simulator: CalvinProcess, view: CalvinView):
        self._simulator = simulator
        self._target = view.robot_obs[:6].copy()
        self.view = view
        self.done: list[bool] = []

    def move(self, *points: tuple[float, float, float], gripper: int, yaw: float | None = None) -> None:
        """Moves the TCP to each point (x, y, z) [m] in turn, and turns it to the yaw [rad] on the way."""
        for point in points:
            goal = np.array([*point, *self._target[3:]])
            goal[5] = self._target[5] if yaw is None else yaw
            for _ in range(MOST_STEPS):
                way = (goal - self._target) / UNITS
                if not way.any() and np.abs(self.view.robot_obs[:3] - goal[:3]).max() < NEAR_M:
                    break
                longest = np.abs(way).max()
                self.step(way * min(1.0, SPEED / longest) if longest > 1e-9 else np.zeros(6), gripper)

    def stay(self, steps: int, gripper: int) -> None:
        for _ in range(steps):
            self.step(np.zeros(6), gripper)

    def step(self, pose: np.ndarray, gripper: int) -> None:
        self._target += pose * UNITS
        self._simulator.send(np.append(pose, gripper))
        self.view, done = self._simulator.receive()
        self.done.append(done)
