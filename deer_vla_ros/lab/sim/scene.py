"""The objects on the table: the MuJoCo model, random arrangements, and the current state."""

from __future__ import annotations

from pathlib import Path

import mujoco
import numpy as np

from deer_vla_ros.control.types import Pose
from deer_vla_ros.lab.sim.kinematics import DRIVE_SPEED_LIMIT, HOME_JOINTS, JOINTS
from deer_vla_ros.lab.sim.state import COLOURS, TableState

TABLE_FILE = Path(__file__).parent / "assets" / "table.xml"

MAX_OPENING = 0.08  # m between the finger pads
BLOCK_HALF = 0.023  # m
# Centres of blocks after a reset. Handles, the open drawer and the button do not block the gripper there.
BLOCK_AREA = np.array([[0.33, 0.54], [-0.13, 0.15]])  # m, x and y
BLOCK_DISTANCE = 0.085  # m between centres, so that the open gripper fits between two blocks

# m, x and y: the gripper fits around and beside a block in this area
TABLE_AREA = np.array([[0.28, 0.585], [-0.13, 0.19]])
DRAWER_CENTRE = np.array([0.565, -0.28])  # m, x and y of the centre of the closed drawer
DRAWER_PLACE = np.array([0.555, -0.28])  # m, closed drawer: centre of the part that opens
DRAWER_HALF = np.array([0.068, 0.065])  # m, from the centre to the inner sides of the walls

CAMERA_SHIFT_M, CAMERA_TURN_RAD = 0.008, 0.008  # largest shift and turn of the static camera, each axis

_BUTTON_PRESSED, _BUTTON_RELEASED = 0.008, 0.004  # m of travel; an unsteady press counts only once
_SWITCH_ON, _SWITCH_OFF = 0.038, 0.022  # m of travel


def pose_of(position: np.ndarray, quaternion_wxyz: np.ndarray) -> Pose:
    """Returns a Pose of copies, from MuJoCo's quaternion order."""
    return Pose(position.copy(), np.roll(quaternion_wxyz, -1))


class Scene:
    """The MuJoCo model and its state (`model`, `data`), and the logic of LED and lamp."""

    def __init__(self) -> None:
        self.model = mujoco.MjModel.from_xml_path(str(TABLE_FILE))
        self.data = mujoco.MjData(self.model)
        self._joint_speeds = self.data.qvel[:JOINTS]  # a view, not a copy
        self.joint_names = tuple(f"panda_joint{n}" for n in range(1, JOINTS + 1)) + (
            "panda_finger_joint1",
            "panda_finger_joint2",
        )
        self._tcp = self.model.site("tcp").id
        self._address = {
            self.model.joint(n).name: int(self.model.joint(n).qposadr[0]) for n in range(self.model.njnt)
        }
        self._led_geom, self._lamp_geom = self.model.geom("led").id, self.model.geom("lamp").id
        self._led_materials = self.model.material("led_off").id, self.model.material("led_on").id
        self._lamp_materials = self.model.material("lamp_off").id, self.model.material("lamp_on").id
        self._led = self._lamp = self._button_down = False
        self._static_camera = self.model.camera("static").id
        self._camera_pose = (
            self.model.cam_pos[self._static_camera].copy(),
            self.model.cam_quat[self._static_camera].copy(),
        )

    def arrange(self, random: np.random.Generator, varied: bool = False) -> None:
        """Puts everything at rest in a random arrangement, with the arm at home and its gripper open.

        varied: as at the start of evaluation and training. Sometimes a block is in the drawer or on another
        block, the arm is only near home, and the static camera is slightly moved.
        """
        mujoco.mj_resetData(self.model, self.data)
        joints = np.concatenate([HOME_JOINTS, [MAX_OPENING / 2, MAX_OPENING / 2]])
        self.data.qpos[: len(joints)] = joints
        self.data.ctrl[: len(joints)] = joints
        for colour, centre in zip(COLOURS, _block_centres(random)):
            yaw = random.uniform(-np.pi / 4, np.pi / 4)
            self._put_block(colour, [*centre, BLOCK_HALF], yaw)
        self._set("drawer", random.choice([0.0, 0.13]))
        self._set("slider", random.choice([0.0, 0.20]))
        self._set("switch", random.choice([0.0, 0.06]))
        self._led = bool(random.integers(2))
        self._button_down = False
        self._place_camera(np.zeros(6))
        if varied:
            self._vary(random)
        self._set_lights()
        mujoco.mj_forward(self.model, self.data)

    def camera_pose(self, name: str) -> tuple[np.ndarray, np.ndarray, float]:
        """Returns position (3,) [m], rotation (3, 3) and field of view [rad] of a camera in the base frame.

        The camera's x is right, y is up, and it looks along -z. Its image is square.
        """
        camera = self.model.camera(name).id
        rotation = self.data.cam_xmat[camera].reshape(3, 3).copy()
        return self.data.cam_xpos[camera].copy(), rotation, float(np.deg2rad(self.model.cam_fovy[camera]))

    def _vary(self, random: np.random.Generator) -> None:
        upper, lower = (COLOURS[i] for i in random.permutation(len(COLOURS))[:2])
        where = random.choice(["table", "drawer", "stack"], p=[0.5, 0.25, 0.25])
        if where == "drawer":
            offset = random.uniform([-0.012, -0.008], [0.012, 0.008])
            self._put_block(
                upper,
                [*(DRAWER_PLACE - [self._get("drawer"), 0.0] + offset), 0.032],
                random.uniform(-0.3, 0.3),
            )
        elif where == "stack":
            start = self._address[f"{lower}_block"]
            offset = random.uniform(-0.004, 0.004, 2)
            centre = [*(self.data.qpos[start : start + 2] + offset), 3 * BLOCK_HALF]
            self._put_block(upper, centre, random.uniform(-np.pi / 4, np.pi / 4))
        joints = HOME_JOINTS + random.uniform(-0.08, 0.08, JOINTS)
        self.data.qpos[:JOINTS] = self.data.ctrl[:JOINTS] = joints
        self._place_camera(random.uniform(-1.0, 1.0, 6))

    def _place_camera(self, offset: np.ndarray) -> None:
        """Moves the static camera by `offset` (6,), in units of CAMERA_SHIFT_M and CAMERA_TURN_RAD."""
        position, quaternion = self._camera_pose
        turned = quaternion.copy()
        mujoco.mju_quatIntegrate(turned, offset[3:] * CAMERA_TURN_RAD, 1.0)
        self.model.cam_pos[self._static_camera] = position + offset[:3] * CAMERA_SHIFT_M
        self.model.cam_quat[self._static_camera] = turned

    def _put_block(self, colour: str, centre, yaw: float) -> None:
        start = self._address[f"{colour}_block"]
        self.data.qpos[start : start + 7] = [*centre, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]

    def step(self) -> None:
        """Does one physics step of `model.opt.timestep` seconds."""
        mujoco.mj_step(self.model, self.data)
        np.clip(self._joint_speeds, -DRIVE_SPEED_LIMIT, DRIVE_SPEED_LIMIT, out=self._joint_speeds)
        button = self._get("button")
        if not self._button_down and button > _BUTTON_PRESSED:
            self._button_down = True
            self._led = not self._led
            self._set_lights()
        elif self._button_down and button < _BUTTON_RELEASED:
            self._button_down = False
        if self._lamp != self._switch_says_on():
            self._set_lights()

    def tcp(self) -> Pose:
        """Returns the measured TCP pose."""
        quaternion = np.empty(4)
        mujoco.mju_mat2Quat(quaternion, self.data.site_xmat[self._tcp])
        return pose_of(self.data.site_xpos[self._tcp], quaternion)

    def state(self) -> TableState:
        """Returns everything that tasks can ask about."""
        red, blue, pink = (self._block(colour) for colour in COLOURS)
        return TableState(
            red=red,
            blue=blue,
            pink=pink,
            drawer=self._get("drawer"),
            slider=self._get("slider"),
            led=self._led,
            lamp=self._lamp,
            switch=self._get("switch"),
            tcp=self.tcp(),
            opening=self._get("panda_finger_joint1") + self._get("panda_finger_joint2"),
        )

    def _block(self, colour: str) -> Pose:
        start = self._address[f"{colour}_block"]
        return pose_of(self.data.qpos[start : start + 3], self.data.qpos[start + 3 : start + 7])

    def _get(self, joint: str) -> float:
        return float(self.data.qpos[self._address[joint]])

    def _set(self, joint: str, value: float) -> None:
        self.data.qpos[self._address[joint]] = value

    def _switch_says_on(self) -> bool:
        travel = self._get("switch")
        return travel > (_SWITCH_OFF if self._lamp else _SWITCH_ON)

    def _set_lights(self) -> None:
        self._lamp = self._switch_says_on()
        self.model.geom_matid[self._led_geom] = self._led_materials[self._led]
        self.model.geom_matid[self._lamp_geom] = self._lamp_materials[self._lamp]


def _block_centres(random: np.random.Generator) -> np.ndarray:
    """Draws x and y of the blocks, (3, 2), until all distances are at least BLOCK_DISTANCE."""
    while True:
        centres = random.uniform(BLOCK_AREA[:, 0], BLOCK_AREA[:, 1], size=(len(COLOURS), 2))
        distances = np.linalg.norm(centres - np.roll(centres, 1, axis=0), axis=1)
        if distances.min() >= BLOCK_DISTANCE:
            return centres
