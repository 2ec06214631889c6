"""The node's side of the watchdog: starts the process, sends beats, and replaces a process that has died."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections import deque

from deer_vla_ros.ros.watchdog import HELD, Beat, WatchdogSettings

SILENCE_S = 1.0
"""A watchdog that has not answered for this time [s] is stopped, or has not started yet."""
RESTART_S, HOPELESS_S = 2.0, 10.0
"""RESTART_S: shortest time between two starts [s], so that a watchdog that cannot start does not occupy the
machine. HOPELESS_S: a watchdog that has been silent for this time is stopped or hangs, and is replaced."""
END_S = 0.5
"""How long the watchdog may take to end after the request [s]."""
REMEMBERED_HOLDS = 64
"""How many stamps of the watchdog's holds are kept."""


class WatchdogClient:
    """One watchdog process from `start` to `close`.

    The control thread calls `beat` and `is_alive`, and the thread that ends control calls `beat` once more.
    The executor's thread calls `has_published`. None of them waits for the watchdog.
    """

    def __init__(self, settings: WatchdogSettings, ros_args: list[str]):
        """ros_args: the process's arguments for rclpy, which name the security enclave."""
        self._settings, self._ros_args = settings, ros_args
        self._link: socket.socket | None = None
        self._process: subprocess.Popen | None = None
        self._started = self._heard = -HOPELESS_S
        self._is_gone = False
        self._reading = threading.Lock()  # a message that one thread has received is known to the other
        self._holds: deque[int] = deque(maxlen=REMEMBERED_HOLDS)

    def start(self) -> None:
        """Starts the process, unless it runs already."""
        if self._process is None:
            self._start()

    def beat(self, beat: Beat) -> None:
        """Sends a beat. It is lost if the socket is full: a stopped watchdog has enough beats there."""
        with contextlib.suppress(OSError):
            self._link.send(beat.to_bytes())

    def is_alive(self) -> bool:
        """Whether the watchdog has answered within SILENCE_S."""
        self._read()
        return not self._is_gone and time.monotonic() - self._heard <= SILENCE_S

    def has_published(self, stamp_ns: int) -> bool:
        """Whether a command with this stamp [ns] is a hold of the watchdog. It tells each stamp before it
        publishes the hold."""
        self._read()
        return stamp_ns in self._holds

    def _read(self) -> None:
        """Reads what the watchdog has sent."""
        with self._reading:
            link = self._link
            if link is None:
                return
            try:
                while data := link.recv(64):
                    self._heard = time.monotonic()
                    if data.startswith(HELD):
                        self._holds.append(int(data.removeprefix(HELD)))
                self._is_gone = self._is_gone or link is self._link
            except BlockingIOError:
                pass
            except OSError:
                self._is_gone = self._is_gone or link is self._link

    def revive(self) -> None:
        """Replaces a watchdog that died or was silent for HOPELESS_S. The executor's thread calls it."""
        if self._process is None:
            return
        since_start = time.monotonic() - self._started
        silent = time.monotonic() - max(self._heard, self._started) > HOPELESS_S
        if (self._is_gone or self._process.poll() is not None or silent) and since_start >= RESTART_S:
            self._abandon()
            self._start()

    def close(self) -> None:
        """Ends the watchdog in order: it publishes no hold, and the process is gone when this returns."""
        if self._process is None:
            return
        with contextlib.suppress(OSError):
            self._link.settimeout(END_S)
            self._link.send(b"end")
        self._abandon()

    def leave(self) -> None:
        """Closes the socket only: the watchdog takes this process for dead, and holds the arm for a while."""
        if self._link is not None:
            self._link.close()

    def _start(self) -> None:
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._link.setblocking(False)
        command = [
            sys.executable,
            "-m",
            "deer_vla_ros.ros.watchdog",
            str(theirs.fileno()),
            self._settings.to_json(),
        ]
        # The process has its own session: a signal to the node's process group, such as Ctrl-C, does not end
        # it, so it can hold the arm.
        self._process = subprocess.Popen(
            [*command, *self._ros_args],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self._started, self._heard, self._is_gone = time.monotonic(), -HOPELESS_S, False

    def _abandon(self) -> None:
        """Ends the process, in any state that it is in."""
        self._link.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
