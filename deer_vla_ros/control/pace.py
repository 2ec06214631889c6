"""Which frames may be stepped on at a given rate? As many as come, but in the long run not more than the
rate."""

from __future__ import annotations

JITTER = 0.2
"""Share of a period by which a frame may be early: a camera at the control rate jitters, and none of its
frames is to be lost."""


class Pace:
    """Decides by stamps alone, so that a replay decides alike."""

    def __init__(self, rate_hz: float):
        self.rate_hz = rate_hz
        self._due_ns: int | None = None

    @property
    def period_ns(self) -> int:
        return round(1e9 / self.rate_hz)

    @property
    def slack_ns(self) -> int:
        return int(JITTER * self.period_ns)

    def admits(self, stamp_ns: int) -> bool:
        """Whether a frame of this stamp may be stepped on. One older than the last is never due."""
        return self._due_ns is None or stamp_ns >= self._due_ns - self.slack_ns

    def take(self, stamp_ns: int) -> None:
        """A frame was stepped on. What it was early counts against the next ones, so that the mean keeps the
        rate."""
        self._due_ns = max(stamp_ns if self._due_ns is None else self._due_ns, stamp_ns) + self.period_ns

    def forget(self) -> None:
        """Whatever comes next is due."""
        self._due_ns = None
