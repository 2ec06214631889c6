"""The quirks: all ways in which the fake robot can misbehave, by name."""

from __future__ import annotations

import array
import copy
import math
from collections.abc import Callable

import numpy as np
from geometry_msgs.msg import PoseStamped
from sensor_msgs.msg import Image

from deer_vla_ros.ros.messages import SECOND, image_message, nanoseconds, stamp

ImageQuirk = Callable[[str, Image], "Image | None"]
"""Takes the camera's name and a good image; returns the image to publish instead, or None to publish none."""
PoseQuirk = Callable[[PoseStamped], "PoseStamped | None"]
"""Takes a good measured pose; returns the pose to publish instead, or None to publish none."""

LAG_S = 0.25
"""How far the gripper camera's stamps lag when it is skewed: five times the skew that the node allows, but
less than the age that it allows."""
SHUFFLE_S = 0.25
"""How far in the past the stamps that are out of order are at most."""
AHEAD_S = 10.0
"""How far in the future stamps are."""
SLOW_EVERY = 10
"""A slow camera publishes one of this many frames, which gives 1 Hz."""
SIZES = ((160, 120), (31, 57), (64, 64))
"""Width and height of the images, one pair after another."""


def _nothing() -> ImageQuirk:
    return lambda camera, image: None


def _only(name: str, quirk: ImageQuirk) -> ImageQuirk:
    """The quirk on one camera alone."""
    return lambda camera, image: quirk(camera, image) if camera == name else image


def _restamped(change: Callable[[int], int]) -> ImageQuirk:
    def edit(camera: str, image: Image) -> Image:
        image.header.stamp = stamp(change(nanoseconds(image.header.stamp)))
        return image

    return edit


def _frozen() -> ImageQuirk:
    """Repeats the first image of each camera, with its stamp."""
    kept: dict[str, Image] = {}
    return lambda camera, image: kept.setdefault(camera, image)


def _slow() -> ImageQuirk:
    count = {"static": 0, "gripper": 0}

    def edit(camera: str, image: Image) -> Image | None:
        count[camera] += 1
        return image if count[camera] % SLOW_EVERY == 0 else None

    return edit


def _out_of_order() -> ImageQuirk:
    random = np.random.default_rng(0)
    return _restamped(lambda ns: ns - int(random.uniform(0, SHUFFLE_S) * SECOND))


def _other_clock() -> ImageQuirk:
    """Stamps that count from 1970, as those of a camera whose clock was never set."""
    first: list[int] = []

    def since_first(ns: int) -> int:
        first.append(ns) if not first else None
        return ns - first[0] + SECOND

    return _restamped(since_first)


def _other_sizes() -> ImageQuirk:
    random, count = np.random.default_rng(0), [0]

    def edit(camera: str, image: Image) -> Image:
        count[0] += 1
        width, height = SIZES[count[0] // 4 % len(SIZES)]
        pixels = random.integers(0, 255, (height, width, 3), dtype=np.uint8)
        return image_message(pixels, image.header.frame_id, nanoseconds(image.header.stamp))

    return edit


def _encoded(name: str, channels: int) -> ImageQuirk:
    def edit(camera: str, image: Image) -> Image:
        image.encoding, image.step = name, channels * image.width
        image.data = image.data[: image.step * image.height]
        return image

    return edit


def _truncated() -> ImageQuirk:
    def edit(camera: str, image: Image) -> Image:
        image.data = image.data[: len(image.data) // 2]
        return image

    return edit


def _absurd_header() -> ImageQuirk:
    def edit(camera: str, image: Image) -> Image:
        image.width = image.height = image.step = 2**32 - 1
        image.data = array.array("B", [0] * 16)
        return image

    return edit


def _no_pose() -> PoseQuirk:
    return lambda pose: None


def _frozen_pose() -> PoseQuirk:
    """Repeats the first pose with new stamps, as a driver does that has lost its robot."""
    kept: list[PoseStamped] = []

    def edit(pose: PoseStamped) -> PoseStamped:
        kept.append(copy.deepcopy(pose)) if not kept else None
        pose.pose = kept[0].pose
        return pose

    return edit


def _moved_to(x: float, y: float, z: float) -> PoseQuirk:
    def edit(pose: PoseStamped) -> PoseStamped:
        pose.pose.position.x, pose.pose.position.y, pose.pose.position.z = x, y, z
        return pose

    return edit


def _zero_quaternion() -> PoseQuirk:
    def edit(pose: PoseStamped) -> PoseStamped:
        turned = pose.pose.orientation
        turned.x = turned.y = turned.z = turned.w = 0.0
        return pose

    return edit


def _first_pose_zero() -> PoseQuirk:
    """Publishes nothing for a while, then a default pose without values, as a driver does that starts."""
    count = [0]

    def edit(pose: PoseStamped) -> PoseStamped | None:
        count[0] += 1
        if count[0] < 20:
            return None
        turned = pose.pose.orientation
        turned.x, turned.y, turned.z, turned.w = 0.0, 0.0, 0.0, 1.0
        return _moved_to(0.0, 0.0, 0.0)(pose)

    return edit


def _wrong_frame() -> PoseQuirk:
    def edit(pose: PoseStamped) -> PoseStamped:
        pose.header.frame_id = "camera_link"
        return pose

    return edit


IMAGE_QUIRKS: dict[str, Callable[[], ImageQuirk]] = {
    "static_camera_killed": lambda: _only("static", _nothing()),
    "gripper_camera_killed": lambda: _only("gripper", _nothing()),
    "camera_frozen": _frozen,
    "camera_slow": _slow,
    "stamps_out_of_order": _out_of_order,
    "stamps_of_another_clock": _other_clock,
    "stamps_zero": lambda: _restamped(lambda ns: 0),
    "stamps_in_future": lambda: _restamped(lambda ns: ns + int(AHEAD_S * SECOND)),
    "cameras_skewed": lambda: _only("gripper", _restamped(lambda ns: ns - int(LAG_S * SECOND))),
    "resolution_changes": _other_sizes,
    "encoding_bgr8": lambda: _encoded("bgr8", 3),
    "encoding_mono8": lambda: _encoded("mono8", 1),
    "encoding_unknown": lambda: _encoded("yuv422_yuy2", 2),
    "images_truncated": _truncated,
    "image_header_absurd": _absurd_header,
}
POSE_QUIRKS: dict[str, Callable[[], PoseQuirk]] = {
    "pose_absent": _no_pose,
    "pose_frozen": _frozen_pose,
    "pose_nan": lambda: _moved_to(math.nan, 0.0, 0.3),
    "pose_huge": lambda: _moved_to(1e300, 1e300, -1e300),
    "pose_zero_quaternion": _zero_quaternion,
    "pose_first_zero": _first_pose_zero,
    "pose_wrong_frame": _wrong_frame,
}
CLOCK_QUIRKS = ("clock_jumps_back", "clock_jumps_forward", "clock_stops")
"""After the fault the clock continues from the time to which it jumped, or at which it stopped."""
ARM_QUIRKS = ("arm_stuck", "commands_unheard")
"""An arm that does not follow its commands, and an arm that does not subscribe to them."""
CLOCK_JUMP_S = 20.0
