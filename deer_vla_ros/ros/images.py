"""Conversion of raw and compressed image messages to RGB arrays (H, W, 3) of uint8; UserError for others."""

from __future__ import annotations

import contextlib
import io
import re
import struct
from array import array
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as Picture
from sensor_msgs.msg import CompressedImage, Image

from deer_vla_ros.control.types import Frame
from deer_vla_ros.errors import UserError, cause
from deer_vla_ros.ros.messages import nanoseconds
from deer_vla_ros.ros.raw_encodings import DEPTHS, ENCODINGS, Channels, eight_bits

if TYPE_CHECKING:
    from cv_bridge import CvBridge

GREY = "the camera is grey: its images have no colours"
"""What users are told once of such a camera: a policy that was trained with colours needs them."""

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
MAX_SCAN_SEGMENTS = 4096
"""Segments of a JPEG from its first scan to its end."""
MAX_PNG_BYTES = 6_500_000
"""Noise of 1920 x 1080 fits. Inflating costs up to 140 ns per byte of a malicious file."""
MAX_PNG_RAW_BYTES = 50_000_000
"""Rows of pixels after inflating. A 4K image with 16 bits per channel fits."""
MAX_CHUNKS, MAX_OTHER_CHUNKS = 10_000, 32
"""Chunks of a PNG: all, and those without image data. Each of the latter may inflate to 1 MB in Pillow."""

JPEG, PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
"""The first bytes of each file format."""
MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
"""A marker of a JPEG. Restart markers (D0 to D7) are left out: they are part of a scan's data."""
BEGIN, END, SCAN = 0xD8, 0xD9, 0xDA
OTHER_CODINGS = {0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)}
"""JPEG frame markers that no camera sends: lossless, hierarchical, or slow (arithmetic coding)."""
WITHOUT_LENGTH = {*range(0x01, 0xC0), BEGIN, END}
"""JPEG markers that no length field follows, and reserved ones, which libjpeg does not skip."""
CHUNK_NAME = re.compile(rb"\w{4}")
CHANNELS_OF_PNG = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Number of channels, by the colour type in the PNG's header."""


def frame(message: Image) -> Frame:
    """A raw image as a frame; raises UserError.

    The frame may share the memory of the message: do not change the message afterwards.
    """
    _check_layout(message)
    bridged = BRIDGE is not None and bridgeable(message)
    image = BRIDGE.imgmsg_to_cv2(message, "rgb8") if bridged else by_numpy(message)
    return Frame(image, nanoseconds(message.header.stamp), ENCODINGS[message.encoding].is_grey)


def compressed_frame(message: CompressedImage) -> Frame:
    """A JPEG or PNG as a frame; raises UserError.

    The first bytes show the file format. `format` also names the encoding before compression. The order of
    its channels does not matter: both file formats store RGB.
    """
    if _is_of_depth(message.format):
        raise UserError(
            f"format {_quoted(message.format)} is a depth image: remap to the camera's colour image"
        )
    image, is_grey = _decoded(bytes(message.data), message.format)
    return Frame(image, nanoseconds(message.header.stamp), is_grey)


def by_numpy(message: Image) -> np.ndarray:
    """A message, whose layout was checked, as (H, W, 3) uint8 RGB. Packed rgb8 is not copied."""
    encoding, step = ENCODINGS[message.encoding], _step(message)
    rows = encoding.rows(message.height)
    return encoding.rgb(
        np.frombuffer(message.data, np.uint8, rows * step).reshape(rows, step),
        message.width,
        message.height,
        bool(message.is_bigendian),
    )


def _step(message: Image) -> int:
    """The bytes from one row to the next.

    Drivers that do not know planes (depthai-ros) divide the size of all planes by the number of rows of
    pixels. This is corrected.
    """
    encoding, height = ENCODINGS[message.encoding], message.height
    rows, row = encoding.rows(height), encoding.row_bytes(message.width)
    size = len(message.data)
    is_divided = rows > height and size < rows * message.step and size == height * message.step == rows * row
    return row if is_divided else message.step


def bridgeable(message: Image) -> bool:
    """Whether cv_bridge reads this layout correctly.

    Its Python part counts the length of a row in whole pixels: it shears an image whose step is not a
    multiple of the pixel size. It only knows the byte orders 0 and 1.
    """
    encoding = ENCODINGS[message.encoding]
    return (
        isinstance(encoding, Channels)
        and encoding.bridged
        and message.step % encoding.pixel_bytes == 0
        and message.is_bigendian in (0, 1)
    )


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
    """Small images of every encoding and byte order that cv_bridge converts, with padded rows."""
    probes = []
    for name, encoding in ENCODINGS.items():
        if isinstance(encoding, Channels):
            step = 4 * encoding.pixel_bytes
            data = array("B", [37 * index % 256 for index in range(2 * step)])
            for order in (0, 1):
                probes.append(
                    Image(height=2, width=3, step=step, encoding=name, is_bigendian=order, data=data)
                )
    return list(filter(bridgeable, probes))


def _check_layout(message: Image) -> None:
    name, height, width, step = message.encoding, message.height, message.width, message.step
    if name not in ENCODINGS:
        what = f"{_quoted(name)} is {'a depth image and ' if name in DEPTHS else ''}not supported"
        raise UserError(f"encoding {what}: publish one of {', '.join(ENCODINGS)}")
    _check_size(width, height)
    encoding = ENCODINGS[name]
    if width % encoding.multiples[0] or height % encoding.multiples[1]:
        raise UserError(
            f"the image is {width} x {height}, {name} needs multiples of {encoding.multiples[0]} x "
            f"{encoding.multiples[1]}: mend the camera driver"
        )
    if min(width, height) < encoding.least_side:
        raise UserError(
            f"the image is {width} x {height}, a side of {name} has {encoding.least_side} pixels or more: "
            "mend the camera driver"
        )
    rows, row, step = encoding.rows(height), encoding.row_bytes(width), _step(message)
    if step < row or len(message.data) < rows * step:
        raise UserError(
            f"{width} x {height} {name} with step {step} needs {rows * max(step, row)} bytes "
            f"in rows of {row} or more, the message has {len(message.data)}: mend the camera driver"
        )


def _decoded(data: bytes, name: str) -> tuple[np.ndarray, bool]:
    """The picture, and whether it is grey. Bytes that follow a JPEG's end are not looked at.

    A camera driver may send its whole buffer, with what is left of an older frame or the begin of the next.
    """
    end = None
    if data.startswith(JPEG):
        end = _check_jpeg(data)
        data = data[:end]
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
    is_grey = picture.mode[0] in "1LI"
    if is_grey and _is_of_colours(name):
        raise UserError(
            f"format {_quoted(name)}: the compression has lost the camera's colours: publish raw images, or "
            "convert them to rgb8 before they are compressed (to mono8 if the camera is grey)"
        )
    try:
        if picture.format == "PNG":
            picture.verify()  # the checksums, which decoding skips; it makes a second open necessary
            picture = Picture.open(io.BytesIO(data), formats=("PNG",))
        elif end is None:
            # Pillow does not notice it if padding follows, or if a library has set LOAD_TRUNCATED_IMAGES.
            raise EOFError("no end of image after the last scan")
        if picture.mode.startswith("I"):  # grey of 16 bits: I, I;16 or I;16B, depending on Pillow's version
            return np.repeat(eight_bits(np.array(picture))[..., None], 3, axis=2), is_grey
        return np.array(picture if picture.mode == "RGB" else picture.convert("RGB")), is_grey
    except Exception as error:
        raise UserError(
            f"the {picture.format} image of {len(data)} bytes is corrupt ({cause(error)}): "
            "check the camera's link and driver"
        ) from error


def _is_of_depth(name: str) -> bool:
    """Whether a `format` says that the image holds depths.

    image_transport's `compressed` compresses these, too, as if they were grey.
    """
    name = name.lower()
    return any(depth.lower() in name for depth in ("compressedDepth", *DEPTHS))


def _is_of_colours(name: str) -> bool:
    """Whether a `format` names an encoding before the compression that is not a grey one.

    image_transport writes "ENCODING; jpeg compressed ENCODING", and keeps only the brightness of encodings
    that it does not know, such as yuv422_yuy2. It compresses a Bayer pattern as if it were grey. An encoding
    that this package does not know, either, counts as one of colours. Some drivers only name the file format.
    """
    encoding, mark, _ = name.lower().partition(";")
    encoding = encoding.strip()
    if not encoding or any(file in encoding for file in ("jpeg", "jpg", "png")):
        return False
    is_grey = {known.lower(): each.is_grey for known, each in ENCODINGS.items()}
    return not is_grey[encoding] if encoding in is_grey else bool(mark)


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


def _check_jpeg(data: bytes) -> int | None:
    """Returns where the file's first picture ends; None if it does not end before another one begins.

    Segments are found as libjpeg finds them, so a thumbnail's markers do not count. Raises UserError for a
    file that is too long, and for a header that would keep the parser busy.
    """
    _check_limit("the JPEG has", len(data), MAX_JPEG_BYTES, "bytes", "set a lower quality or resolution")
    remedy = "leave out what the camera driver adds"
    position, in_header, left = len(JPEG), True, MAX_SEGMENTS
    while found := MARKER.search(data, position):
        marker, position = found[1][0], found.end()
        if marker == END:
            return position
        if marker == BEGIN:
            return None
        if marker == SCAN and in_header:
            in_header, left = False, MAX_SCAN_SEGMENTS
        if marker in OTHER_CODINGS:
            coding = f"the JPEG is of coding SOF{marker - 0xC0}, only SOF0 to SOF2 are accepted"
            raise UserError(f"{coding}: publish a baseline JPEG")
        if marker not in WITHOUT_LENGTH:
            position += int.from_bytes(data[position : position + 2], "big")
        if in_header:
            _check_limit("the JPEG's header has", position, MAX_HEADER_BYTES, "bytes", remedy)
        left -= 1
        if left < 0:
            part, limit = ("header", MAX_SEGMENTS) if in_header else ("scans", MAX_SCAN_SEGMENTS)
            raise UserError(f"the JPEG's {part} has more than {limit} segments: {remedy}")
    return None  # Pillow reports what is missing


def _check_scans(data: bytes, width: int, height: int) -> None:
    """Counts the scan markers anywhere in the picture: libjpeg cannot find more scans than these."""
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


def _quoted(text: str) -> str:
    """A text of a message, shortened and on one line."""
    return repr(text if len(text) <= 40 else text[:40] + "...")


BRIDGE, NO_BRIDGE = find_bridge()
"""cv_bridge, and the reason why it is not used. They are decided once, at import."""
