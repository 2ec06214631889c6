"""This file makes one command of a twist and a target of the same stamp, in the order of time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deer_vla_ros.lab.soak.heard import SECOND, HeardCommand

PATIENCE_NS = SECOND * 15 // 100
"""How long the other half of a command is waited for, and how late a message may be behind one that was said
later."""


@dataclass(frozen=True)
class Half:
    """A twist or a target as it came. first and second: linear and angular, or position and quaternion.

    after_loss: something was lost on this topic before it. publisher: as `Publishers` numbers them.
    """

    is_twist: bool
    said_ns: int
    heard_ns: int
    stamp_ns: int
    after_loss: bool
    publisher: int
    first: np.ndarray
    second: np.ndarray


class Publishers:
    """Tells the publishers of one topic apart by how many messages each has published, which is all that
    rclpy tells."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}  # the newest of each publisher
        self._known = 0

    def of(self, count: int) -> tuple[int, bool]:
        """Which publisher a message comes from that is its `count`-th, and whether messages before it were
        lost."""
        for publisher, newest in self._counts.items():
            if count == newest + 1:
                self._counts[publisher] = count
                return publisher, False
        self._known += 1
        self._counts[self._known] = count
        if len(self._counts) > 8:  # of publishers that have ended
            del self._counts[min(self._counts)]
        return self._known, count != 1


class Pairing:
    """Takes halves in any order and gives commands in the order of time, PATIENCE_NS later.

    It takes the wall clock for the node's: whoever knows of another clock puts that in.
    """

    def __init__(self) -> None:
        self._halves: dict[tuple[int, bool], Half] = {}
        self._ready: list[HeardCommand] = []

    def put(self, half: Half) -> None:
        """A new half; one that waits under the same stamp is told alone."""
        other = self._halves.pop((half.stamp_ns, not half.is_twist), None)
        if other is not None:
            self._ready.append(_command(*((half, other) if half.is_twist else (other, half))))
            return
        waiting = self._halves.pop((half.stamp_ns, half.is_twist), None)
        if waiting is not None:
            self._ready.append(_alone(waiting))
        self._halves[half.stamp_ns, half.is_twist] = half

    def take(self, now_ns: int) -> list[HeardCommand]:
        """What was said long enough ago that nothing older can still come."""
        until = now_ns - PATIENCE_NS
        for key, half in list(self._halves.items()):
            if half.said_ns < until:
                del self._halves[key]
                self._ready.append(_alone(half))
        self._ready.sort(key=lambda command: command.said_ns)
        count = sum(command.said_ns < until for command in self._ready)
        taken, self._ready = self._ready[:count], self._ready[count:]
        return taken


def _command(twist: Half, target: Half) -> HeardCommand:
    later = max(twist, target, key=lambda half: half.said_ns)
    heard_ns = max(twist.heard_ns, target.heard_ns)
    return HeardCommand(
        later.said_ns,
        heard_ns,
        later.said_ns,
        target.stamp_ns,
        *(target.first, target.second, twist.first, twist.second),
        after_loss=twist.after_loss or target.after_loss,
        publisher=twist.publisher,
    )


def _alone(half: Half) -> HeardCommand:
    arrays = (None, None, half.first, half.second) if half.is_twist else (half.first, half.second, None, None)
    times = (half.said_ns, half.heard_ns, half.said_ns, half.stamp_ns)
    # The publishers of targets are numbered apart from those of twists: a target alone starts an order of its
    # own.
    publisher = half.publisher if half.is_twist else -half.publisher
    return HeardCommand(*times, *arrays, after_loss=half.after_loss, publisher=publisher)
