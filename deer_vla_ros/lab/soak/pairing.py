"""The pairing of a twist and a target with the same stamp into one command, in the order of time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deer_vla_ros.lab.soak.heard import SECOND, HeardCommand

PATIENCE_NS = SECOND * 15 // 100
"""The most time to wait for the other half of a command, and for a message that was published before
others."""


@dataclass(frozen=True)
class Half:
    """A twist or a target as it was received. first, second: linear and angular, or position and quaternion.

    said_ns, heard_ns, stamp_ns: as in HeardCommand. after_loss: messages before it on this topic were lost.
    publisher: the number that `Publishers` gives.
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
    """Distinguishes the publishers of one topic by their numbers of messages: rclpy gives nothing else."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}  # The newest count of each publisher.
        self._known = 0

    def of(self, count: int) -> tuple[int, bool]:
        """The number of a message's publisher, and whether messages before this one were lost.

        count: the message is the `count`-th of its publisher.
        """
        for publisher, newest in self._counts.items():
            if count == newest + 1:
                self._counts[publisher] = count
                return publisher, False
        self._known += 1
        self._counts[self._known] = count
        if len(self._counts) > 8:  # The oldest ones belong to publishers that have ended.
            del self._counts[min(self._counts)]
        return self._known, count != 1


class Pairing:
    """Takes halves in any order and gives commands in the order of time, PATIENCE_NS later.

    It sets a command's clock_ns to the wall clock; in simulated time the bench replaces it.
    """

    def __init__(self) -> None:
        self._halves: dict[tuple[int, bool], Half] = {}
        self._ready: list[HeardCommand] = []

    def put(self, half: Half) -> None:
        """Takes a half.

        If a half of the same kind and stamp still waits, that one becomes a command alone.
        """
        other = self._halves.pop((half.stamp_ns, not half.is_twist), None)
        if other is not None:
            self._ready.append(_command(*((half, other) if half.is_twist else (other, half))))
            return
        waiting = self._halves.pop((half.stamp_ns, half.is_twist), None)
        if waiting is not None:
            self._ready.append(_alone(waiting))
        self._halves[half.stamp_ns, half.is_twist] = half

    def take(self, now_ns: int) -> list[HeardCommand]:
        """Takes the commands that are older than PATIENCE_NS, so that no earlier one can still come."""
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
    # The publishers of targets and of twists are numbered separately. A target without a twist gets a
    # negative number, so that its stamps are not compared with those of a twist's publisher.
    publisher = half.publisher if half.is_twist else -half.publisher
    return HeardCommand(*times, *arrays, after_loss=half.after_loss, publisher=publisher)
