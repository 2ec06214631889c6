"""This file holds how the processes of a soak talk with each other: one JSON object a line."""

from __future__ import annotations

import json
import queue
import sys
import threading
from typing import Any

ENDED: dict[str, Any] = {"do": "end"}
"""What a process reads when whoever started it has closed its stdin, or is gone."""


def requests() -> queue.SimpleQueue[dict[str, Any]]:
    """What comes in on stdin, read by a thread so that nobody who is busy misses it; ENDED is the last."""
    lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(json.loads(line))
        lines.put(ENDED)

    threading.Thread(target=read, name="stdin", daemon=True).start()
    return lines


def waiting(lines: queue.SimpleQueue[dict[str, Any]]) -> list[dict[str, Any]]:
    """Everything that has come so far."""
    found = []
    while not lines.empty():
        found.append(lines.get())
    return found


def tell(**what: Any) -> None:
    """One line to whoever started this process, at once."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()
