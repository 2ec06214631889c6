"""How does the simulated robot behave? The arm follows a TCP target, the fingers an opening, time is advanced by hand."""

from __future__ import annotations

import numpy as np

from deer_vla_ros.lab.sim.cameras import Cameras
from deer_vla_ros.lab.sim.kinematics import JOINTS, ArmKinematics
from deer_vla_ros.lab.sim.scene import MAX_OPENING, Scene
from deer_vla_ros.lab.sim.state import Pose, TableState, Views

FINGER_SPEED_LIMIT = 0.10  # m/s of each finger
_FINGERS = slice(JOINTS, JOINTS + 2)


class Table:
    """A table with an arm, driven by TCP targets. Use as a context manager or call close() after rendering.

    The joint targets move at most at the speed limits of kinematics.py and never run further ahead of the measured
    joints than the actuators' torque can follow, so neither a far target nor a blocked arm ends in a jump.
    Physics is deterministic: the same seed, targets and calls of advance() give the same states and images.
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
        """Names of joint_positions(): seven arm joints, then two fingers."""
        return self._scene.joint_names

    def reset(self, seed: int | None = None, varied: bool = False) -> None:
        """A new arrangement, the arm at home and told to stay there; varied: as Scene.arrange says.

        With a seed the arrangement depends on it alone; without, it is the next one of the running sequence.
        """
        if seed is not None:
            self._random = np.random.default_rng(seed)
        self._scene.arrange(self._random, varied)
        self._joint_target = self._scene.data.ctrl[:JOINTS].copy()
        self._position, self._quaternion_wxyz = self._kinematics.forward(self._joint_target)
        self._opening = MAX_OPENING
        self._time_left = 0.0

    def set_target(self, position: np.ndarray, quaternion: np.ndarray) -> None:
        """The TCP pose to go to: position (3,) metres, quaternion (4,) xyzw, base frame.

        Any finite pose is accepted; one out of reach is approached as far as the joints allow. ValueError, and the
        target stays as it was, for numbers that are not finite, other shapes, or a quaternion of no length.
        """
        position, quaternion = np.array(position, float), np.array(quaternion, float)
        if position.shape != (3,) or quaternion.shape != (4,):
            raise ValueError(f"a target is 3 + 4 numbers, not shapes {position.shape} and {quaternion.shape}")
        if not (np.isfinite(position).all() and np.isfinite(quaternion).all()):
            raise ValueError(f"target {position} {quaternion} is not finite; the arm keeps its last target")
        # Scaled by the largest entry first, so that the length of absurd numbers does not overflow.
        quaternion /= np.abs(quaternion).max() or 1.0
        length = np.linalg.norm(quaternion)
        if length == 0.0:
            raise ValueError("target quaternion 0 0 0 0 is no rotation; straight down is x y z w = 1 0 0 0")
        self._position = np.clip(position, -10.0, 10.0)
        self._quaternion_wxyz = np.roll(quaternion / length, 1)

    def set_gripper(self, opening: float) -> None:
        """Metres between the finger pads, clamped into [0, 0.08]; ValueError if not finite."""
        if not np.isfinite(opening):
            raise ValueError(f"gripper opening {opening} is not finite; the gripper keeps its last command")
        self._opening = float(np.clip(opening, 0.0, MAX_OPENING))

    def advance(self, seconds: float) -> None:
        """Runs physics for `seconds`; what is less than a whole 5 ms step is carried over to the next call."""
        self._time_left += seconds
        steps = int(np.floor(self._time_left / self._timestep + 1e-6))
        self._time_left -= steps * self._timestep
        for _ in range(steps):
            self._drive()
            self._scene.step()

    def render(self) -> Views:
        """Both camera images. OpenGL is opened by the first call, and belongs to its thread until close()."""
        if self._cameras is None:
            self._cameras = Cameras(self._scene.model)
        return self._cameras.render(self._scene.data)

    def tcp_pose(self) -> Pose:
        """The measured TCP pose."""
        return self._scene.tcp()

    def joint_positions(self) -> np.ndarray:
        """(9,) measured: radians of the arm's joints, metres of the fingers."""
        return self._scene.data.qpos[: JOINTS + 2].copy()

    def joint_velocities(self) -> np.ndarray:
        """(9,) measured: rad/s of the arm's joints, m/s of the fingers."""
        return self._scene.data.qvel[: JOINTS + 2].copy()

    def state(self) -> TableState:
        return self._scene.state()

    def pixel(self, camera: str, point: np.ndarray) -> np.ndarray:
        """(2,) where a point [m, base frame] appears in a camera's ("static" or "gripper") image: x to the right and y down, each
        0..1 inside the image; NaN behind the camera."""
        position, rotation, angle = self._scene.camera_pose(camera)
        x, y, z = rotation.T @ (np.asarray(point, float) - position)
        if z >= 0.0:
            return np.full(2, np.nan)
        half = np.tan(angle / 2) * -z
        return np.array([0.5 + 0.5 * x / half, 0.5 - 0.5 * y / half])

    def close(self) -> None:
        """Closes OpenGL, in the thread that rendered; a later render() opens it again."""
        if self._cameras is not None:
            self._cameras.close()
            self._cameras = None

    def _drive(self) -> None:
        """Moves the actuators' targets by one timestep."""
        data = self._scene.data
        target = self._kinematics.step(
            self._joint_target, self._position, self._quaternion_wxyz, self._timestep
        )
        # Where the actuators would exert no torque: the measured joints, plus what damping makes a moving joint lag.
        balance = data.qpos[:JOINTS] + self._lag * data.qvel[:JOINTS]
        self._joint_target = np.clip(target, balance - self._lead, balance + self._lead)
        data.ctrl[:JOINTS] = self._joint_target
        finger_step = FINGER_SPEED_LIMIT * self._timestep
        fingers = data.ctrl[_FINGERS]
        data.ctrl[_FINGERS] = fingers + np.clip(self._opening / 2 - fingers, -finger_step, finger_step)
