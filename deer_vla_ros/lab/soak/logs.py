"""The search of logs for errors that no code handled."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

TRACEBACK = "Traceback (most recent call last)"
ENDS = ("Fatal Python error", "terminate called", "Segmentation fault", "core dumped")
"""Words in the log of a process that ended by an error in C or C++."""
MARK = "soak did this on purpose"
"""Words in every error that the soak raises inside the node, to distinguish it from the node's own errors."""


def unhandled(logs: Iterable[Path]) -> list[str]:
    """One line for each traceback and for each of ENDS. Errors that the soak raised itself do not count."""
    found = []
    for log in logs:
        if log.exists():
            found += [f"{log.name}: {line}" for line in unhandled_lines(log.read_text(errors="replace"))]
    return found


def unhandled_lines(text: str) -> list[str]:
    """The line of every traceback that names the error, and every line with one of ENDS."""
    lines = text.splitlines()
    found = [line for line in lines if any(end in line for end in ENDS)]
    for index, line in enumerate(lines):
        if TRACEBACK in line:
            found.append(_error_of(lines[index + 1 :]))
    return [line for line in found if MARK not in line]


def _error_of(lines: list[str]) -> str:
    """The first line after the stack frames, which are indented."""
    for line in lines:
        bare = re.sub(r"^\[[A-Z]+\] \[[\d.]+\] \[\w+\]: ", "", line)
        if bare and not bare.startswith(" "):
            return bare
    return "(the log ends within a traceback)"
