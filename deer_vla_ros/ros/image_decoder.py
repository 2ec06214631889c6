"""A thread that decodes camera images, so that a large image delays neither a service nor a step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from deer_vla_ros.control.types import Camera, Frame
from deer_vla_ros.errors import one_line

Decode = Callable[[Any], Frame]


class Decoder:
    """Decodes the newest message of each camera. A message that is replaced while it waits is dropped."""

    def __init__(self, on_frame: Callable[[Camera, Frame], None], on_error: Callable[[Camera, str], None]):
        """on_frame, on_error: called in the decoder's thread. on_error gets the reason."""
        self._on_frame, self._on_error = on_frame, on_error
        self._waiting: dict[Camera, tuple[Decode, Any]] = {}
        self._news = threading.Condition()
        self._running = True
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._thread.start()

    def put(self, camera: Camera, decode: Decode, message: Any) -> None:
        """Adds a message. Any thread may call it; it returns at once."""
        with self._news:
            self._waiting[camera] = decode, message
            self._news.notify()

    def close(self, timeout_s: float) -> None:
        """Drops messages that wait. An image that is being decoded may outlast the timeout [s]."""
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
                camera = next(iter(self._waiting))  # the camera that has waited longest
                decode, message = self._waiting.pop(camera)
            try:
                frame = decode(message)
                self._on_frame(camera, frame)
            except Exception as error:  # an error in one image must not end the thread
                self._on_error(camera, one_line(error))
