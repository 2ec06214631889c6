"""How does an image message become (H, W, 3) uint8 RGB? Raw or compressed, whatever the camera's layout; or why it does not."""

from __future__ import annotations

import contextlib
import io
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as Picture
from sensor_msgs.msg import CompressedImage, Image

from deer_vla_ros.control.types import Frame
from deer_vla_ros.errors import UserError
from deer_vla_ros.ros.stamped import nanoseconds

if TYPE_CHECKING:
    from cv_bridge import CvBridge

MAX_SIDE = 8192
"""Pixels. Far above any camera of a policy, and low enough that a forged header cannot ask for more than 0.3 GB."""


@dataclass(frozen=True)
class Encoding:
    """rgb: where red, green and blue stand among the `channels`. bridged: whether cv_bridge converts it to rgb8 as well."""

    rgb: tuple[int, int, int]
    channels: int
    channel_bytes: int = 1
    bridged: bool = True

    @property
    def pixel_bytes(self) -> int:
        return self.channels * self.channel_bytes


RGB, BGR, MONO = (0, 1, 2), (2, 1, 0), (0, 0, 0)

# 8UC3 and 8UC1 do not say what they show, so cv_bridge refuses to make colours of them. OpenCV, whose names they are, keeps
# colour images as BGR, and that is what a driver that publishes a cv::Mat under its type's name sends.
ENCODINGS = {
    "rgb8": Encoding(RGB, 3),
    "bgr8": Encoding(BGR, 3),
    "rgba8": Encoding(RGB, 4),
    "bgra8": Encoding(BGR, 4),
    "mono8": Encoding(MONO, 1),
    "8UC3": Encoding(BGR, 3, bridged=False),
    "8UC1": Encoding(MONO, 1, bridged=False),
    "rgb16": Encoding(RGB, 3, 2),
    "bgr16": Encoding(BGR, 3, 2),
    "rgba16": Encoding(RGB, 4, 2),
    "bgra16": Encoding(BGR, 4, 2),
    "mono16": Encoding(MONO, 1, 2),
}


def frame(message: Image) -> Frame:
    """A raw image as a frame; raises UserError. The frame may share the message's memory: do not write to the message after."""
    _check_layout(message)
    bridged = BRIDGE is not None and bridgeable(message)
    image = BRIDGE.imgmsg_to_cv2(message, "rgb8") if bridged else by_numpy(message)
    return Frame(image, nanoseconds(message.header.stamp))


def compressed_frame(message: CompressedImage) -> Frame:
    """A JPEG or PNG as a frame; raises UserError.

    The bytes say what they are: `format` repeats the encoding that the camera had before compression, and both file formats
    store colours as RGB whatever that was.
    """
    if "compresseddepth" in message.format.lower():
        raise UserError(f"format {_quoted(message.format)} is a depth image: remap to the camera's colour image")
    return Frame(_decoded(bytes(message.data), message.format), nanoseconds(message.header.stamp))


def by_numpy(message: Image) -> np.ndarray:
    """RGB of a message whose layout was checked; without a copy where the message is packed rgb8."""
    encoding, height, width, step = ENCODINGS[message.encoding], message.height, message.width, message.step
    rows = np.frombuffer(message.data, np.uint8, height * step).reshape(height, step)[:, : width * encoding.pixel_bytes]
    if encoding.channel_bytes == 2:
        rows = _eight_bits(rows.view(">u2" if message.is_bigendian else "<u2"))
    pixels = rows.reshape(height, width, encoding.channels)
    if encoding.rgb == RGB and encoding.channels == 3:
        return np.ascontiguousarray(pixels)
    image = np.empty((height, width, 3), np.uint8)
    for target, source in enumerate(encoding.rgb):  # a third of the time of a copy of a reversed view
        image[..., target] = pixels[..., source]
    return image


def bridgeable(message: Image) -> bool:
    """Whether cv_bridge reads this layout rightly.

    Its Python part counts a row's length in whole pixels, so that a step between two of them shears the image, and it knows
    no other byte orders than 0 and 1.
    """
    encoding = ENCODINGS[message.encoding]
    return encoding.bridged and message.step % encoding.pixel_bytes == 0 and message.is_bigendian in (0, 1)


def find_bridge() -> tuple[CvBridge | None, str]:
    """cv_bridge, if its conversions are those of `by_numpy`; otherwise None, and why in one line.

    Ubuntu's package is compiled for numpy 1. Under numpy 2 its import fails, or succeeds and the first conversion crashes,
    after numpy has written a page about it to stderr: that page is the sign, and is kept out of the log as the reason says it.
    """
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            from cv_bridge import CvBridge
            from cv_bridge.boost import cv_bridge_boost  # noqa: F401

            bridge = CvBridge()
        if "compiled using NumPy 1" in stderr.getvalue():
            return None, f"cv_bridge is compiled for numpy 1 and this is numpy {np.__version__}"
        for message in _probes():
            if not np.array_equal(bridge.imgmsg_to_cv2(message, "rgb8"), by_numpy(message)):
                return None, f"cv_bridge converts {message.encoding} (is_bigendian {message.is_bigendian}) to other values"
    except Exception as error:  # whatever a broken build raises: the numpy path gives the same pixels
        missing = isinstance(error, ModuleNotFoundError) and error.name == "cv_bridge"
        return None, "cv_bridge is not installed" if missing else f"cv_bridge, numpy {np.__version__}: {_one_line(error)}"
    return bridge, ""


def _probes() -> list[Image]:
    """Small images of every encoding and byte order, with padded rows."""
    probes = []
    for name, encoding in ENCODINGS.items():
        step = 4 * encoding.pixel_bytes
        data = array("B", [37 * index % 256 for index in range(2 * step)])
        for order in (0, 1):
            probes.append(Image(height=2, width=3, step=step, encoding=name, is_bigendian=order, data=data))
    return list(filter(bridgeable, probes))


def _check_layout(message: Image) -> None:
    if message.encoding not in ENCODINGS:
        raise UserError(f"encoding {_quoted(message.encoding)} is not supported: publish one of {', '.join(ENCODINGS)}")
    height, width, step = message.height, message.width, message.step
    _check_size(width, height)
    row = width * ENCODINGS[message.encoding].pixel_bytes
    if step < row or len(message.data) < height * step:
        raise UserError(
            f"{width} x {height} {message.encoding} with step {step} needs {height * max(step, row)} bytes in rows of {row} or "
            f"more, the message has {len(message.data)}: mend the camera driver"
        )


def _decoded(data: bytes, name: str) -> np.ndarray:
    try:
        picture = Picture.open(io.BytesIO(data), formats=("JPEG", "PNG"))  # reads the header only
    except (Picture.DecompressionBombError, Picture.DecompressionBombWarning) as error:
        raise UserError(f"{_one_line(error)} A side may have 1 to {MAX_SIDE} pixels: mend the camera driver") from error
    except Exception as error:  # Pillow's parsers raise anything, SyntaxError included, when fed with arbitrary bytes
        raise UserError(f"{len(data)} bytes of format {_quoted(name)} are no JPEG or PNG: publish one of these") from error
    _check_size(*picture.size)
    try:
        if picture.format == "PNG":
            picture.verify()  # the checksums, which decoding skips; after that the file has to be opened again
            picture = Picture.open(io.BytesIO(data), formats=("PNG",))
        elif data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
            # Pillow misses it where the rest is padding, or where a library has set LOAD_TRUNCATED_IMAGES.
            raise EOFError("no end of image after the last scan")
        if picture.mode.startswith("I"):  # grey of 16 bits: I, I;16 or I;16B, depending on Pillow's version
            return np.repeat(_eight_bits(np.array(picture))[..., None], 3, axis=2)
        return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
    except Exception as error:
        raise UserError(
            f"the {picture.format} image of {len(data)} bytes is corrupt ({_one_line(error)}): check the camera's link and driver"
        ) from error


def _check_size(width: int, height: int) -> None:
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise UserError(f"the image is {width} x {height}, a side may have 1 to {MAX_SIDE} pixels: mend the camera driver")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """0..65535 onto 0..255, to the nearest; the values of OpenCV's convertTo(..., 255. / 65535.), which has no ties to break.

    A division by 257 that never leaves 16 bits: the plain one in 32 bits takes ten times as long.
    """
    values = values.astype(np.uint16, copy=False)
    return ((values - (((values >> 1) + 64) >> 7) + 128) >> 8).astype(np.uint8)


def _quoted(text: str) -> str:
    """What a message brought, short and on one line."""
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


BRIDGE, NO_BRIDGE = find_bridge()  # decided once; NO_BRIDGE: why there is none
