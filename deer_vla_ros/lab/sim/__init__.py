"""A table, an arm and two cameras in MuJoCo: the simulated robot, without ROS and without the policy.

`Table` (table.py) is the whole of it; scene.py says what stands where, kinematics.py how the arm gets to a pose,
cameras.py what it looks like. Frame of every pose: `base`, the arm's mounting flange on the table top, x away from
the arm, y to its left, z up. Metres, radians, seconds, quaternions xyzw.
"""

import os
import sys

from deer_vla_ros.errors import UserError

# MuJoCo chooses its OpenGL once, when it is imported: headless where the user has not said otherwise.
if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")
    # The software renderer's threads would take the cores the policy runs on, and small images gain nothing from them.
    os.environ.setdefault("LP_NUM_THREADS", "1")

try:
    import mujoco  # noqa: F401
except ImportError as error:
    raise UserError(f"the simulated table needs MuJoCo ({error}): pip install mujoco") from error
except (
    AttributeError,
    OSError,
    RuntimeError,
) as error:  # what a missing or unknown OpenGL raises, by backend
    raise UserError(
        f"MuJoCo does not start with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')} ({error}): unset MUJOCO_GL, and "
        "apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0"
    ) from error
