"""The encodings of raw images, and their conversion to RGB. The results are those of OpenCV and cv_bridge."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

BLOCK_PIXELS = 20_000
"""YUV images are converted in blocks of rows with about so many pixels. An image of 1920 x 1080 as a whole
takes twice as long, because its arrays do not stay in the processor's cache."""


class Encoding(ABC):
    """An encoding of raw images: rows of `step` bytes each, not always as many as rows of pixels."""

    is_grey: ClassVar[bool] = False
    multiples: ClassVar[tuple[int, int]] = (1, 1)
    """Width and height are multiples of these."""
    least_side: ClassVar[int] = 1
    """The least width and height."""

    def row_bytes(self, width: int) -> int:
        """The bytes of a row without padding."""
        return width

    def rows(self, height: int) -> int:
        """The number of rows of bytes."""
        return height

    @abstractmethod
    def rgb(self, rows: np.ndarray, width: int, height: int, is_bigendian: bool) -> np.ndarray:
        """rows (rows(height), step) uint8 as (height, width, 3) uint8 RGB."""


@dataclass(frozen=True)
class Channels(Encoding):
    """Pixels of some channels. colours: positions of red, green and blue among the `channels`.

    bridged: whether cv_bridge, too, converts it to rgb8.
    """

    colours: tuple[int, int, int]
    channels: int
    channel_bytes: int = 1
    bridged: bool = True

    @property
    def is_grey(self) -> bool:
        return self.colours == MONO

    @property
    def pixel_bytes(self) -> int:
        """Bytes of a pixel."""
        return self.channels * self.channel_bytes

    def row_bytes(self, width: int) -> int:
        return width * self.pixel_bytes

    def rgb(self, rows: np.ndarray, width: int, height: int, is_bigendian: bool) -> np.ndarray:
        """Packed rgb8 is not copied."""
        rows = rows[:, : self.row_bytes(width)]
        if self.channel_bytes == 2:
            rows = eight_bits(_sixteen_bits(rows, is_bigendian))
        pixels = rows.reshape(height, width, self.channels)
        if self.colours == RGB and self.channels == 3:
            return np.ascontiguousarray(pixels)
        image = np.empty((height, width, 3), np.uint8)
        for target, source in enumerate(self.colours):  # three times as fast as copying a reversed view
            image[..., target] = pixels[..., source]
        return image


@dataclass(frozen=True)
class PackedYuv(Encoding):
    """YUV 4:2:2, two pixels in four bytes. order: the positions of the first Y, of U and of V."""

    order: tuple[int, int, int]
    multiples = (2, 1)

    def row_bytes(self, width: int) -> int:
        return 2 * width

    def rgb(self, rows: np.ndarray, width: int, height: int, is_bigendian: bool) -> np.ndarray:
        y, u, v = self.order
        rows = rows[:, : 2 * width]
        return yuv_to_rgb(rows[:, y::2], rows[:, u::4], rows[:, v::4])


@dataclass(frozen=True)
class PlanarYuv(Encoding):
    """A plane of Y, then a plane with pairs of colours. `shared`: pixels, in x as in y, with one pair.

    order: the positions of U and V in a pair.
    """

    shared: int
    order: tuple[int, int]

    @property
    def multiples(self) -> tuple[int, int]:
        return self.shared, self.shared

    def rows(self, height: int) -> int:
        return height + 2 * height // self.shared**2

    def rgb(self, rows: np.ndarray, width: int, height: int, is_bigendian: bool) -> np.ndarray:
        pairs = rows[height:].reshape(height // self.shared, -1)[:, : 2 * width // self.shared]
        u, v = (pairs[:, position::2] for position in self.order)
        return yuv_to_rgb(rows[:height, :width], u, v)


@dataclass(frozen=True)
class Bayer(Encoding):
    """One colour in each pixel. pattern: the colours of the first two rows of two pixels, such as "rggb"."""

    pattern: str
    channel_bytes: int = 1
    least_side = 3

    def row_bytes(self, width: int) -> int:
        return width * self.channel_bytes

    def rgb(self, rows: np.ndarray, width: int, height: int, is_bigendian: bool) -> np.ndarray:
        rows = rows[:, : self.row_bytes(width)]
        if self.channel_bytes == 1:
            return demosaiced(rows, self.pattern)
        return eight_bits(demosaiced(_sixteen_bits(rows, is_bigendian), self.pattern))


def eight_bits(values: np.ndarray) -> np.ndarray:
    """0..65535 to 0..255, rounded to the nearest; no value is halfway. As OpenCV's convertTo(..., 255. /
    65535.).

    It divides by 257 within 16 bits. The plain division in 32 bits takes ten times as long.
    """
    values = values.astype(np.uint16, copy=False)
    return ((values - (((values >> 1) + 64) >> 7) + 128) >> 8).astype(np.uint8)


def _sixteen_bits(rows: np.ndarray, is_bigendian: bool) -> np.ndarray:
    return rows.view(">u2" if is_bigendian else "<u2").astype(np.uint16, copy=False)


# ITU-R BT.601 with 16..235 for black to white, in units of 2**-20. OpenCV has the same integers.
YUV_SHIFT = 20
LUMA = np.maximum(np.arange(256, dtype=np.int32) - 16, 0) * 1220542
CHROMA = np.arange(256, dtype=np.int32) - 128
RED_OF_V, GREEN_OF_V, GREEN_OF_U, BLUE_OF_U = 1673527, -852492, -409993, 2116026


def yuv_to_rgb(y: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """y (H, W), u and v (H / a, W / b), all uint8, as (H, W, 3) uint8."""
    down, right = y.shape[0] // u.shape[0], y.shape[1] // u.shape[1]
    image = np.empty((*y.shape, 3), np.uint8)
    rows = max(1, BLOCK_PIXELS // (down * y.shape[1]))
    for start in range(0, len(u), rows):
        block, pixels = slice(start, start + rows), slice(start * down, (start + rows) * down)
        luma, us, vs = LUMA.take(y[pixels]), CHROMA.take(u[block]), CHROMA.take(v[block])
        shifts = (RED_OF_V * vs, GREEN_OF_V * vs + GREEN_OF_U * us, BLUE_OF_U * us)
        for colour, shift in enumerate(shifts):
            values = (shift + (1 << YUV_SHIFT - 1)).repeat(down, 0).repeat(right, 1)
            values += luma
            values >>= YUV_SHIFT
            image[pixels, :, colour] = values.clip(0, 255, out=values)
    return image


def demosaiced(values: np.ndarray, pattern: str) -> np.ndarray:
    """(H, W) of uint8 or uint16 with one colour in each pixel as (H, W, 3) of the same type.

    The other colours of a pixel are means of its neighbours. A pixel at the border gets the colours of the
    pixel next to it. OpenCV does the same in cvtColor with COLOR_Bayer...2RGB.
    """
    height, width = values.shape
    wide = values.astype(np.uint16 if values.dtype == np.uint8 else np.uint32)
    image = np.empty((height, width, 3), values.dtype)
    for row in (1, 2):
        for column in (1, 2):  # of the first of all the inner pixels that have the same neighbourhood

            def at(down: int, right: int, row: int = row, column: int = column) -> np.ndarray:
                rows = slice(row + down, height - 1 + down, 2)
                return wide[rows, column + right : width - 1 + right : 2]

            def colour(row: int, column: int) -> int:
                return "rgb".index(pattern[2 * (row % 2) + column % 2])

            inner = image[row : height - 1 : 2, column : width - 1 : 2]
            own = colour(row, column)
            inner[..., own] = at(0, 0)
            beside, above = at(0, -1) + at(0, 1), at(-1, 0) + at(1, 0)
            if own == 1:
                inner[..., colour(row, column + 1)] = (beside + 1) >> 1
                inner[..., colour(row + 1, column)] = (above + 1) >> 1
            else:
                corners = at(-1, -1) + at(-1, 1) + at(1, -1) + at(1, 1)
                inner[..., 1] = (beside + above + 2) >> 2
                inner[..., 2 - own] = (corners + 2) >> 2
    image[0], image[-1] = image[1], image[-2]
    image[:, 0], image[:, -1] = image[:, 1], image[:, -2]
    return image


RGB, BGR, MONO = (0, 1, 2), (2, 1, 0), (0, 0, 0)
UYVY, YUYV = PackedYuv((1, 0, 2)), PackedYuv((0, 1, 3))

# 8UC3 and 8UC1 do not say which colours they contain, so cv_bridge refuses to convert them. These are
# OpenCV's names of types, and OpenCV keeps colour images as BGR: a driver that publishes a cv::Mat sends BGR.
ENCODINGS: dict[str, Encoding] = {
    "rgb8": Channels(RGB, 3),
    "bgr8": Channels(BGR, 3),
    "rgba8": Channels(RGB, 4),
    "bgra8": Channels(BGR, 4),
    "mono8": Channels(MONO, 1),
    "8UC3": Channels(BGR, 3, bridged=False),
    "8UC1": Channels(MONO, 1, bridged=False),
    "rgb16": Channels(RGB, 3, 2),
    "bgr16": Channels(BGR, 3, 2),
    "rgba16": Channels(RGB, 4, 2),
    "bgra16": Channels(BGR, 4, 2),
    "mono16": Channels(MONO, 1, 2),
    "uyvy": UYVY,
    "yuv422": UYVY,
    "yuyv": YUYV,
    "yuv422_yuy2": YUYV,
    "nv12": PlanarYuv(2, (0, 1)),
    "nv21": PlanarYuv(2, (1, 0)),
    "nv24": PlanarYuv(1, (0, 1)),
    **{f"bayer_{pattern}8": Bayer(pattern) for pattern in ("rggb", "bggr", "gbrg", "grbg")},
    **{f"bayer_{pattern}16": Bayer(pattern, 2) for pattern in ("rggb", "bggr", "gbrg", "grbg")},
}
"""By the names of sensor_msgs/image_encodings.hpp. It does not have nv12 in Jazzy; drivers send it."""
DEPTHS = ("16UC1", "32FC1")
"""Encodings of depth images (REP 118)."""
