"""Decompression with limits: small input cannot fill the memory or the disk."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import IO

from backports import zstd
from lz4.frame import LZ4FrameDecompressor

from deer_vla_ros.errors import UserError, cause

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
LARGEST = 2**27
"""The most bytes of one chunk or message, decompressed."""
FILE_RATIO = 1000
"""A file may grow to this many times its size, or to LARGEST if that is more."""
RESERVE = 2**30
"""Bytes that stay free on the disk."""
BLOCK = 2**20


def inflated(
    data: bytes | memoryview, compression: str = "zstd", limit: int | None = None
) -> bytes | memoryview:
    """The decompressed bytes. compression: "zstd", "lz4" or "" for none.

    Raises ValueError for more than `limit` (or LARGEST) bytes and for an unknown compression, and ValueError
    or an error of the library for damaged data.
    """
    limit = LARGEST if limit is None else limit
    if not compression:
        whole = data
    elif compression in ("zstd", "lz4"):
        decoder = zstd.ZstdDecompressor() if compression == "zstd" else LZ4FrameDecompressor()
        whole = decoder.decompress(data, max_length=limit + 1)
        if len(whole) <= limit and (not decoder.eof or decoder.unused_data):
            raise ValueError(f"{compression} data is cut short, or more follows it")
    else:
        raise ValueError(f"compression {compression!r} is not zstd or lz4")
    if len(whole) > limit:
        raise ValueError(f"more than the {limit} bytes that are allowed here")
    return whole


def inflated_file(path: Path) -> IO[bytes]:
    """The decompressed content of a .zstd file, in a temporary file, which is removed when it is closed.

    Raises UserError if the content is damaged or too large, or the disk for temporary files is too small.
    """
    limit, room = max(path.stat().st_size * FILE_RATIO, LARGEST), _room()
    with open(path, "rb") as packed:
        declared = zstd.get_frame_info(packed.read(18)).decompressed_size or 0
    target, written = tempfile.NamedTemporaryFile(prefix="deer_vla_"), 0
    try:
        _check(path, declared, limit, room)
        with zstd.open(path, "rb") as source:
            while block := source.read(BLOCK):
                written += len(block)
                _check(path, written, limit, room)
                target.write(block)
        target.flush()
        return target
    except UserError:
        target.close()
        raise
    except Exception as error:  # for arbitrary bytes, a decoder may raise anything
        target.close()
        raise UserError(
            f"{path}: cannot be decompressed ({cause(error)}): copy it again, or try `zstd -d {path}`"
        ) from error


def decompressed_first(path: Path) -> tuple[str, Path]:
    """For tools that read no .zstd file: the command to run before, with "and", and the file that it makes;
    nothing, and `path`, for any other file."""
    if path.suffix != ".zstd":
        return "", path
    return f"`zstd -d {path}` and ", path.with_suffix("")


def _room() -> int:
    return shutil.disk_usage(tempfile.gettempdir()).free - RESERVE


def _check(path: Path, size: int, limit: int, room: int) -> None:
    if size > limit:
        raise UserError(
            f"{path}: it would grow to more than {limit / 1e6:.0f} MB, {FILE_RATIO} times its size, as no "
            f"recording does: look at it with `zstd -l {path}`, and decompress it yourself if it is right"
        )
    if size > room:
        raise UserError(
            f"{path}: {tempfile.gettempdir()} has no room for its {size / 1e6:.0f} MB, decompressed: set "
            "TMPDIR to a folder with more room"
        )
