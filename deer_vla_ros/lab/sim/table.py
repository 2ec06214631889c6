"""The simulated robot: the arm follows a TCP target, the fingers an opening; the caller advances time."""

from __future__ import annotations

import numpy as np

from deer_vla_ros.control.types import Pose
from deer_vla_ros.lab.sim.cameras import Cameras
from deer_vla_ros.lab.sim.kinematics import JOINTS, ArmKinematics
from deer_vla_ros.lab.sim.scene import MAX_OPENING, Scene
from deer_vla_ros.lab.sim.state import TableState, Views

FINGER_SPEED_LIMIT = 0.10  # m/s of each finger
_FINGERS = slice(JOINTS, JOINTS + 2)


class Table:
    """A table with an arm that follows TCP targets. Call close() after rendering, or use `with`.

    The joint targets keep the speed limits of kinematics.py. They also stay so near to the measured joints
    that the actuators' torque can follow. A far target or a blocked arm therefore causes no jump. Physics is
    deterministic: the same seed, targets and calls of advance() give the same states and images.
    """

    def __init__(self, seed: int = 0) -> None:
        self._scene = Scene()
        self._kinematics = ArmKinematics()
        self._cameras: Cameras | None = None
        model = self._scene.model
        self._timestep = float(model.opt.timestep)
        stiffness, damping = model.actuator_gainprm[:JOINTS, 0], -model.actuator_biasprm[:JOINTS, 2]
        self._lead = model.actuator_forcerange[:JOINTS, 1] / stiffness
        self._lag = damping / stiffness
        self.reset(seed)

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @property
    def joint_names(self) -> tuple[str, ...]:
        """The names of joint_positions(): seven arm joints, then two fingers."""
        return self._scene.joint_names

    def reset(self, seed: int | None = None, varied: bool = False) -> None:
        """Makes a new arrangement with the arm at home; home is also the target. varied: as in Scene.arrange.

        With a seed, the arrangement depends only on it. Without a seed, it is the next one of the random
        sequence.
        """
        if seed is not None:
            self._random = np.random.default_rng(seed)
        self._scene.arrange(self._random, varied)
        self._joint_target = self._scene.data.ctrl[:JOINTS].copy()
        self._position, self._quaternion_wxyz = self._kinematics.forward(self._joint_target)
        self._opening = MAX_OPENING
        self._time_left = 0.0

    def set_target(self, position: np.ndarray, quaternion: np.ndarray) -> None:
        """Sets the goal pose of the TCP: position (3,) [m] and quaternion (4,) xyzw, base frame.

        Any finite pose is accepted; the arm goes as near to it as the joints allow. Raises ValueError and
        keeps the last target for numbers that are not finite, for other shapes, and for a quaternion of
        length 0.
        """
        position, quaternion = np.array(position, float), np.array(quaternion, float)
        if position.shape != (3,) or quaternion.shape != (4,):
            raise ValueError(f"a target is 3 + 4 numbers, not shapes {position.shape} and {quaternion.shape}")
        if not (np.isfinite(position).all() and np.isfinite(quaternion).all()):
            raise ValueError(f"target {position} {quaternion} is not finite; the arm keeps its last target")
        # Division by the largest entry first avoids an overflow in the length.
        quaternion /= np.abs(quaternion).max() or 1.0
        length = np.linalg.norm(quaternion)
        if length == 0.0:
            raise ValueError("target quaternion 0 0 0 0 is no rotation; straight down is x y z w = 1 0 0 0")
        self._position = np.clip(position, -10.0, 10.0)
        self._quaternion_wxyz = np.roll(quaternion / length, 1)

    def set_gripper(self, opening: float) -> None:
        """Sets the distance of the finger pads [m], clamped to [0, 0.08]. ValueError if it is not finite."""
        if not np.isfinite(opening):
            raise ValueError(f"gripper opening {opening} is not finite; the gripper keeps its last command")
        self._opening = float(np.clip(opening, 0.0, MAX_OPENING))

    def advance(self, seconds: float) -> None:
        """Runs physics for `seconds`. Time that is less than a 5 ms step is carried over to the next call."""
        self._time_left += seconds
        steps = int(np.floor(self._time_left / self._timestep + 1e-6))
        self._time_left -= steps * self._timestep
        for _ in range(steps):
            self._drive()
            self._scene.step()

    def render(self) -> Views:
        """Renders both camera images. From the first call to close(), OpenGL needs the same thread."""
        if self._cameras is None:
            self._cameras = Cameras(self._scene.model)
        return self._cameras.render(self._scene.data)

    def tcp_pose(self) -> Pose:
        """Returns the measured TCP pose."""
        return self._scene.tcp()

    def joint_positions(self) -> np.ndarray:
        """Returns the measured positions (9,): arm joints [rad], then fingers [m]."""
        return self._scene.data.qpos[: JOINTS + 2].copy()

    def joint_velocities(self) -> np.ndarray:
        """Returns the measured velocities (9,): arm joints [rad/s], then fingers [m/s]."""
        return self._scene.data.qvel[: JOINTS + 2].copy()

    def state(self) -> TableState:
        """Returns everything that tasks can ask about."""
        return self._scene.state()

    def pixel(self, camera: str, point: np.ndarray) -> np.ndarray:
        """Returns the position (2,) of a point [m, base frame] in the image of camera "static" or "gripper".

        x points right and y down; both are 0..1 inside the image, and NaN behind the camera.
        """
        position, rotation, angle = self._scene.camera_pose(camera)
        x, y, z = rotation.T @ (np.asarray(point, float) - position)
        if z >= 0.0:
            return np.full(2, np.nan)
        half = np.tan(angle / 2) * -z
        return np.array([0.5 + 0.5 * x / half, 0.5 - 0.5 * y / half])

    def close(self) -> None:
        """Closes OpenGL; call it in the thread that rendered. A later render() opens it again."""
        if self._cameras is not None:
            self._cameras.close()
            self._cameras = None

    def _drive(self) -> None:
        """Moves the targets of the actuators by one timestep."""
        data = self._scene.data
        target = self._kinematics.step(
            self._joint_target, self._position, self._quaternion_wxyz, self._timestep
        )
        # At these targets the actuators exert no torque: the measured joints plus the lag from damping.
        balance = data.qpos[:JOINTS] + self._lag * data.qvel[:JOINTS]
        self._joint_target = np.clip(target, balance - self._lead, balance + self._lead)
        data.ctrl[:JOINTS] = self._joint_target
        finger_step = FINGER_SPEED_LIMIT * self._timestep
        fingers = data.ctrl[_FINGERS]
        data.ctrl[_FINGERS] = fingers + np.clip(self._opening / 2 - fingers, -finger_step, finger_step)
