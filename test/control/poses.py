"""Poses and motions for property tests of the package `control`."""

import numpy as np
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from deer_vla_ros.control.types import Pose

coordinates = st.floats(-1.0, 1.0, allow_nan=False)
vectors = st.tuples(coordinates, coordinates, coordinates).map(np.array)
rotations = st.tuples(coordinates, coordinates, coordinates).map(
    lambda v: Rotation.from_rotvec(3.0 * np.array(v))
)
poses = st.builds(lambda position, rotation: Pose(position, rotation.as_quat()), vectors, rotations)


def angle_between(a: Pose, b: Pose) -> float:
    """The angle [rad] between the orientations of two poses."""
    return (Rotation.from_quat(a.quaternion) * Rotation.from_quat(b.quaternion).inv()).magnitude()


def distance_between(a: Pose, b: Pose) -> float:
    """The distance [m] of the positions of two poses."""
    return float(np.linalg.norm(a.position - b.position))
