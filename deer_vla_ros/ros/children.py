"""How does a command keep the processes it starts? Each with a log, ended in order, and none left behind whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

from deer_vla_ros.errors import UserError
from deer_vla_ros.subcommand import end_with_parent

END_TIMEOUT_S = 15.0
"""How long a process may take from SIGTERM to its end before it is killed, which counts as a failure."""
TAIL_LINES = 15


class ChildProcess:
    """`python -m deer_vla_ros COMMAND...` in a process group of its own, both output streams in `log`.

    The group of its own keeps a Ctrl-C at the terminal away from it, so that the command can end its processes in order.
    """

    def __init__(self, name: str, command: list[str], log: Path):
        self.name = name
        self._log = log
        self._ended_unasked = False
        with log.open("w") as output:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "deer_vla_ros", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent(),
            )

    def check(self) -> None:
        """Raises UserError where the process is no longer running, after the end of its log on stderr."""
        status = self._popen.poll()
        if status is not None:
            self._ended_unasked = True
            self._fail(f"ended before it was to, with {_told(status)}")

    def end(self) -> None:
        """Ends it with SIGTERM; raises UserError like `check` where that does not give exit status 0 in time."""
        if self._ended_unasked:
            return
        self._popen.send_signal(signal.SIGTERM)  # nothing happens where it has ended: its status is asked below
        try:
            status = self._popen.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            self._fail(f"was still running {END_TIMEOUT_S:g} s after SIGTERM and was killed")
        if status:
            self._fail(f"ended with {_told(status)} when it was to end")

    def kill(self) -> None:
        """The last resort: its whole group, at once."""
        if self._popen.poll() is None:
            os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait()

    def _fail(self, what: str) -> NoReturn:
        lines = self._log.read_text(errors="replace").splitlines()[-TAIL_LINES:] or ["(it printed nothing)"]
        print(f"--- the end of {self._log}", *lines, "---", sep="\n", file=sys.stderr)
        raise UserError(f"the {self.name} {what}: see {self._log}")


@contextmanager
def kept(*processes: ChildProcess) -> Iterator[None]:
    """Whatever happens inside, no process outlives this. They are ended in the order given: first who commands, then who obeys."""
    with ExitStack() as ends:
        for process in reversed(processes):
            ends.callback(process.kill)
            ends.callback(process.end)
        yield


def _told(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
