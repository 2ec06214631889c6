"""The pace: it admits camera frames to inference, in the long run not more than the control rate."""

from __future__ import annotations

JITTER = 0.2
"""Share of a period by which a frame may be early. A camera at the control rate loses no frame while its
stamps are at most this share apart from an even pace, from the earliest to the latest."""


class Pace:
    """Decides by the frames' stamps alone, so that a replay decides the same."""

    def __init__(self, rate_hz: float):
        self.rate_hz = rate_hz
        self._due_ns: int | None = None

    @property
    def period_ns(self) -> int:
        return round(1e9 / self.rate_hz)

    @property
    def slack_ns(self) -> int:
        """How early a frame may be."""
        return int(JITTER * self.period_ns)

    def admits(self, stamp_ns: int) -> bool:
        """Whether a frame with this stamp may be used. A frame older than the last used one never may."""
        return self._due_ns is None or stamp_ns >= self._due_ns - self.slack_ns

    def take(self, stamp_ns: int) -> None:
        """A frame is used. If it was early, the next one is due later, so that the mean keeps the rate."""
        self._due_ns = max(stamp_ns if self._due_ns is None else self._due_ns, stamp_ns) + self.period_ns

    def forget(self) -> None:
        """The next frame may be used, whatever its stamp."""
        self._due_ns = None
