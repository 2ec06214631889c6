"""Processes that a command starts: each ends with the command, even where that is killed with -9."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

from deer_vla_ros.errors import UserError

HIGHEST_PORTABLE_DOMAIN = 101
"""Above this ROS_DOMAIN_ID, a domain's ports reach into the range that Linux gives to other programs."""
END_TIMEOUT_S = 15.0
"""How long a process may take from SIGTERM to its end. After it the process is killed, which is a failure."""
TAIL_LINES = 15
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def keep_off_other_robots() -> None:
    """Chooses a random ROS_DOMAIN_ID for this process and those that it starts, unless there is one: no robot
    nearby shall obey a demo or a test."""
    os.environ.setdefault("ROS_DOMAIN_ID", str(random.SystemRandom().randint(1, HIGHEST_PORTABLE_DOMAIN)))


def leave_out_shared_memory() -> None:
    """Lets DDS use UDP only: with shared memory a process that is killed can leave the others waiting for
    ever (eProsima/Fast-DDS#5469)."""
    os.environ.setdefault("FASTDDS_BUILTIN_TRANSPORTS", "UDPv4")


def run_python(arguments: Iterable[object], environment: Mapping[str, str], whose: str) -> None:
    """Runs `python ARGUMENTS...` to its end. Where it fails, raises UserError, which says `whose` command it
    was."""
    command = [sys.executable, *map(str, arguments)]
    if subprocess.run(command, env=environment, preexec_fn=end_with_parent()).returncode:
        raise UserError(f"{whose} command failed: {' '.join(command[1:])}")


def end_with_parent(parent: int | None = None) -> Callable[[], None]:
    """A function to run in a new process: afterwards the kernel sends that process SIGTERM when its parent,
    more exactly the thread that started it, has ended. parent: its process id; None: this process."""
    parent = os.getpid() if parent is None else parent

    def set_death_signal() -> None:
        if _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
        if os.getppid() != parent:  # the parent had ended before the line above
            os._exit(1)

    return set_death_signal


class ChildProcess:
    """`python -m deer_vla_ros COMMAND...` in a process group of its own, with both output streams in `log`.

    A Ctrl-C at the terminal does not reach that group, so the command can end its processes in order.
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
        """Raises UserError where the process has ended, after it has printed the end of its log on stderr."""
        status = self._popen.poll()
        if status is not None:
            self._ended_unasked = True
            self._fail(f"ended before it was to, with {_told(status)}")

    def end(self) -> None:
        """Ends the process with SIGTERM. Raises UserError like `check` where it does not end in time with
        exit status 0."""
        if self._ended_unasked:
            return
        self._popen.send_signal(
            signal.SIGTERM
        )  # does nothing where the process has ended: see its status below
        try:
            status = self._popen.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            self._fail(f"was still running {END_TIMEOUT_S:g} s after SIGTERM and was killed")
        if status:
            self._fail(f"ended with {_told(status)} when it was to end")

    def kill(self) -> None:
        """Kills the process and its whole group at once."""
        if self._popen.poll() is None:
            os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait()

    def _fail(self, what: str) -> NoReturn:
        lines = self._log.read_text(errors="replace").splitlines()[-TAIL_LINES:] or ["(it printed nothing)"]
        print(f"--- the end of {self._log}", *lines, "---", sep="\n", file=sys.stderr)
        raise UserError(f"the {self.name} {what}: see {self._log}")


@contextmanager
def kept(*processes: ChildProcess) -> Iterator[None]:
    """No process outlives this block, whatever happens inside. They are ended in the order given: first the
    one that commands, then the one that obeys."""
    with ExitStack() as ends:
        for process in reversed(processes):
            ends.callback(process.kill)
            ends.callback(process.end)
        yield


def _told(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
