"""Tests of image messages: every layout gives the same RGB, every defect an error in one line."""

import io
import re
import struct
import sys
import time
import zlib
from array import array
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Picture
from PIL import ImageFile
from sensor_msgs.msg import CompressedImage, Image

from deer_vla_ros.errors import UserError
from deer_vla_ros.ros import images

CHANNELS = {
    "rgb8": "rgb",
    "bgr8": "bgr",
    "rgba8": "rgba",
    "bgra8": "bgra",
    "mono8": "m",
    "8UC3": "bgr",
    "8UC1": "m",
}
CHANNELS |= {"rgb16": "rgb", "bgr16": "bgr", "rgba16": "rgba", "bgra16": "bgra", "mono16": "m"}
RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)
SMOOTH = np.stack(np.broadcast_arrays(np.arange(64) * 3, np.arange(48)[:, None] * 4, 40), axis=2).astype(
    np.uint8
)
"""Colours that JPEG does not change."""
OPENCV = Path(__file__).parents[1] / "data" / "opencv.npz"
END_CHUNK, END_CHUNK_CHECKSUM = 12, 4
"""Bytes at the end of a PNG that do not describe the image."""


def raw(
    encoding: str, width: int, height: int, data: bytes, step: int | None = None, is_bigendian: int = 0
) -> Image:
    depth = 2 if encoding.endswith("16") else 1
    step = width * depth * len(CHANNELS.get(encoding, "m")) if step is None else step
    message = Image(
        width=width,
        height=height,
        encoding=encoding,
        step=step,
        is_bigendian=is_bigendian,
        data=array("B", data),
    )
    message.header.stamp.sec, message.header.stamp.nanosec = 12, 34
    return message


def compressed(data: bytes, format: str = "jpeg") -> CompressedImage:
    message = CompressedImage(format=format, data=array("B", data))
    message.header.stamp.sec, message.header.stamp.nanosec = 12, 34
    return message


def encoded(picture: Picture.Image | np.ndarray, format: str, **options) -> bytes:
    file = io.BytesIO()
    (picture if isinstance(picture, Picture.Image) else Picture.fromarray(picture)).save(
        file, format, **options
    )
    return file.getvalue()


def plainly(message: Image) -> list:
    """The RGB pixels of a message by the definition of its encoding, one pixel at a time."""
    names, order = CHANNELS[message.encoding], "big" if message.is_bigendian else "little"
    depth = 2 if message.encoding.endswith("16") else 1

    def value(row: int, column: int, colour: str) -> int:
        at = (
            row * message.step
            + (column * len(names) + names.index(colour if colour in names else "m")) * depth
        )
        number = int.from_bytes(message.data[at : at + depth].tobytes(), order)
        return number if depth == 1 else round(number * 255 / 65535)

    return [
        [[value(row, column, c) for c in "rgb"] for column in range(message.width)]
        for row in range(message.height)
    ]


def refusal(convert, message) -> str:
    """The text of the error with which a message is refused: one line that is not too long."""
    with pytest.raises(UserError) as caught:
        convert(message)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


@st.composite
def layouts(draw) -> Image:
    encoding = draw(st.sampled_from(sorted(CHANNELS)))
    width, height, padding = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.integers(0, 9))
    step = width * len(CHANNELS[encoding]) * (2 if encoding.endswith("16") else 1) + padding
    size = height * step + draw(st.sampled_from((0, 0, 5)))
    return raw(
        encoding,
        width,
        height,
        draw(st.binary(min_size=size, max_size=size)),
        step,
        draw(st.sampled_from((0, 1, 255))),
    )


# --- Raw images.


@given(layouts())
def test_every_encoding_step_and_byte_order_gives_the_rgb_that_its_definition_says(message):
    frame = images.frame(message)
    assert frame.image.dtype == np.uint8 and frame.image.flags.c_contiguous and frame.image.flags.writeable
    assert frame.image.tolist() == plainly(message)
    assert frame.stamp_ns == 12_000_000_034


def test_all_values_of_16_bits_become_the_nearest_of_8_in_both_byte_orders():
    values = np.arange(65536)
    expected = np.repeat(np.rint(values / 257).astype(np.uint8)[:, None], 3, axis=1).reshape(256, 256, 3)
    for order, kind in enumerate(("<u2", ">u2")):
        frame = images.frame(raw("mono16", 256, 256, values.astype(kind).tobytes(), is_bigendian=order))
        assert np.array_equal(frame.image, expected)


@pytest.mark.parametrize(
    ("encoding", "raw_mode"), [("rgb8", "RGB"), ("bgr8", "BGR"), ("rgba8", "RGBX"), ("bgra8", "BGRX")]
)
def test_a_camera_sized_image_with_padded_rows_is_what_pillow_reads(encoding, raw_mode):
    step = 640 * len(raw_mode) + 32
    data = RNG.bytes(480 * step)
    expected = Picture.frombuffer("RGB", (640, 480), data, "raw", raw_mode, step, 1)
    assert np.array_equal(
        images.frame(raw(encoding, 640, 480, data, step)).image, np.asarray(expected.convert("RGB"))
    )


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8"])
def test_a_camera_sized_image_costs_less_than_a_millisecond(encoding):
    message = raw(encoding, 640, 480, bytes(3 * 640 * 480))
    seconds = []
    for _ in range(50):
        begin = time.perf_counter()
        images.frame(message)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 1e-3


@pytest.mark.skipif(images.BRIDGE is not None, reason="cv_bridge copies always")
def test_packed_rgb8_is_not_copied():
    message = raw("rgb8", 17, 13, COLOURS.tobytes())
    assert np.shares_memory(images.frame(message).image, np.frombuffer(message.data, np.uint8))


@pytest.mark.parametrize("encoding", ["yuv444", "16UC1", "32FC1", "", "rgb8\nrgb8", "x" * 5000])
def test_an_encoding_that_is_not_supported_is_named_with_those_that_are(encoding):
    text = refusal(images.frame, raw(encoding, 4, 4, bytes(64)))
    assert f"encoding {repr(encoding)[:-1][:40]}" in text and "rgb8, bgr8, rgba8" in text


@pytest.mark.parametrize(
    ("width", "height"), [(0, 4), (4, 0), (0, 0), (8193, 1), (1, 8193), (2**32 - 1, 2**32 - 1), (-4, 4)]
)
def test_a_size_that_no_camera_has_is_named_with_the_limit(width, height):
    text = refusal(images.frame, raw("rgb8", width, height, bytes(64), step=12))
    assert f"{width} x {height}" in text and "1 to 8192 pixels" in text


def test_the_largest_side_is_accepted():
    assert images.frame(raw("mono8", 8192, 1, bytes(8192))).image.shape == (1, 8192, 3)


@pytest.mark.parametrize("missing", [1, 47, 48])
def test_data_that_end_too_early_are_refused_with_both_sizes(missing):
    text = refusal(images.frame, raw("bgr8", 4, 4, bytes(48 - missing)))
    assert "needs 48 bytes" in text and f"has {48 - missing}" in text


@pytest.mark.parametrize(
    ("encoding", "step"), [("rgb8", 11), ("rgba16", 31), ("mono8", 0), ("rgb8", 2**32 - 1)]
)
def test_a_step_that_does_not_fit_is_refused(encoding, step):
    assert f"step {step} needs" in refusal(images.frame, raw(encoding, 4, 4, bytes(48), step))


def test_a_depth_encoding_is_called_so():
    assert "'16UC1' is a depth image and not supported" in refusal(
        images.frame, raw("16UC1", 4, 4, bytes(32))
    )


def opencv(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A raw image and what OpenCV makes of it; see record_opencv.py."""
    recorded = np.load(OPENCV)
    return recorded[f"{name} raw"], recorded[f"{name} rgb"]


def padded(encoding: str, rows: np.ndarray, width: int, height: int, padding: int = 0, is_bigendian: int = 0):
    """A message of these rows of bytes, each with padding behind it."""
    wide = np.pad(rows, ((0, 0), (0, padding)), constant_values=77)
    return raw(encoding, width, height, wide.tobytes(), wide.shape[1], is_bigendian)


@pytest.mark.parametrize("padding", [0, 10])
@pytest.mark.parametrize(
    ("names", "recorded"),
    [
        (("uyvy", "yuv422"), "uyvy"),
        (("yuyv", "yuv422_yuy2"), "yuyv"),
        (("nv12",), "nv12"),
        (("nv21",), "nv21"),
        *(((f"bayer_{each}8",), f"bayer_{each}8") for each in ("rggb", "bggr", "gbrg", "grbg")),
    ],
)
def test_what_camera_drivers_send_becomes_what_opencv_makes_of_it(names, recorded, padding):
    values, expected = opencv(recorded)
    rows = values.reshape(len(values), -1)
    for name in names:
        frame = images.frame(padded(name, rows, *expected.shape[1::-1], padding))
        assert np.array_equal(frame.image, expected) and frame.image.flags.c_contiguous
        assert not frame.is_grey


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_a_bayer_pattern_of_16_bits_becomes_what_opencv_makes_of_it(pattern, order):
    values, expected = opencv(f"bayer_{pattern}16")
    rows = values.astype((">u2" if order else "<u2")).view(np.uint8)
    frame = images.frame(padded(f"bayer_{pattern}16", rows, *expected.shape[1::-1], 6, order))
    assert np.array_equal(frame.image, expected)


def test_nv24_is_nv12_with_a_pair_of_colours_for_each_pixel():
    values, expected = opencv("nv12")
    height, width = expected.shape[:2]
    pairs = values[height:].reshape(height // 2, width // 2, 2).repeat(2, 0).repeat(2, 1)
    rows = np.concatenate([values[:height], pairs.reshape(2 * height, width)])
    assert np.array_equal(images.frame(padded("nv24", rows, width, height)).image, expected)
    wide = np.pad(pairs.reshape(height, 2 * width), ((0, 0), (0, 20))).reshape(2 * height, width + 10)
    rows = np.concatenate([np.pad(values[:height], ((0, 0), (0, 10))), wide])
    assert np.array_equal(images.frame(padded("nv24", rows, width, height)).image, expected)


def test_planes_whose_size_was_divided_by_the_height_are_read():
    values, expected = opencv("nv12")
    height, width = expected.shape[:2]
    message = raw("nv12", width, height, values.tobytes(), step=width * 3 // 2)
    assert np.array_equal(images.frame(message).image, expected)


@pytest.mark.parametrize(
    ("encoding", "width", "height", "expected"),
    [
        ("yuyv", 5, 4, "yuyv needs multiples of 2 x 1"),
        ("nv12", 4, 5, "nv12 needs multiples of 2 x 2"),
        ("bayer_rggb8", 2, 4, "a side of bayer_rggb8 has 3 pixels or more"),
    ],
)
def test_a_size_that_an_encoding_cannot_have_is_refused(encoding, width, height, expected):
    text = refusal(images.frame, raw(encoding, width, height, bytes(100), step=10))
    assert f"{width} x {height}" in text and expected in text and "mend the camera driver" in text


@pytest.mark.parametrize(
    ("encoding", "needed"), [("yuyv", 32), ("nv12", 24), ("nv24", 48), ("bayer_rggb16", 32)]
)
def test_data_of_planes_and_patterns_that_end_too_early_are_refused(encoding, needed):
    step = 4 if encoding.startswith("nv") else 8
    images.frame(raw(encoding, 4, 4, bytes(needed), step))
    assert f"needs {needed} bytes" in refusal(images.frame, raw(encoding, 4, 4, bytes(needed - 1), step))


@pytest.mark.parametrize(
    ("encoding", "is_grey"), [("mono8", True), ("mono16", True), ("8UC1", True), ("rgb8", False)]
)
def test_a_grey_camera_is_marked(encoding, is_grey):
    assert images.frame(raw(encoding, 2, 2, bytes(12))).is_grey == is_grey


def test_more_data_than_needed_is_accepted():
    assert np.array_equal(images.frame(raw("rgb8", 17, 13, COLOURS.tobytes() + b"more")).image, COLOURS)


# --- Compressed images.


@pytest.mark.parametrize(
    "format", ["png", "rgb8; png compressed bgr8", "bgr8; png compressed ", "bgr8; jpeg compressed", ""]
)
def test_a_png_is_read_exactly_whatever_the_format_says_of_channel_order(format):
    frame = images.compressed_frame(compressed(encoded(COLOURS, "PNG"), format))
    assert np.array_equal(frame.image, COLOURS) and frame.image.flags.writeable
    assert frame.stamp_ns == 12_000_000_034


@pytest.mark.parametrize(
    "format", ["jpeg", "jpg", "rgb8; jpeg compressed bgr8", "bgr8; jpeg compressed rgb8"]
)
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_is_rgb_whatever_the_format_says_of_channel_order(format, progressive):
    data = encoded(SMOOTH, "JPEG", quality=95, progressive=progressive)
    image = images.compressed_frame(compressed(data, format)).image
    assert image.dtype == np.uint8 and image.shape == SMOOTH.shape and image.flags.c_contiguous
    assert np.abs(image.astype(int) - SMOOTH).max() < 16


@pytest.mark.parametrize("kind", ["L JPEG", "CMYK JPEG", "L PNG", "LA PNG", "RGBA PNG", "1 PNG"])
def test_files_of_other_colours_become_rgb(kind):
    mode, format = kind.split()
    picture = Picture.fromarray(SMOOTH).convert(mode)
    options = {"quality": 95} if format == "JPEG" else {}
    image = images.compressed_frame(compressed(encoded(picture, format, **options))).image
    assert image.shape == SMOOTH.shape and image.dtype == np.uint8
    assert np.abs(image.astype(int) - np.asarray(picture.convert("RGB"))).max() < (
        16 if format == "JPEG" else 1
    )


def test_a_palette_becomes_its_colours():
    picture = Picture.fromarray(SMOOTH).quantize(16)
    image = images.compressed_frame(compressed(encoded(picture, "PNG"))).image
    assert (
        np.array_equal(image, np.asarray(picture.convert("RGB")))
        and len(np.unique(image.reshape(-1, 3), axis=0)) == 16
    )


def test_a_grey_png_of_16_bits_has_the_values_of_the_raw_image():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = images.compressed_frame(compressed(encoded(values, "PNG"), "mono16; png compressed ")).image
    assert np.array_equal(image, images.frame(raw("mono16", 256, 256, values.tobytes())).image)


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("tail", [b"", bytes(4096)])
@pytest.mark.parametrize(
    ("format", "options", "needless"),
    [("JPEG", {}, 0), ("JPEG", {"progressive": True}, 0), ("PNG", {}, END_CHUNK_CHECKSUM)],
)
def test_a_file_cut_anywhere_is_refused_even_when_padded_or_when_pillow_was_told_to_accept_it(
    monkeypatch, format, options, needless, tail, lenient
):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    data = encoded(SMOOTH, format, **options)
    for length in range(len(data) - needless):
        text = refusal(images.compressed_frame, compressed(data[:length] + tail, format))
        assert "are no JPEG or PNG" in text or "is corrupt" in text or "1 to 8192" in text


def test_a_png_with_any_byte_of_its_picture_wrong_is_refused():
    data = encoded(COLOURS, "PNG")
    for index in range(len(data) - END_CHUNK):
        refusal(
            images.compressed_frame,
            compressed(data[:index] + bytes([data[index] ^ 0x55]) + data[index + 1 :], "png"),
        )


@pytest.mark.parametrize("data", [b"", b"\xff", bytes(1000), b"GIF89a" + bytes(100), encoded(COLOURS, "BMP")])
def test_bytes_that_are_no_jpeg_or_png_are_refused_with_their_number_and_format(data):
    assert f"{len(data)} bytes of format 'h264' are no JPEG or PNG" in refusal(
        images.compressed_frame, compressed(data, "h264")
    )


@pytest.mark.parametrize(("width", "height"), [(8193, 1), (1, 8193), (12000, 12000), (60000, 60000)])
def test_a_header_that_promises_too_many_pixels_is_refused_before_they_are_unpacked(width, height):
    bomb = png(width, height, chunk(b"IDAT", zlib.compress(bytes(10_000_000))))
    begin = time.perf_counter()
    assert "1 to 8192 pixels" in refusal(images.compressed_frame, compressed(bomb, "png"))
    assert time.perf_counter() - begin < 1.0


# --- Files that take much time or memory.


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, chunks: bytes, depth: int = 8, colours: int = 2) -> bytes:
    """A PNG file with these chunks between its header and its end."""
    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunks + chunk(b"IEND", b"")


def black_png(width: int, height: int, more: bytes = b"", depth: int = 8, colours: int = 2) -> bytes:
    row = bytes(1 + width * depth // 8 * {0: 1, 2: 3, 6: 4}[colours])
    return png(width, height, more + chunk(b"IDAT", zlib.compress(row * height, 1)), depth, colours)


def grey_jpeg(width: int, height: int, **options) -> bytes:
    return encoded(Picture.new("L", (width, height)), "JPEG", **options)


def with_scans(width: int, height: int, count: int) -> bytes:
    """A progressive JPEG file with `count` scans: the last scan of an ordinary file is repeated."""
    data = grey_jpeg(width, height, progressive=True)
    body, scan = data[:-2], data[data.rfind(b"\xff\xda") : -2]
    return body + scan * (count - data.count(b"\xff\xda")) + data[-2:]


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def with_header(segments: bytes) -> bytes:
    """An ordinary JPEG file with additional segments in its header."""
    data = encoded(SMOOTH, "JPEG")
    return data[:2] + segments + data[2:]


@pytest.mark.parametrize(
    "make",
    [
        lambda width, height: (images.frame, raw("mono8", width, height, bytes(width * height))),
        lambda width, height: (images.compressed_frame, compressed(grey_jpeg(width, height))),
        lambda width, height: (images.compressed_frame, compressed(black_png(width, height, colours=0))),
    ],
    ids=["raw", "jpeg", "png"],
)
def test_an_image_of_a_4k_camera_is_accepted_and_one_with_more_pixels_than_the_limit_is_not(make):
    convert, message = make(3840, 2160)
    assert convert(message).image.shape == (2160, 3840, 3)
    convert, message = make(4000, 3126)
    text = refusal(convert, message)
    assert "4000 x 3126 has 12504000 pixels, at most 12500000" in text
    assert "set the camera to a lower resolution" in text


@pytest.mark.parametrize(("width", "height", "scans"), [(640, 480, 400), (3840, 2160, 13)])
def test_a_jpeg_with_too_many_scans_for_its_pixels_is_refused(width, height, scans):
    text = refusal(images.compressed_frame, compressed(with_scans(width, height, scans)))
    assert f"{width} x {height} in {scans} scans visits {scans * width * height} pixels" in text
    assert "at most 100000000" in text
    assert "publish a baseline JPEG" in text


@pytest.mark.parametrize(("width", "height", "scans"), [(640, 480, 100), (3840, 2160, 12)])
def test_a_progressive_jpeg_with_the_scans_of_an_ordinary_one_is_accepted(width, height, scans):
    image = images.compressed_frame(compressed(with_scans(width, height, scans))).image
    assert image.shape == (height, width, 3)


def test_the_checks_of_a_camera_sized_jpeg_cost_less_than_a_millisecond():
    data = encoded(RNG.integers(0, 256, (480, 640, 3), dtype=np.uint8), "JPEG", quality=90)
    seconds = []
    for _ in range(50):
        begin = time.perf_counter()
        assert images._check_jpeg(data) == len(data)
        images._check_scans(data, 640, 480)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 1e-3


@pytest.mark.parametrize("marker", [0xC3, 0xC9, 0xCA])
def test_a_jpeg_of_a_coding_that_no_camera_sends_is_refused_by_its_name(marker):
    data = encoded(SMOOTH, "JPEG").replace(b"\xff\xc0", bytes((0xFF, marker)))
    text = refusal(images.compressed_frame, compressed(data))
    assert f"coding SOF{marker - 0xC0}, only SOF0 to SOF2 are accepted: publish a baseline JPEG" in text


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (with_header(segment(0xE1, b"") * 300), "more than 256 segments: leave out"),
        (with_header(segment(0xED, bytes(65000)) * 16), "bytes, at most 1000000 are accepted: leave out"),
        (encoded(SMOOTH, "JPEG") + bytes(16_000_000), "at most 16000000 are accepted: set a lower quality"),
        (b"\xff\xd8" + b"\xff" * 100_000, "are no JPEG or PNG"),
    ],
    ids=["segments", "header", "file", "fill"],
)
def test_a_jpeg_that_would_keep_the_parser_busy_is_refused_with_the_limit(data, expected):
    assert expected in refusal(images.compressed_frame, compressed(data))


def test_a_jpeg_with_the_metadata_of_a_camera_is_accepted():
    thumbnail = segment(0xE1, b"Exif\0\0" + encoded(SMOOTH, "JPEG"))
    more = thumbnail + segment(0xE2, bytes(65000)) + segment(0xFE, b"camera")
    assert images.compressed_frame(compressed(with_header(more))).image.shape == SMOOTH.shape


PROFILE = chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(1_000_000)))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (black_png(9, 9, PROFILE * 40), "33 chunks without image data, at most 32 are accepted: leave out"),
        (black_png(9, 9, chunk(b"IDAT", b"") * 10_000), "more than 10000 chunks: publish"),
        (black_png(9, 9) + bytes(6_500_000), "bytes, at most 6500000 are accepted: publish a JPEG"),
        (black_png(3840, 2160, depth=16, colours=6), "inflates to 66357360 bytes, at most 50000000"),
    ],
    ids=["profiles", "chunks", "file", "inflated"],
)
def test_a_png_that_would_cost_too_much_is_refused_with_the_limit(data, expected):
    assert expected in refusal(images.compressed_frame, compressed(data, "png"))


def test_a_png_of_16_bits_for_a_colour_is_accepted_from_a_4k_camera():
    image = images.compressed_frame(compressed(black_png(3840, 2160, depth=16), "png")).image
    assert image.shape == (2160, 3840, 3)


# --- What camera drivers send besides a picture.

THUMBNAIL = segment(0xE1, b"Exif\0\0" + encoded(SMOOTH[::4, ::4], "JPEG"))
NOISE = RNG.integers(0, 256, (96, 128, 3), dtype=np.uint8)
PICTURES = {
    "baseline": encoded(SMOOTH, "JPEG"),
    "progressive": encoded(SMOOTH, "JPEG", progressive=True),
    "restarts": encoded(NOISE, "JPEG", restart_marker_blocks=1),
    "thumbnail": with_header(THUMBNAIL),
    "fill": encoded(SMOOTH, "JPEG")
    .replace(b"\xff\xda", b"\xff\xff\xff\xda")
    .replace(b"\xff\xdb", b"\xff\xff\xdb"),
}
OTHER = encoded(NOISE, "JPEG", quality=90)


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize(
    "tail",
    [OTHER, OTHER[: len(OTHER) // 2], OTHER[len(OTHER) // 2 :], with_header(THUMBNAIL)[:900], bytes(9000)]
    + [b"\xff\xda\0\2" * 9, b"\xff", b"\xff\xd9\xff\xd9", b"\xff\xd8"],
    ids=["whole", "begin", "end", "begin-thumbnail", "zeros", "scans", "byte", "ends", "marker"],
)
def test_what_follows_a_picture_changes_nothing(kind, tail):
    data = PICTURES[kind]
    expected = np.asarray(Picture.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(images.compressed_frame(compressed(data + tail)).image, expected)


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("tail", [b"", bytes(2000), OTHER, OTHER[: len(OTHER) // 2]])
def test_a_picture_without_its_end_is_refused_whatever_follows(kind, tail):
    data = PICTURES[kind]
    scan = data.rfind(b"\xff\xda") + 20
    for length in (scan, (scan + len(data)) // 2, len(data) - 2):
        text = refusal(images.compressed_frame, compressed(data[:length] + tail))
        assert "is corrupt (" in text


def test_the_first_of_several_pictures_in_a_file_is_taken():
    data = encoded(SMOOTH, "MPO", save_all=True, append_images=[Picture.fromarray(NOISE)])
    image = images.compressed_frame(compressed(data)).image
    assert image.shape == SMOOTH.shape and np.abs(image.astype(int) - SMOOTH).max() < 16


@pytest.mark.parametrize(
    ("format", "file"),
    [
        ("yuv422_yuy2; jpeg compressed mono8", "JPEG"),
        ("uyvy; jpeg compressed ", "JPEG"),
        ("bayer_rggb8; jpeg compressed ", "JPEG"),
        ("bayer_rggb8; png compressed ", "PNG"),
        ("rgb8; jpeg compressed mono8", "JPEG"),
        ("nv16; jpeg compressed mono8", "JPEG"),
        ("yuv422_uyvy; jpeg compressed mono8", "JPEG"),
        ("YUV422_YUY2; jpeg compressed mono8", "JPEG"),
        (" Bayer_RGGB8 ;png compressed", "PNG"),
        ("bgr8", "JPEG"),
    ],
)
def test_a_picture_that_lost_its_colours_is_refused_by_the_name_of_its_format(format, file):
    text = refusal(images.compressed_frame, compressed(encoded(SMOOTH[..., 0], file), format))
    assert repr(format) in text and "lost the camera's colours: publish raw images" in text


@pytest.mark.parametrize(
    "format",
    ["jpeg", "mono8; jpeg compressed ", "mono8; jpeg compressed mono8", "", "MONO16; jpeg", "8uc1; jpeg"]
    + ["image/jpeg; quality 90", "; jpeg compressed mono8", "mjpeg", "mono8"],
)
def test_a_picture_of_a_grey_camera_is_marked(format):
    assert images.compressed_frame(compressed(encoded(SMOOTH[..., 0], "JPEG"), format)).is_grey
    assert not images.compressed_frame(compressed(encoded(SMOOTH, "JPEG"), format)).is_grey


# --- Depth images.


@pytest.mark.parametrize("file", ["PNG", "JPEG"])
@pytest.mark.parametrize(
    "format",
    ["16UC1; compressedDepth png", "compressedDepth", "16UC1; png compressed 16UC1"]
    + ["16UC1; jpeg compressed mono8", "32fc1; jpeg compressed ", "16UC1", "png; 16uc1"],
)
def test_a_depth_image_is_refused_with_the_remedy(format, file):
    for image in (COLOURS, SMOOTH[..., 0], np.full((4, 5), 1200, np.uint16)):
        if file == "PNG" or image.dtype == np.uint8:
            text = refusal(images.compressed_frame, compressed(encoded(image, file), format))
            assert f"format {format!r} is a depth image: remap to the camera's colour image" in text


# --- Arbitrary data.


def is_frame_or_refused(convert, message) -> None:
    begin = time.perf_counter()
    try:
        image = convert(message).image
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
    else:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        assert all(1 <= side <= images.MAX_SIDE for side in image.shape[:2])
        assert image.shape[0] * image.shape[1] <= images.MAX_PIXELS
    assert time.perf_counter() - begin < 5.0


SIDES = st.one_of(st.integers(0, 9), st.integers(0, 2**32 - 1))


@settings(max_examples=300)
@given(
    st.builds(
        raw,
        encoding=st.one_of(st.sampled_from(sorted(images.ENCODINGS)), st.text()),
        width=SIDES,
        height=SIDES,
        step=SIDES,
        is_bigendian=st.integers(0, 255),
        data=st.binary(max_size=500),
    )
)
def test_any_raw_message_is_a_frame_or_refused(message):
    is_frame_or_refused(images.frame, message)


FILES = (encoded(SMOOTH, "JPEG"), encoded(SMOOTH, "JPEG", progressive=True), encoded(COLOURS, "PNG"))


@st.composite
def damaged_files(draw) -> bytes:
    data = bytearray(draw(st.sampled_from(FILES)))
    for _ in range(draw(st.integers(1, 8))):
        begin = draw(st.integers(0, len(data)))
        data[begin : begin + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(data)


@settings(max_examples=500)
@given(st.one_of(damaged_files(), st.binary(max_size=500)), st.one_of(st.just("jpeg"), st.text()))
def test_any_compressed_message_is_a_frame_or_refused(data, format):
    is_frame_or_refused(images.compressed_frame, compressed(data, format))


def repeated(data: bytearray, places: list[int]) -> st.SearchStrategy[bytes]:
    """A part of the file, repeated."""
    place = st.sampled_from(places)
    return st.builds(lambda begin, end: bytes(data[begin:end]), place, place)


NAMES = (b"IHDR", b"IDAT", b"PLTE", b"iCCP", b"acTL", b"IEND")
SEGMENTS = st.builds(struct.pack, st.just(">BBH"), st.just(0xFF), st.integers(0, 255), st.integers(0, 99))
NUMBERS = st.builds(struct.pack, st.just(">I"), st.one_of(st.integers(0, 9000), st.integers(0, 2**32 - 1)))
CHUNKS = st.builds(chunk, st.sampled_from(NAMES), st.binary(max_size=30))


@st.composite
def damaged_headers(draw) -> bytes:
    """Files with a changed structure: other markers, names and sizes, and added or repeated parts."""
    data = bytearray(draw(st.sampled_from(FILES)))
    signs = [found.start() for found in re.finditer(rb"\xff[^\x00\xff]", data)]
    places = [*signs, *range(8, 40)] if data[0] == 0xFF else [*range(8, 40), len(data) - 12]
    for _ in range(draw(st.integers(1, 4))):
        place = min(draw(st.sampled_from(places)), len(data))
        part = draw(st.one_of(SEGMENTS, NUMBERS, CHUNKS, repeated(data, places)))
        data[place : place + draw(st.sampled_from((0, len(part))))] = part * draw(st.sampled_from((1, 1, 40)))
    return bytes(data)


@settings(max_examples=500)
@given(damaged_headers())
def test_any_file_with_a_damaged_header_is_a_frame_or_refused(data):
    is_frame_or_refused(images.compressed_frame, compressed(data))


# --- Conversion by cv_bridge.


@pytest.mark.skipif(images.BRIDGE is None, reason=images.NO_BRIDGE)
@settings(max_examples=500)
@given(layouts())
def test_cv_bridge_and_numpy_give_the_same_bits(message):
    if images.bridgeable(message):
        assert np.array_equal(images.BRIDGE.imgmsg_to_cv2(message, "rgb8"), images.by_numpy(message))
    assert np.array_equal(images.frame(message).image, images.by_numpy(message))


class Recorder:
    """A fake of cv_bridge that returns a white image for any message."""

    def imgmsg_to_cv2(self, message, encoding):
        assert encoding == "rgb8"
        return np.full((message.height, message.width, 3), 255, np.uint8)


@pytest.mark.parametrize(
    ("message", "bridged"),
    [
        (raw("rgb8", 2, 2, bytes(12)), True),
        (raw("mono16", 2, 2, bytes(8), is_bigendian=1), True),
        (raw("bgr8", 2, 2, bytes(18), step=9), True),
        (raw("bgr8", 2, 2, bytes(16), step=8), False),
        (raw("mono16", 2, 2, bytes(8), is_bigendian=2), False),
        (raw("8UC3", 2, 2, bytes(12)), False),
        (raw("8UC1", 2, 2, bytes(4)), False),
    ],
)
def test_cv_bridge_is_used_where_it_reads_the_layout_rightly(monkeypatch, message, bridged):
    monkeypatch.setattr(images, "BRIDGE", Recorder())
    assert images.frame(message).image.all() == bridged


WRONG = "class CvBridge:\n    def imgmsg_to_cv2(self, message, encoding):\n        return "
NUMPY_1_PAGE = (
    "import sys\nsys.stderr.write('A module that was compiled using NumPy 1.x cannot be run in NumPy 2')\n"
)


@pytest.mark.parametrize(
    ("package", "compiled", "reason"),
    [
        ("class CvBridge: ...", "raise AttributeError('_ARRAY_API not found')", "_ARRAY_API not found"),
        ("import no_such_opencv", "", "no_such_opencv"),
        (WRONG + "1 / 0", NUMPY_1_PAGE, "compiled for numpy 1"),
        (WRONG + "1 / 0", "", "division by zero"),
        (WRONG + "[[[0, 0, 0]]]", "", "converts rgb8"),
    ],
)
def test_a_cv_bridge_that_does_not_work_is_left_out_with_its_reason(
    monkeypatch, tmp_path, capsys, package, compiled, reason
):
    (tmp_path / "cv_bridge" / "boost").mkdir(parents=True)
    (tmp_path / "cv_bridge" / "__init__.py").write_text(package)
    (tmp_path / "cv_bridge" / "boost" / "cv_bridge_boost.py").write_text(compiled)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("cv_bridge", "cv_bridge.boost", "cv_bridge.boost.cv_bridge_boost"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    try:
        bridge, why = images.find_bridge()
    finally:
        for name in [name for name in sys.modules if name.startswith("cv_bridge")]:
            del sys.modules[name]
    assert bridge is None and reason in why and "\n" not in why
    assert capsys.readouterr().err == ""
