"""The thread that decodes camera images, so that a big one delays neither a service nor a step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from deer_vla_ros.control.types import Camera, Frame
from deer_vla_ros.errors import one_line

Decode = Callable[[Any], Frame]


class Decoder:
    """Takes the newest message of each camera. A message that is replaced while it waits is never decoded."""

    def __init__(self, on_frame: Callable[[Camera, Frame], None], on_error: Callable[[Camera, str], None]):
        """on_frame, on_error: called in the decoder's thread; the second with the reason why an image is
        none."""
        self._on_frame, self._on_error = on_frame, on_error
        self._waiting: dict[Camera, tuple[Decode, Any]] = {}
        self._news = threading.Condition()
        self._running = True
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._thread.start()

    def put(self, camera: Camera, decode: Decode, message: Any) -> None:
        """From any thread; returns at once."""
        with self._news:
            self._waiting[camera] = decode, message
            self._news.notify()

    def close(self, timeout_s: float) -> None:
        """What waits is dropped; one that is being decoded may outlast the timeout, and then goes nowhere."""
        with self._news:
            self._running = False
            self._news.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._waiting or not self._running)
                if not self._running:
                    return
                camera = next(iter(self._waiting))  # in the order in which they came
                decode, message = self._waiting.pop(camera)
            try:
                frame = decode(message)
                self._on_frame(camera, frame)
            except Exception as error:  # whatever fails on one image must not end those after it
                self._on_error(camera, one_line(error))
