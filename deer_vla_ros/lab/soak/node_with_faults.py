"""This process is the policy node itself, whose inference soak can spoil on demand.

Started by the soak command; arguments are those of the node. A line on stdin, {"inference": NAME}, chooses
what the policy's steps do from then on: one of SPOILS, or "good".
"""

from __future__ import annotations

import ctypes
import dataclasses
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from deer_vla_ros.__main__ import main
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.lab.soak import jsonlines

SLOW_S = 1.0
LOCKED_S = 3.0
MARK = "soak did this on purpose"
"""Stands in every error that is raised here, so that a log tells them from the node's own."""


class PanicException(BaseException):
    """What a library written in Rust raises when it panics: no Exception, so few catch it."""


def _raise() -> None:
    raise RuntimeError(MARK)


def _panic() -> None:
    raise PanicException(MARK)


def _keep_lock() -> None:
    """A call into C that keeps the interpreter's lock: no other thread of the process runs."""
    ctypes.PyDLL(None).usleep(int(LOCKED_S * 1e6))
    _Mood.name = "good"  # once is enough: a second one would follow before anybody could lift the fault


SPOILS: dict[str, Callable[[], None]] = {
    "inference_raises": _raise,
    "inference_panics": _panic,
    "inference_slow": lambda: time.sleep(SLOW_S),
    "inference_keeps_lock": _keep_lock,
    "inference_nan": lambda: None,
}


class _Mood:
    """What the next step does; written by the thread that reads stdin."""

    name = "good"


def _spoil(step: Callable[..., Any]) -> Callable[..., Any]:
    def spoiled(policy: DeerPolicy, *args: Any, **kwargs: Any) -> Any:
        mood = _Mood.name
        SPOILS.get(mood, lambda: None)()
        result = step(policy, *args, **kwargs)
        if mood != "inference_nan":
            return result
        action = dataclasses.replace(result.action, pose=np.full_like(result.action.pose, np.nan))
        return dataclasses.replace(result, action=action)

    return spoiled


def _listen() -> None:
    """Requests change the mood for as long as the process lives."""
    lines = jsonlines.requests()

    def obey() -> None:
        while (request := lines.get()) != jsonlines.ENDED:
            _Mood.name = request["inference"]

    threading.Thread(target=obey, name="moods", daemon=True).start()


if __name__ == "__main__":
    DeerPolicy.step = _spoil(DeerPolicy.step)
    _listen()
    sys.exit(main(["node", *sys.argv[1:]]))
