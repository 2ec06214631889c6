"""The images of the two cameras: headless OpenGL rendering of the scene."""

from __future__ import annotations

import os

import mujoco

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.sim.state import Views

STATIC_SIZE = 200  # pixels, square, as CALVIN's static camera
GRIPPER_SIZE = 84  # pixels, square, as CALVIN's gripper camera


class Cameras:
    """Both cameras of a model. Create, use and close them in the same thread, because of OpenGL."""

    def __init__(self, model: mujoco.MjModel) -> None:
        """Raises UserError with the packages to install if OpenGL does not work."""
        try:
            self._static = mujoco.Renderer(model, STATIC_SIZE, STATIC_SIZE)
            self._gripper = mujoco.Renderer(model, GRIPPER_SIZE, GRIPPER_SIZE)
        except Exception as error:  # each OpenGL backend has error classes of its own
            raise UserError(
                f"MuJoCo cannot render with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')} ({error}): "
                "unset MUJOCO_GL, and apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0"
            ) from error

    def render(self, data: mujoco.MjData) -> Views:
        """Renders the current state with both cameras."""
        self._static.update_scene(data, "static")
        self._gripper.update_scene(data, "gripper")
        return Views(self._static.render(), self._gripper.render())

    def close(self) -> None:
        self._static.close()
        self._gripper.close()
