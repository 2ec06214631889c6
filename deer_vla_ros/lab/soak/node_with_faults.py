"""The process of the policy node, whose inference the soak can make fail on request.

The soak command starts it with the arguments of the node. A line on stdin, {"inference": NAME}, selects what
the policy's steps do from then on: one of SPOILS, or "good".
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
from deer_vla_ros.lab.soak.logs import MARK

SLOW_S = 1.0
LOCKED_S = 3.0


class PanicException(BaseException):
    """The error of a library in Rust that panics.

    It is not an Exception, so that `except Exception` does not catch it.
    """


def _raise() -> None:
    raise RuntimeError(MARK)


def _panic() -> None:
    raise PanicException(MARK)


def _keep_lock() -> None:
    """Calls a C function that keeps the interpreter's lock, so that no other thread of the process runs."""
    ctypes.PyDLL(None).usleep(int(LOCKED_S * 1e6))
    _Mood.name = "good"  # Only once: a second call would follow before the soak command could end the fault.


SPOILS: dict[str, Callable[[], None]] = {
    "inference_raises": _raise,
    "inference_panics": _panic,
    "inference_slow": lambda: time.sleep(SLOW_S),
    "inference_keeps_lock": _keep_lock,
    "inference_nan": lambda: None,
}


class _Mood:
    """Selects what the next step does. The thread that reads stdin sets it."""

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
    """Starts the thread that reads requests and sets the mood until the process ends."""
    lines = jsonlines.requests()

    def obey() -> None:
        while (request := lines.get()) != jsonlines.ENDED:
            _Mood.name = request["inference"]

    threading.Thread(target=obey, name="moods", daemon=True).start()


if __name__ == "__main__":
    DeerPolicy.step = _spoil(DeerPolicy.step)
    _listen()
    sys.exit(main(["node", *sys.argv[1:]]))
