"""A table, an arm and two cameras in MuJoCo: the simulated robot, without ROS and without the policy.

`Table` (table.py) is the complete robot. scene.py holds the objects, kinematics.py moves the arm to a pose,
and cameras.py renders the images. All poses are in the frame `base`: the arm's mounting flange on the table
top, x away from the arm, y to its left, z up. Units are metres, radians and seconds; quaternions are xyzw.
"""

import os
import sys

from deer_vla_ros.errors import UserError

# MuJoCo chooses its OpenGL when it is imported. The default here is headless.
if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")
    # The software renderer's threads would use the policy's cores, and small images do not need them.
    os.environ.setdefault("LP_NUM_THREADS", "1")

try:
    import mujoco  # noqa: F401
except ImportError as error:
    raise UserError(f"the simulated table needs MuJoCo ({error}): pip install mujoco") from error
except (AttributeError, OSError, RuntimeError) as error:  # each OpenGL backend raises another one
    raise UserError(
        f"MuJoCo does not start with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')} ({error}): unset MUJOCO_GL, "
        "and apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0"
    ) from error
