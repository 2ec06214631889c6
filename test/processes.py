"""Helpers for tests with processes: waiting for a condition, and finding running processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Value = TypeVar("Value")


def wait_until(condition: Callable[[], Value], timeout: float = 10.0, what: str = "the condition") -> Value:
    """Polls until `condition()` is true and returns its value.

    After `timeout` seconds the test fails and names `what`.
    """
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come within {timeout:g} s")
        time.sleep(0.005)
    return value


def state_and_parent(pid):
    """A process's state (a letter) and its parent's id from /proc; None if the process has ended."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == "Z" else (state, int(parent))


def children(parent):
    """The ids of the running processes that `parent` started."""
    running = {int(folder.name): state_and_parent(folder.name) for folder in Path("/proc").glob("[0-9]*")}
    return [pid for pid, found in running.items() if found and found[1] == parent]


def command_of(pid):
    """The words of a process's command line."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")


def gone(pid):
    """Whether a process has ended."""
    return state_and_parent(pid) is None
