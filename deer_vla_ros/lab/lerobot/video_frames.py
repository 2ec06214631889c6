"""The frames of videos at given times, decoded with PyAV in the order of time."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image

from deer_vla_ros.errors import UserError, cause
from deer_vla_ros.lab.lerobot.lerobot_folder import check_file
from deer_vla_ros.ros.images import MAX_PIXELS

LEAP_S = 2.0
"""A frame that is further ahead is reached from the key frame before it; others by decoding on."""


class VideoFrames:
    """The frames of one camera, in one file after another. Ask for them in the order of time: it is fastest.

    tolerance_s: how far from the time asked for a frame may be shown.
    """

    def __init__(self, tolerance_s: float):
        self._tolerance_s = tolerance_s
        self._path: Path | None = None
        self._container: av.container.InputContainer | None = None
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._before: av.VideoFrame | None = None
        self._next: av.VideoFrame | None = None

    def close(self) -> None:
        """Closes the file that is open."""
        if self._container is not None:
            self._container.close()
        self._container = self._path = self._before = self._next = None

    def at(self, path: Path, seconds: float) -> np.ndarray | None:
        """The frame that is shown nearest to a time of the file, (H, W, 3) uint8 RGB.

        None if the file has none within the tolerance. Raises UserError for a file that is damaged or ends
        before the end that it declares.
        """
        try:
            if path != self._path:
                self._open(path)
            if not self._covers(seconds):
                self._seek(seconds)
            while self._next is not None and self._next.time <= seconds:
                self._step()
            near = [frame for frame in (self._before, self._next) if frame is not None]
            best = min(near, key=lambda frame: abs(frame.time - seconds), default=None)
            if best is not None and abs(best.time - seconds) <= self._tolerance_s:
                return best.to_ndarray(format="rgb24")
        except (av.error.FFmpegError, ValueError, OSError) as error:
            raise UserError(f"{path}: no whole video ({cause(error)}): copy it again") from error
        self._check_end(path, seconds)
        return None

    def _open(self, path: Path) -> None:
        self.close()
        check_file(path)
        self._container = av.open(str(path))
        if not self._container.streams.video:
            raise ValueError("it has no video stream")
        self._stream = self._container.streams.video[0]
        if self._stream.codec_context is None:
            raise ValueError("it has a codec that this PyAV does not know")
        self._stream.thread_type = "AUTO"
        if not 0 < self._stream.width * self._stream.height <= MAX_PIXELS:
            raise ValueError(f"{self._stream.width}x{self._stream.height} pixels")
        self._path = path
        self._restart()

    def _seek(self, seconds: float) -> None:
        ticks = int((seconds - self._tolerance_s) / self._stream.time_base)
        self._container.seek(max(ticks, 0), stream=self._stream)
        self._restart()

    def _restart(self) -> None:
        self._frames = (frame for frame in self._container.decode(self._stream) if frame.pts is not None)
        self._before = self._next = None
        self._step()

    def _step(self) -> None:
        self._before, self._next = self._next or self._before, next(self._frames, None)

    def _covers(self, seconds: float) -> bool:
        """Whether decoding on leads to this time soon."""
        first = self._before or self._next
        last = self._next or self._before
        return first is not None and first.time - self._tolerance_s <= seconds <= last.time + LEAP_S

    def _check_end(self, path: Path, seconds: float) -> None:
        """Raises UserError if the file ended before `seconds`, although it declares to be longer."""
        if self._next is not None or self._stream.duration is None:
            return
        end = float(((self._stream.start_time or 0) + self._stream.duration) * self._stream.time_base)
        if seconds < end - self._tolerance_s:
            shown = self._before.time if self._before else 0.0
            raise UserError(
                f"{path}: ends at {shown:.2f} s, and declares {end:.2f} s: it was cut off: copy it again"
            )


def decoded_image(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a PNG or JPEG file. Raises many kinds of exceptions for another."""
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels")
        return np.asarray(image.convert("RGB"))
