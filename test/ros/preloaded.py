"""Starts processes that have all modules already: each is a fork of one process that imports them once.

A node needs three seconds of a processor for its imports, and the tests start about fifty nodes. A fork is a
process like any other, with its own id, session, environment and end. `test_graph` and `test/lab/demo` start
nodes without it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback


class Handle:
    """A forked process, with the part of subprocess.Popen that the tests use."""

    def __init__(self, pid: int):
        self.pid = pid
        self._status: int | None = None

    def poll(self) -> int | None:
        if self._status is None:
            self._status = _ask(status=self.pid)
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.01)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(arguments: tuple[str, ...], log: str, environment: dict[str, str] | None = None) -> Handle:
    """Runs `python ARGUMENTS...` with both output streams in the file `log`, in a session of its own.

    arguments: `-m deer_vla_ros COMMAND...` or `-c CODE ...`.
    """
    return Handle(_ask(run=list(arguments), log=log, environment=dict(environment or os.environ)))


_lock = threading.Lock()
_server: subprocess.Popen | None = None


def _ask(**request) -> int | None:
    global _server
    with _lock:
        if _server is None:
            _server = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            atexit.register(_server.stdin.close)
        _server.stdin.write(json.dumps(request) + "\n")
        _server.stdin.flush()
        return json.loads(_server.stdout.readline())


def _serve() -> None:
    """Answers requests until the test process has ended. In a fork it raises SystemExit."""
    from deer_vla_ros.lab.soak import node_with_faults  # noqa: F401
    from deer_vla_ros.ros import loading, policy_node  # noqa: F401

    gc.freeze()  # so that a fork's garbage collection leaves these modules alone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the test process
    ended: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "status" in request:
            with contextlib.suppress(ChildProcessError):
                while (found := os.waitpid(-1, os.WNOHANG))[0]:
                    ended[found[0]] = os.waitstatus_to_exitcode(found[1])
            answer = ended.get(request["status"])
        elif not (answer := os.fork()):
            _become(**request)
        print(json.dumps(answer), flush=True)


def _become(run: list[str], log: str, environment: dict[str, str]) -> None:
    """Makes this fork the process that was asked for, and runs it to its end."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output, nothing = os.open(log, os.O_WRONLY | os.O_APPEND), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    option, what, *arguments = run
    try:
        if option == "-c":
            sys.argv = ["-c", *arguments]
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
            sys.exit(0)
        from deer_vla_ros.__main__ import main

        sys.argv = [what, *arguments]
        sys.exit(main(arguments))
    except Exception:
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    _serve()
