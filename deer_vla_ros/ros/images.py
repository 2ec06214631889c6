"""Conversion of raw and compressed image messages to RGB arrays (H, W, 3) of uint8; UserError for others."""

from __future__ import annotations

import contextlib
import io
import re
import struct
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as Picture
from sensor_msgs.msg import CompressedImage, Image

from deer_vla_ros.control.types import Frame
from deer_vla_ros.errors import UserError, cause
from deer_vla_ros.ros.messages import nanoseconds

if TYPE_CHECKING:
    from cv_bridge import CvBridge

MAX_SIDE = 8192
"""Largest width or height in pixels. It is far above any camera of a policy."""
MAX_PIXELS = 12_500_000
"""Largest width times height. A 4K camera has 8.3 million, a sensor of "12 megapixels" has 12.0 to 12.4."""

# With these limits, one core decodes the worst accepted file in about one second. They are checked on the
# file's structure, before Pillow reads it. They count bytes and pixels and not time, so that a replay decides
# the same on every machine.
MAX_JPEG_BYTES = 16_000_000
MAX_PIXEL_SCANS = 100_000_000
"""Scans times pixels. Every scan of a JPEG visits the whole picture again, even if it has only 26 bytes.
This costs up to 9 ns per pixel. A progressive JPEG of a 4K camera has 10 scans: 83 million."""
MAX_HEADER_BYTES, MAX_SEGMENTS = 1_000_000, 256
"""Bytes and segments of a JPEG before its first scan: Pillow reads these segments in Python."""
MAX_PNG_BYTES = 6_500_000
"""Noise of 1920 x 1080 fits. Inflating costs up to 140 ns per byte of a malicious file."""
MAX_PNG_RAW_BYTES = 50_000_000
"""Rows of pixels after inflating. A 4K image with 16 bits per channel fits."""
MAX_CHUNKS, MAX_OTHER_CHUNKS = 10_000, 32
"""Chunks of a PNG: all, and those without image data. Each of the latter may inflate to 1 MB in Pillow."""

JPEG, PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
"""The first bytes of each file format."""
MARKER = re.compile(rb"\xff([^\x00\xff])")
SCAN = 0xDA
OTHER_CODINGS = {0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)}
"""JPEG frame markers that no camera sends: lossless, hierarchical, or slow (arithmetic coding)."""
WITHOUT_LENGTH = {0x01, *range(0xD0, 0xDA)}
"""JPEG markers that no length field follows."""
CHUNK_NAME = re.compile(rb"\w{4}")
CHANNELS_OF_PNG = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Number of channels, by the colour type in the PNG's header."""


@dataclass(frozen=True)
class Encoding:
    """An encoding of raw images. rgb: positions of red, green and blue among the `channels`.

    bridged: whether cv_bridge, too, converts it to rgb8.
    """

    rgb: tuple[int, int, int]
    channels: int
    channel_bytes: int = 1
    bridged: bool = True

    @property
    def pixel_bytes(self) -> int:
        """Bytes of a pixel."""
        return self.channels * self.channel_bytes


RGB, BGR, MONO = (0, 1, 2), (2, 1, 0), (0, 0, 0)

# 8UC3 and 8UC1 do not say which colours they contain, so cv_bridge refuses to convert them. These are
# OpenCV's names of types, and OpenCV keeps colour images as BGR: a driver that publishes a cv::Mat sends BGR.
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
    """A raw image as a frame; raises UserError.

    The frame may share the memory of the message: do not change the message afterwards.
    """
    _check_layout(message)
    bridged = BRIDGE is not None and bridgeable(message)
    image = BRIDGE.imgmsg_to_cv2(message, "rgb8") if bridged else by_numpy(message)
    return Frame(image, nanoseconds(message.header.stamp))


def compressed_frame(message: CompressedImage) -> Frame:
    """A JPEG or PNG as a frame; raises UserError.

    The first bytes show the file format. `format` also names the encoding before compression, which does not
    matter: both file formats store RGB.
    """
    if "compresseddepth" in message.format.lower():
        raise UserError(
            f"format {_quoted(message.format)} is a depth image: remap to the camera's colour image"
        )
    return Frame(_decoded(bytes(message.data), message.format), nanoseconds(message.header.stamp))


def by_numpy(message: Image) -> np.ndarray:
    """A message, whose layout was checked, as (H, W, 3) uint8 RGB. Packed rgb8 is not copied."""
    encoding, height, width, step = ENCODINGS[message.encoding], message.height, message.width, message.step
    rows = np.frombuffer(message.data, np.uint8, height * step).reshape(height, step)[
        :, : width * encoding.pixel_bytes
    ]
    if encoding.channel_bytes == 2:
        rows = _eight_bits(rows.view(">u2" if message.is_bigendian else "<u2"))
    pixels = rows.reshape(height, width, encoding.channels)
    if encoding.rgb == RGB and encoding.channels == 3:
        return np.ascontiguousarray(pixels)
    image = np.empty((height, width, 3), np.uint8)
    for target, source in enumerate(encoding.rgb):  # three times as fast as copying a reversed view
        image[..., target] = pixels[..., source]
    return image


def bridgeable(message: Image) -> bool:
    """Whether cv_bridge reads this layout correctly.

    Its Python part counts the length of a row in whole pixels: it shears an image whose step is not a
    multiple of the pixel size. It only knows the byte orders 0 and 1.
    """
    encoding = ENCODINGS[message.encoding]
    return encoding.bridged and message.step % encoding.pixel_bytes == 0 and message.is_bigendian in (0, 1)


def find_bridge() -> tuple[CvBridge | None, str]:
    """cv_bridge and an empty text if it converts as `by_numpy` does; otherwise None and the reason.

    Ubuntu's package is compiled for numpy 1. Under numpy 2 its import fails, or the import succeeds and the
    first conversion crashes. In the second case numpy writes a page about it to stderr during the import.
    This function looks for that page and keeps it out of the log.
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
                return (
                    None,
                    f"cv_bridge converts {message.encoding} (is_bigendian {message.is_bigendian}) to other "
                    "values",
                )
    except Exception as error:  # of any kind, from a broken build; `by_numpy` gives the same pixels
        missing = isinstance(error, ModuleNotFoundError) and error.name == "cv_bridge"
        return (
            None,
            "cv_bridge is not installed" if missing else f"cv_bridge, numpy {np.__version__}: {cause(error)}",
        )
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
        raise UserError(
            f"encoding {_quoted(message.encoding)} is not supported: publish one of {', '.join(ENCODINGS)}"
        )
    height, width, step = message.height, message.width, message.step
    _check_size(width, height)
    row = width * ENCODINGS[message.encoding].pixel_bytes
    if step < row or len(message.data) < height * step:
        raise UserError(
            f"{width} x {height} {message.encoding} with step {step} needs {height * max(step, row)} bytes "
            f"in rows of {row} or more, the message has {len(message.data)}: mend the camera driver"
        )


def _decoded(data: bytes, name: str) -> np.ndarray:
    if data.startswith(JPEG):
        _check_jpeg(data)
    elif data.startswith(PNG):
        _check_png(data)
    try:
        picture = Picture.open(io.BytesIO(data), formats=("JPEG", "PNG"))  # reads the header only
    except Exception as error:  # for arbitrary bytes, Pillow's parsers raise anything, even SyntaxError
        raise UserError(
            f"{len(data)} bytes of format {_quoted(name)} are no JPEG or PNG: publish one of these"
        ) from error
    _check_size(*picture.size)
    if data.startswith(JPEG):
        _check_scans(data, *picture.size)
    try:
        if picture.format == "PNG":
            picture.verify()  # the checksums, which decoding skips; it makes a second open necessary
            picture = Picture.open(io.BytesIO(data), formats=("PNG",))
        elif data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
            # Pillow does not notice it if padding follows, or if a library has set LOAD_TRUNCATED_IMAGES.
            raise EOFError("no end of image after the last scan")
        if picture.mode.startswith("I"):  # grey of 16 bits: I, I;16 or I;16B, depending on Pillow's version
            return np.repeat(_eight_bits(np.array(picture))[..., None], 3, axis=2)
        return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
    except Exception as error:
        raise UserError(
            f"the {picture.format} image of {len(data)} bytes is corrupt ({cause(error)}): "
            "check the camera's link and driver"
        ) from error


def _check_size(width: int, height: int) -> None:
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise UserError(
            f"the image is {width} x {height}, a side may have 1 to {MAX_SIDE} pixels: mend the camera driver"
        )
    what = f"the image of {width} x {height} has"
    _check_limit(what, width * height, MAX_PIXELS, "pixels", "set the camera to a lower resolution")


def _check_limit(what: str, value: int, limit: int, unit: str, remedy: str) -> None:
    if value > limit:
        raise UserError(f"{what} {value} {unit}, at most {limit} are accepted: {remedy}")


def _check_jpeg(data: bytes) -> None:
    """Checks the length of the file, and the segments before its first scan, found as libjpeg finds them."""
    _check_limit("the JPEG has", len(data), MAX_JPEG_BYTES, "bytes", "set a lower quality or resolution")
    remedy = "leave out what the camera driver adds"
    position = len(JPEG)
    for _ in range(MAX_SEGMENTS):
        found = MARKER.search(data, position)
        if found is None or found[1][0] == SCAN:
            return  # if no marker was found, Pillow reports what is missing
        marker, position = found[1][0], found.end()
        if marker in OTHER_CODINGS:
            coding = f"the JPEG is of coding SOF{marker - 0xC0}, only SOF0 to SOF2 are accepted"
            raise UserError(f"{coding}: publish a baseline JPEG")
        if marker not in WITHOUT_LENGTH:
            position += int.from_bytes(data[position : position + 2], "big")
        _check_limit("the JPEG's header has", position, MAX_HEADER_BYTES, "bytes", remedy)
    raise UserError(f"the JPEG's header has more than {MAX_SEGMENTS} segments: {remedy}")


def _check_scans(data: bytes, width: int, height: int) -> None:
    """Counts the scan markers anywhere in the file: libjpeg cannot find more scans than these."""
    values = np.frombuffer(data, np.uint8)
    scans = np.count_nonzero(values[1:][values[:-1] == 0xFF] == SCAN)  # ten times as fast as bytes.count
    what = f"the JPEG of {width} x {height} in {scans} scans visits"
    remedy = "publish a baseline JPEG, which has one scan"
    _check_limit(what, scans * width * height, MAX_PIXEL_SCANS, "pixels", remedy)


def _check_png(data: bytes) -> None:
    """Checks the file's length, its dimensions and its chunks, of which it reads only names and lengths."""
    _check_limit("the PNG has", len(data), MAX_PNG_BYTES, "bytes", "publish a JPEG or a lower resolution")
    position, others = len(PNG), 0
    for index in range(MAX_CHUNKS):
        if position + 8 > len(data):
            return  # Pillow reports what is missing
        length, name = struct.unpack_from(">I4s", data, position)
        if not CHUNK_NAME.match(name) or (name == b"IHDR") != (index == 0):
            what = f"the PNG image is corrupt (chunk {index} is {name!r})"
            raise UserError(f"{what}: check the camera's link and driver")
        if name == b"IHDR" and len(data) >= position + 18:
            _check_raw_bytes(*struct.unpack_from(">IIBB", data, position + 8))
        if name == b"IEND":
            return
        others += name != b"IDAT"
        unit = "chunks without image data"
        _check_limit("the PNG has", others, MAX_OTHER_CHUNKS, unit, "leave out texts and profiles")
        position += 12 + length
    raise UserError(f"the PNG has more than {MAX_CHUNKS} chunks: publish it in larger ones, or a JPEG")


def _check_raw_bytes(width: int, height: int, depth: int, colours: int) -> None:
    _check_size(width, height)
    row = 1 + (width * depth * CHANNELS_OF_PNG.get(colours, 4) + 7) // 8
    what = f"the PNG of {width} x {height} inflates to"
    _check_limit(what, row * height, MAX_PNG_RAW_BYTES, "bytes", "publish it with 8 bits for a colour")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """0..65535 to 0..255, rounded to the nearest; no value is halfway. As OpenCV's convertTo(..., 255. /
    65535.).

    It divides by 257 within 16 bits. The plain division in 32 bits takes ten times as long.
    """
    values = values.astype(np.uint16, copy=False)
    return ((values - (((values >> 1) + 64) >> 7) + 128) >> 8).astype(np.uint8)


def _quoted(text: str) -> str:
    """A text of a message, shortened and on one line."""
    return repr(text if len(text) <= 40 else text[:40] + "...")


BRIDGE, NO_BRIDGE = find_bridge()
"""cv_bridge, and the reason why it is not used. They are decided once, at import."""
