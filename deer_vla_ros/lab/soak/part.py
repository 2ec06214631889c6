"""This file holds one process of a soak: started, talked to by JSON lines, stopped, killed and looked at."""

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
"""How long a process may take from SIGTERM to its end."""
ANSWER_S = 60.0
"""How long an answer may take before the process counts as hung."""


class Part:
    """`python -m MODULE ARGUMENTS...` in a process group of its own. stderr, and stdout unless it talks, go
    to `log`.

    hear: gets every line that it says and that answers no request; it is called in a thread of its own.
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
        """One line on its stdin; a process that is gone does not hear it."""
        with contextlib.suppress(OSError):
            self._popen.stdin.write(json.dumps(what).encode() + b"\n")
            self._popen.stdin.flush()

    def ask(self, patience_s: float = ANSWER_S, **what: Any) -> dict[str, Any]:
        """Its answer to one request; raises UserError where none comes."""
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
        """Until it has said that it is; raises UserError."""
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
            except json.JSONDecodeError:  # the middleware prints its own complaints there
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

    # --- its end

    def signal(self, number: int) -> None:
        """Nothing happens where it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9, of the process alone: what it has started is to notice by itself."""
        self.killed = True
        self.signal(signal.SIGKILL)
        self._popen.wait()

    def end(self) -> int | None:
        """SIGTERM, and after END_S kill -9; its exit status, None where it was killed."""
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
        """Whatever is left of its process group, at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(1.0)


def children_of(parent: int) -> list[int]:
    """Process ids of a process's children that run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, whose = stat.read_text().rpartition(")")[2].split()[:2]
            if int(whose) == parent and state != "Z":
                found.append(int(stat.parent.name))
    return found


def command_of(pid: int) -> str:
    """The command line of a process, words parted by blanks; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def wait_until(condition: Callable[[], Any], seconds: float, period_s: float = 0.01) -> Any:
    """What `condition` gives as soon as that is true; what it gives last where it does not become true in
    time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(period_s)
    return value
