"""One process of a soak: it can be started, sent JSON lines, stopped, killed and inspected."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deer_vla_ros.errors import UserError
from deer_vla_ros.processes import end_with_parent

END_S = 15.0
"""The most time from SIGTERM to a process's end."""
ANSWER_S = 60.0
"""The most time for an answer; after it the process counts as hung."""


class Part:
    """The process `python -m MODULE ARGUMENTS...`, in a process group of its own.

    talks: whether the process writes JSON lines to stdout. Its stderr goes to `log`, and so does its stdout
    if it does not talk. hear: called with every line that is not an answer to a request, in a thread of its
    own.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: list[str],
        log: Path,
        hear: Callable[[dict[str, Any]], None] | None = None,
        talks: bool = True,
    ):
        self.name, self.log = name, log
        self.killed = False
        self._hear = hear
        self._ids = itertools.count()
        self._answers: dict[int, dict[str, Any]] = {}
        self._news = threading.Condition()
        self._ready = False
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if talks else output,
                stderr=output,
                start_new_session=True,
                preexec_fn=end_with_parent(),
            )
        if talks:
            threading.Thread(target=self._read, name=f"{name} reader", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def is_running(self) -> bool:
        return self._popen.poll() is None

    def say(self, **what: Any) -> None:
        """Writes one line to the process's stdin; nothing happens if the process has ended."""
        with contextlib.suppress(OSError):
            self._popen.stdin.write(json.dumps(what).encode() + b"\n")
            self._popen.stdin.flush()

    def ask(self, patience_s: float = ANSWER_S, **what: Any) -> dict[str, Any]:
        """Sends a request and returns the answer. Raises UserError if none comes within `patience_s`."""
        number = next(self._ids)
        self.say(id=number, **what)
        with self._news:
            if not self._news.wait_for(lambda: number in self._answers or not self.is_running(), patience_s):
                raise UserError(
                    f"the {self.name} did not answer {what} within {patience_s:g} s: see {self.log}"
                )
        if number not in self._answers:
            raise UserError(f"the {self.name} ended before it was to: see {self.log}")
        return self._answers.pop(number)

    def await_ready(self, patience_s: float = ANSWER_S) -> None:
        """Waits until the process has written that it is ready.

        Raises UserError if it does not within `patience_s`.
        """
        with self._news:
            if (
                not self._news.wait_for(lambda: self._ready or not self.is_running(), patience_s)
                or not self._ready
            ):
                raise UserError(f"the {self.name} did not start within {patience_s:g} s: see {self.log}")

    def _read(self) -> None:
        for line in self._popen.stdout:
            try:
                said = json.loads(line)
            except json.JSONDecodeError:  # The middleware prints its own messages to stdout.
                continue
            with self._news:
                self._ready = self._ready or "ready" in said
                if "id" in said:
                    self._answers[said["id"]] = said
                self._news.notify_all()
            if "id" not in said and self._hear:
                self._hear(said)
        with self._news:
            self._news.notify_all()

    # --- The end of the process.

    def signal(self, number: int) -> None:
        """Sends a signal; nothing happens if the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills the process with SIGKILL, but not its children: they have to notice by themselves."""
        self.killed = True
        self.signal(signal.SIGKILL)
        self._popen.wait()

    def end(self) -> int | None:
        """Ends the process by SIGTERM, after END_S by SIGKILL. Returns its status, None after SIGKILL."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        with contextlib.suppress(OSError):
            self._popen.stdin.close()
        try:
            return self._popen.wait(END_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def end_group(self) -> None:
        """Kills all processes of its process group that still run."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(1.0)


def children_of(parent: int) -> list[int]:
    """The process ids of a process's running children."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, whose = stat.read_text().rpartition(")")[2].split()[:2]
            if int(whose) == parent and state != "Z":
                found.append(int(stat.parent.name))
    return found


def command_of(pid: int) -> str:
    """The command line of a process, its words separated by spaces; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def wait_until(condition: Callable[[], Any], seconds: float, period_s: float = 0.01) -> Any:
    """Waits until `condition()` is true, at most `seconds`. Returns its last value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(period_s)
    return value
