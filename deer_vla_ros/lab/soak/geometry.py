"""The measures of poses that the judge needs.

They share no code with the node, to be independent of its errors.
"""

from __future__ import annotations

import math

import numpy as np


def angle_between(first: np.ndarray, second: np.ndarray) -> float:
    """The angle [rad] between two orientations, quaternions (4,) xyzw of about unit length."""
    first, second = first / np.linalg.norm(first), second / np.linalg.norm(second)
    # The chord is exact for small angles; the arc cosine of the product is not.
    chord = min(float(np.linalg.norm(first - second)), float(np.linalg.norm(first + second)))
    return 4 * math.asin(min(chord / 2, 1.0))


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """The distance [m] of two positions (3,)."""
    return float(np.linalg.norm(first - second))


def outside_by(position: np.ndarray, low: tuple[float, ...], high: tuple[float, ...]) -> float:
    """The distance [m] of a position (3,) from a box; 0 inside the box."""
    return float(np.linalg.norm(position - np.clip(position, low, high)))


def is_pose(position: np.ndarray, quaternion: np.ndarray) -> bool:
    """Whether a pose is possible: finite, within a kilometre, a quaternion (4,) of about unit length."""
    finite = bool(np.isfinite(position).all() and np.isfinite(quaternion).all())
    return finite and float(np.abs(position).max()) < 1e3 and abs(float(np.linalg.norm(quaternion)) - 1) < 0.1


def twist_between(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The rotation vector (3,) [rad], along fixed axes, from orientation `start` to `end`, (4,) xyzw."""
    x, y, z, w = _product(end / np.linalg.norm(end), _conjugate(start / np.linalg.norm(start)))
    if w < 0:
        x, y, z, w = -x, -y, -z, -w
    axis = np.array([x, y, z])
    sine = float(np.linalg.norm(axis))
    return axis * (2 * math.atan2(sine, w) / sine) if sine > 0 else axis


def _conjugate(quaternion: np.ndarray) -> np.ndarray:
    return quaternion * np.array([-1.0, -1.0, -1.0, 1.0])


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    (ax, ay, az, aw), (bx, by, bz, bw) = left, right
    return np.array(
        [
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
            aw * bw - ax * bx - ay * by - az * bz,
        ]
    )
