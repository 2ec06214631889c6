"""The node's side of the watchdog: it starts the process, beats, hears whether it is alive, and starts it
again when it has died."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time

from deer_vla_ros.ros.watchdog import Beat, WatchdogSettings

SILENCE_S = 1.0
"""A watchdog that has not answered for so long is stopped, or has not started yet."""
RESTART_S, HOPELESS_S = 2.0, 10.0
"""The least time between two starts, so that one that cannot start does not take the machine; and the silence after which one
that is stopped, or hangs, is replaced."""
END_S = 0.5
"""How long it may take to end when it is told to."""


class WatchdogClient:
    """One watchdog process from `start` to `close`. `beat` and `is_alive` are for the control thread, and wait for nothing."""

    def __init__(self, settings: WatchdogSettings, ros_args: list[str]):
        """ros_args: for the process, as rclpy takes them: the security enclave."""
        self._settings, self._ros_args = settings, ros_args
        self._link: socket.socket | None = None
        self._process: subprocess.Popen | None = None
        self._started = self._heard = -HOPELESS_S
        self._is_gone = False

    def start(self) -> None:
        """Does nothing where it runs."""
        if self._process is None:
            self._start()

    def beat(self, beat: Beat) -> None:
        """One that cannot be delivered is lost: a watchdog that is stopped has enough of them waiting."""
        with contextlib.suppress(OSError):
            self._link.send(beat.to_bytes())

    def is_alive(self) -> bool:
        """Whether it has answered lately."""
        link, now = self._link, time.monotonic()
        try:
            while data := link.recv(64):
                self._heard = now
            self._is_gone = self._is_gone or (data == b"" and link is self._link)
        except BlockingIOError:
            pass
        except OSError:
            self._is_gone = self._is_gone or link is self._link
        return not self._is_gone and now - self._heard <= SILENCE_S

    def revive(self) -> None:
        """Starts another one in place of one that has died, or was silent for hopelessly long; from the executor's thread."""
        if self._process is None:
            return
        since_start = time.monotonic() - self._started
        silent = time.monotonic() - max(self._heard, self._started) > HOPELESS_S
        if (self._is_gone or self._process.poll() is not None or silent) and since_start >= RESTART_S:
            self._abandon()
            self._start()

    def close(self) -> None:
        """Tells it that all ends in order: it holds nothing, and is gone afterwards."""
        if self._process is None:
            return
        with contextlib.suppress(OSError):
            self._link.settimeout(END_S)
            self._link.send(b"end")
        self._abandon()

    def leave(self) -> None:
        """Leaves it behind: it sees that this process is gone, and holds the arm for a while."""
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
        # A session of its own: whatever kills the node's group, a Ctrl-C included, leaves it alive to hold
        # the arm.
        self._process = subprocess.Popen(
            [*command, *self._ros_args],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self._started, self._heard, self._is_gone = time.monotonic(), -HOPELESS_S, False

    def _abandon(self) -> None:
        """Whatever state it is in."""
        self._link.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
