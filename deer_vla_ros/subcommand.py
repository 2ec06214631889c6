"""How does a command run another one? As a process that ends with it, even where it is killed with -9."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping

from deer_vla_ros.errors import UserError

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def run_python(arguments: Iterable[object], environment: Mapping[str, str], whose: str) -> None:
    """`python ARGUMENTS...` to its end; UserError, in which `whose` command it is, where it fails."""
    command = [sys.executable, *map(str, arguments)]
    if subprocess.run(command, env=environment, preexec_fn=end_with_parent()).returncode:
        raise UserError(f"{whose} command failed: {' '.join(command[1:])}")


def end_with_parent() -> Callable[[], None]:
    """To run in the new process: the kernel sends it SIGTERM when this one is gone."""
    parent = os.getpid()

    def set_death_signal() -> None:
        if _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
        if os.getppid() != parent:  # it was gone before the line above
            os._exit(1)

    return set_death_signal
