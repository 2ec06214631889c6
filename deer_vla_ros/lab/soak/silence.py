"""The times without any command, except those that are excused."""

from __future__ import annotations

from dataclasses import dataclass

from deer_vla_ros.lab.soak.heard import SECOND

KEPT_NS = SECOND // 4
"""Shorter gaps are not kept."""


@dataclass(frozen=True)
class Quiet:
    """A time without a command, wall clock."""

    begin_ns: int
    end_ns: int

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.begin_ns) / SECOND


class Silence:
    """Takes the times of commands and finds the gaps. A time may be excused afterwards."""

    def __init__(self) -> None:
        self._last_ns: int | None = None
        self._gaps: list[Quiet] = []
        self._excused: list[Quiet] = []

    def heard(self, said_ns: int) -> None:
        """Takes the time of a command."""
        if self._last_ns is not None and said_ns - self._last_ns > KEPT_NS:
            self._gaps.append(Quiet(self._last_ns, said_ns))
        self._last_ns = max(said_ns, self._last_ns or said_ns)

    def excuse(self, begin_ns: int, end_ns: int) -> None:
        """Excuses a time: no command is expected in it, or the observer could not receive any."""
        self._excused.append(Quiet(begin_ns, end_ns))

    def stretches(self, now_ns: int) -> list[Quiet]:
        """The parts of all gaps that are not excused, including the gap that lasts until now."""
        gaps = list(self._gaps)
        if self._last_ns is not None and now_ns > self._last_ns:
            gaps.append(Quiet(self._last_ns, now_ns))
        return [rest for gap in gaps for rest in _without(gap, self._excused) if rest.seconds > 0]


def _without(gap: Quiet, excused: list[Quiet]) -> list[Quiet]:
    """The parts of a gap that are not excused."""
    rests, begin = [], gap.begin_ns
    for quiet in sorted(excused, key=lambda quiet: quiet.begin_ns):
        if quiet.end_ns <= begin or quiet.begin_ns >= gap.end_ns:
            continue
        if quiet.begin_ns > begin:
            rests.append(Quiet(begin, quiet.begin_ns))
        begin = max(begin, quiet.end_ns)
    if begin < gap.end_ns:
        rests.append(Quiet(begin, gap.end_ns))
    return rests
