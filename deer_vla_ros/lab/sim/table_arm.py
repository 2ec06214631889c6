"""Actions on the simulated arm, with the same guard and from the last target, as in the node's controller."""

from __future__ import annotations

import numpy as np

from deer_vla_ros.control.guard import GuardLimits, guard
from deer_vla_ros.control.motion import motion_of
from deer_vla_ros.control.types import Pose
from deer_vla_ros.lab.sim.table import Table
from deer_vla_ros.model.action_space import TABLETOP

LIMITS = GuardLimits(0.06, 0.3, 0.15, 0.6, (-0.8, -0.8, 0.0), (0.8, 0.8, 1.2))
"""The defaults of the node (config/deer_vla.yaml)."""

STEP_S = 1 / TABLETOP.rate_hz


class TableArm:
    """Moves the arm of a table by actions of the TABLETOP action space."""

    def __init__(self, table: Table):
        self.table = table
        self._last_target: Pose | None = None

    def measured(self) -> np.ndarray:
        """Returns the TCP pose (7,), position and quaternion xyzw, as in an observation."""
        return self.table.tcp_pose().as_array()

    def step(self, action: np.ndarray, gripper_open: bool) -> Pose:
        """Does one control step of STEP_S seconds with action (6,) in -1..1. Returns the arm's target."""
        measured = self.table.tcp_pose()
        guarded = guard(LIMITS, self._last_target or measured, measured, *motion_of(action, TABLETOP))
        if guarded.arm_moved:  # the node waits one step and starts again from the measured pose
            self._last_target = None
            target = measured
        else:
            target = self._last_target = guarded.target
            self.table.set_gripper(TABLETOP.gripper_open if gripper_open else TABLETOP.gripper_closed)
        self.table.set_target(target.position, target.quaternion)
        self.table.advance(STEP_S)
        return target
