"""Inverse kinematics of the arm: damped least squares within joint limits and speed limits."""

from __future__ import annotations

from pathlib import Path

import mujoco
import numpy as np

ARM_FILE = Path(__file__).parent / "assets" / "arm.xml"

JOINTS = 7
# The TCP is at x 0.40 m, y 0, z 0.26 m over the table; the gripper points straight down and the elbow is up.
HOME_JOINTS = np.array([0.0, -0.3569, 0.0, -2.637, 0.0, 2.2801, np.pi / 4])
JOINT_SPEED_LIMIT = 1.8  # rad/s, every joint; the datasheet of the real arm allows 2.2
DRIVE_SPEED_LIMIT = 3.5  # rad/s; the drives brake a joint that a contact pushes faster than this
# Because of the elbow's offset, the arm is longest here, 0.4 rad before the joint's end stop. Beyond this
# angle, bending and stretching swap their directions, and the solver could not bring the arm back.
STRAIGHT_ELBOW = -0.5  # rad, joint 4
TCP_SPEED_LIMIT = 0.5  # m/s
TCP_TURN_LIMIT = 2.0  # rad/s

_DAMPING = 0.015  # m: limits joint motion near singular postures
_APPROACH_RATE = 20.0  # 1/s: rate at which the remaining error is corrected
_POSTURE_RATE = 1.0  # 1/s: rate at which the redundant joint returns to the home posture


def rotation_vector(target_wxyz: np.ndarray, current_wxyz: np.ndarray) -> np.ndarray:
    """Returns the rotation (3,) [rad, base frame] from `current` to `target` (unit quaternions wxyz)."""
    inverse, difference, vector = np.empty(4), np.empty(4), np.empty(3)
    mujoco.mju_negQuat(inverse, current_wxyz)
    mujoco.mju_mulQuat(difference, target_wxyz, inverse)
    mujoco.mju_quat2Vel(vector, difference, 1.0)
    return vector


def _at_most(vector: np.ndarray, length: float) -> np.ndarray:
    norm = float(np.sqrt(vector @ vector))
    return vector if norm <= length else vector * (length / norm)


class ArmKinematics:
    """Forward kinematics and single steps of inverse kinematics, on a model of the arm without the table."""

    def __init__(self) -> None:
        self._model = mujoco.MjModel.from_xml_path(str(ARM_FILE))
        self._data = mujoco.MjData(self._model)
        self._tcp = self._model.site("tcp").id
        self._lower, self._upper = self._model.jnt_range[:JOINTS].T.copy()
        self._upper[3] = STRAIGHT_ELBOW
        self._jacobian = np.zeros((6, self._model.nv))

    def forward(self, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the TCP position (3,) and quaternion wxyz (4,) at `joints` (7,)."""
        self._data.qpos[:JOINTS] = joints
        mujoco.mj_kinematics(self._model, self._data)
        quaternion = np.empty(4)
        mujoco.mju_mat2Quat(quaternion, self._data.site_xmat[self._tcp])
        return self._data.site_xpos[self._tcp].copy(), quaternion

    def step(
        self, joints: np.ndarray, position: np.ndarray, quaternion_wxyz: np.ndarray, seconds: float
    ) -> np.ndarray:
        """Returns the joint positions (7,), `seconds` after `joints`, on the way to a TCP pose.

        They keep the limits of joint range, joint speed and TCP speed for any target. The arm goes as near to
        an unreachable target as it can. If a joint is at its end stop, the step is solved again without it.
        """
        here, orientation = self.forward(joints)
        mujoco.mj_comPos(self._model, self._data)
        mujoco.mj_jacSite(self._model, self._data, self._jacobian[:3], self._jacobian[3:], self._tcp)
        jacobian = self._jacobian[:, :JOINTS].copy()

        share = min(1.0, _APPROACH_RATE * seconds)
        motion = np.concatenate(
            [
                _at_most(share * (position - here), TCP_SPEED_LIMIT * seconds),
                _at_most(share * rotation_vector(quaternion_wxyz, orientation), TCP_TURN_LIMIT * seconds),
            ]
        )
        posture = _POSTURE_RATE * seconds * (HOME_JOINTS - joints)
        for _ in range(JOINTS):
            damped = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + _DAMPING**2 * np.eye(6))
            change = posture + damped @ (motion - jacobian @ posture)
            change *= min(1.0, JOINT_SPEED_LIMIT * seconds / max(np.abs(change).max(), 1e-12))
            following = joints + change
            stopped = ((following < self._lower) & (change < 0)) | ((following > self._upper) & (change > 0))
            stopped &= jacobian.any(axis=0)
            if not stopped.any():
                break
            jacobian[:, stopped] = 0.0
            posture = np.where(stopped, 0.0, posture)
        back_inside = np.clip(following, self._lower, self._upper) - joints
        return joints + np.clip(back_inside, -JOINT_SPEED_LIMIT * seconds, JOINT_SPEED_LIMIT * seconds)
