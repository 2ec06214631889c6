"""The messages between the processes of a soak: one JSON object a line."""

from __future__ import annotations

import json
import queue
import sys
import threading
from typing import Any

ENDED: dict[str, Any] = {"do": "end"}
"""The last request of a process: its stdin was closed, or the process that started it has ended."""


def requests() -> queue.SimpleQueue[dict[str, Any]]:
    """A queue of the requests on stdin, which a thread reads at once. ENDED is the last one."""
    lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(json.loads(line))
        lines.put(ENDED)

    threading.Thread(target=read, name="stdin", daemon=True).start()
    return lines


def waiting(lines: queue.SimpleQueue[dict[str, Any]]) -> list[dict[str, Any]]:
    """Takes all requests that have come so far from the queue."""
    found = []
    while not lines.empty():
        found.append(lines.get())
    return found


def tell(**what: Any) -> None:
    """Writes one line to the process that started this one, without delay."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()
