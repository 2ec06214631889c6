"""What the columns of a LeRobotDataset mean: which are the cameras, the TCP pose and the gripper."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.lerobot.lerobot_folder import LerobotFolder

ROTATIONS = {"rpy": 3, "quat_xyzw": 4, "quat_wxyz": 4, "rotvec": 3}
"""Numbers of a rotation. rpy: angles about the fixed axes X, then Y, then Z. rotvec: axis times angle."""
POSE_FORMATS = tuple(f"xyz_{name}" for name in ROTATIONS)
POSITION_UNITS = {"m": 1.0, "mm": 1e-3}
ANGLE_UNITS = {"rad": 1.0, "deg": np.pi / 180}
FARTHEST_M = 10.0
LARGEST_ANGLE = 2 * np.pi + 0.1
JOINT = re.compile(r"joint|motor|shoulder|elbow|waist|forearm|wrist_|finger|servo|\bj\d", re.IGNORECASE)


@dataclass(frozen=True)
class LerobotColumns:
    """The meaning of columns, as the options of `convert-lerobot` give it.

    static, gripper: keys of the cameras. state: keys whose numbers, one after another, hold the TCP pose.
    pose_format: one of POSE_FORMATS. position_at, rotation_at: where position and rotation begin.
    position_unit, angle_unit: keys of POSITION_UNITS and ANGLE_UNITS. gripper_key, gripper_at: the number
    that says how open the gripper is or shall be; a negative gripper_at counts from the end.
    gripper_open, gripper_closed: its values.
    """

    static: str
    gripper: str
    state: tuple[str, ...]
    gripper_open: float
    gripper_closed: float
    pose_format: str = "xyz_rpy"
    position_at: int = 0
    rotation_at: int = 3
    position_unit: str = "m"
    angle_unit: str = "rad"
    gripper_key: str = "action"
    gripper_at: int = -1

    def check(self, folder: LerobotFolder) -> None:
        """Raises UserError where the dataset cannot be read with these columns."""
        why = "the network needs two cameras, one that looks at the scene and one on the gripper"
        cameras = [key for key, feature in folder.features.items() if feature.is_image]
        if len(cameras) == 1:
            raise UserError(f"{folder.path}: has one camera, {cameras[0]}: {why}")
        for option, key in (("--static", self.static), ("--gripper", self.gripper)):
            folder.feature(option, key, image=True)
        if self.static == self.gripper:
            raise UserError(f"--static and --gripper are both {self.static}: {why}")
        state = [folder.feature("--state", key, image=False) for key in self.state]
        size = sum(each.numbers for each in state)
        names = [name for each in state for name in each.names]
        ends = {"position": self.position_at + 3, "rotation": self.rotation_at + self._rotation_numbers}
        where = " + ".join(map(str, state))
        axes = names[self.position_at :][:3] if len(names) == size else []
        if axes and all(JOINT.search(name) for name in axes):
            raise UserError(
                f"--state is {where}: these are joints. An action of the network is a motion of the TCP, so "
                "poses of the TCP are needed: name their column, or add one with the arm's forward kinematics"
            )
        for part, end in ends.items():
            if end > size:
                raise UserError(
                    f"--state is {where}: it has {size} numbers, and the {part} of --pose-format "
                    f"{self.pose_format} would end at number {end}: change --pose-at or --pose-format"
                )
        gripper = folder.feature("--gripper-from", self.gripper_key, image=False)
        if not -gripper.numbers <= self.gripper_at < gripper.numbers:
            raise UserError(
                f"--gripper-from is {self.gripper_key}:{self.gripper_at}: {gripper} has no such number"
            )
        if self.gripper_open == self.gripper_closed:
            raise UserError(
                f"--gripper-range is {self.gripper_closed:g} {self.gripper_open:g}: give two values"
            )

    @property
    def numbers(self) -> tuple[str, ...]:
        """The keys of the columns of numbers."""
        return tuple(dict.fromkeys((*self.state, self.gripper_key)))

    @property
    def gripper_is_command(self) -> bool:
        """A number of an action says what the gripper shall do from its row on; another was measured then."""
        return self.gripper_key.split(".")[0] in ("action", "actions")

    def repeated_command(self, folder: LerobotFolder) -> tuple[str, int] | None:
        """The key and position of the number in the state that has the same name as the gripper's command."""
        names = folder.features[self.gripper_key].names_of_all
        for key in self.state if names and self.gripper_is_command else ():
            there = folder.features[key].names_of_all
            if names[self.gripper_at] in there:
                return key, there.index(names[self.gripper_at])
        return None

    def is_end(self, value: float) -> bool:
        """Whether the value is that of an open or of a closed gripper."""
        tolerance = 1e-3 * abs(self.gripper_open - self.gripper_closed)
        return min(abs(value - self.gripper_open), abs(value - self.gripper_closed)) <= tolerance

    def is_open(self, value: float) -> bool:
        """Whether the gripper's number is nearer to open than to closed. Raises ValueError."""
        if not np.isfinite(value):
            raise ValueError(f"{self.gripper_key}[{self.gripper_at}] is {value}")
        return bool(abs(value - self.gripper_open) < abs(value - self.gripper_closed))

    def pose(self, columns: Sequence[np.ndarray]) -> np.ndarray:
        """(7,) position [m] and unit quaternion xyzw, of the columns `state`.

        Raises ValueError with what is wrong and what may help.
        """
        values = np.concatenate(columns)
        if values.size < max(self.position_at + 3, self.rotation_at + self._rotation_numbers):
            raise ValueError(f"{' + '.join(self.state)} has only {values.size} numbers")
        position = values[self.position_at :][:3] * POSITION_UNITS[self.position_unit]
        rotation = values[self.rotation_at :][: self._rotation_numbers]
        if not (np.isfinite(position).all() and np.isfinite(rotation).all()):
            raise ValueError(f"the pose is {np.round([*position, *rotation], 4)}: it has to be finite")
        if np.abs(position).max() > FARTHEST_M:
            raise ValueError(
                f"the position is {np.round(position, 3)} m, further than {FARTHEST_M:g} m: "
                "give --position-unit or --pose-at"
            )
        return np.concatenate([position, self._quaternion(rotation)])

    def _quaternion(self, rotation: np.ndarray) -> np.ndarray:
        kind = self.pose_format.removeprefix("xyz_")
        if kind.startswith("quat"):
            length = np.linalg.norm(rotation)
            if abs(length - 1) > 0.01:
                raise ValueError(
                    f"the quaternion {np.round(rotation, 4)} has length {length:.3f}, which should be 1: "
                    "give --pose-format or --pose-at"
                )
            return Rotation.from_quat(np.roll(rotation, -1) if kind == "quat_wxyz" else rotation).as_quat()
        angles = rotation * ANGLE_UNITS[self.angle_unit]
        if np.abs(angles).max() > LARGEST_ANGLE:
            raise ValueError(
                f"the angles are {np.round(angles, 3)} rad, more than a turn: give --angle-unit, "
                "--pose-format or --pose-at"
            )
        return (
            Rotation.from_rotvec(angles) if kind == "rotvec" else Rotation.from_euler("xyz", angles)
        ).as_quat()

    @property
    def _rotation_numbers(self) -> int:
        return ROTATIONS[self.pose_format.removeprefix("xyz_")]
