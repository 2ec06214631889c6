"""This file holds what the observer has told so far, for the soak command to wait for."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

KEPT = 4000
"""Newest motions, holds and statuses; minutes of them."""


class News:
    """`hear` is called in the thread that reads the observer; everything else may be asked from another."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._motions: deque[int] = deque(maxlen=KEPT)
        self._holds: deque[int] = deque(maxlen=KEPT)
        self._said: deque[tuple[int, str]] = deque(maxlen=KEPT)
        self.violations = 0
        self.summary: dict[str, Any] | None = None

    def hear(self, line: dict[str, Any]) -> None:
        """One line of the observer."""
        with self._changed:
            if "motion" in line:
                self._motions.append(line["motion"])
            elif "hold" in line:
                self._holds.append(line["hold"])
            elif "status" in line:
                self._said.append((line["status"], line["message"]))
            elif "violation" in line:
                self.violations += 1
            elif "summary" in line:
                self.summary = line["summary"]
            self._changed.notify_all()

    def motion_after(self, begin_ns: int, seconds: float) -> int | None:
        """When the first motion after `begin_ns` was told [ns]; waits at most so long for it, None where none
        came."""
        return self._first(self._motions, begin_ns, seconds)

    def hold_after(self, begin_ns: int, seconds: float) -> int | None:
        """The same for a hold."""
        return self._first(self._holds, begin_ns, seconds)

    def messages(self, begin_ns: int, end_ns: int) -> list[str]:
        """What /diagnostics said in that time, each sentence once."""
        with self._changed:
            return list(dict.fromkeys(text for at, text in self._said if begin_ns <= at <= end_ns))

    def await_summary(self, seconds: float) -> dict[str, Any] | None:
        """The observer's summary, once it has come."""
        with self._changed:
            self._changed.wait_for(lambda: self.summary is not None, seconds)
            return self.summary

    def _first(self, times: deque[int], begin_ns: int, seconds: float) -> int | None:
        def first() -> int | None:
            return min((at for at in times if at > begin_ns), default=None)

        deadline = time.monotonic() + seconds
        with self._changed:
            while (found := first()) is None and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            return found
