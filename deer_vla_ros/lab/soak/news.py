"""The observer's reports so far; the soak command waits for them here."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

KEPT = 4000
"""The number of newest motions, holds and statuses that are kept; they cover minutes."""


class News:
    """The observer's reports.

    The thread that reads the observer calls `hear`; other threads may call the rest.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._motions: deque[int] = deque(maxlen=KEPT)
        self._holds: deque[int] = deque(maxlen=KEPT)
        self._said: deque[tuple[int, str]] = deque(maxlen=KEPT)
        self.violations = 0
        self.summary: dict[str, Any] | None = None

    def hear(self, line: dict[str, Any]) -> None:
        """Takes one line of the observer."""
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
        """The time of the first motion after `begin_ns` [ns].

        Waits for it at most `seconds`; None if none came.
        """
        return self._first(self._motions, begin_ns, seconds)

    def hold_after(self, begin_ns: int, seconds: float) -> int | None:
        """The time of the first hold after `begin_ns` [ns].

        Waits for it at most `seconds`; None if none came.
        """
        return self._first(self._holds, begin_ns, seconds)

    def messages(self, begin_ns: int, end_ns: int) -> list[str]:
        """The messages of /diagnostics in that time, each text once."""
        with self._changed:
            return list(dict.fromkeys(text for at, text in self._said if begin_ns <= at <= end_ns))

    def await_summary(self, seconds: float) -> dict[str, Any] | None:
        """Waits at most `seconds` for the observer's summary; None if it has not come."""
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
