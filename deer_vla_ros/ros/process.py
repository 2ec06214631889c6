"""The life of a node's process: it spins until SIGINT or SIGTERM, and then ends soon and in order.

rclpy's own signal handler would invalidate the context before a last hold is published, so this module
handles the signals.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rclpy
from rclpy.exceptions import ParameterException
from rclpy.executors import Executor
from rclpy.signals import SignalHandlerOptions

from deer_vla_ros.errors import UserError

END_WITHIN_S = 10.0
"""How long a node that commands no arm may take from the signal to its end [s]."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of two settings of glibc's mallopt (malloc.h)."""
KEPT_BYTES, KEPT_BLOCK_BYTES = 64 << 20, 32 << 20
"""Freed memory that a process keeps for its next allocations; the longest block of it (glibc allows 32
MiB)."""


@contextmanager
def ros_process(args: list[str] | None, end_within_s: float | None = None) -> Iterator[threading.Event]:
    """rclpy from init to shutdown. Yields an event that SIGINT or SIGTERM sets.

    Raises UserError for ROS arguments or parameters that are refused.
    end_within_s: if the process has not ended this long after the signal, it prints the stack of each thread
    and ends at once, with exit status 1: a middleware that hangs does not keep it alive. None: no limit.
    """
    stop = threading.Event()

    def await_signals() -> None:
        # In a thread of its own: a handler interrupts the main thread anywhere, also where that thread holds
        # the lock of `stop`. A handler that calls `stop.set` would wait for this lock forever.
        with os.fdopen(reader, "rb", buffering=0) as numbers:
            if not numbers.read(1):
                return
            if end_within_s is not None:
                faulthandler.dump_traceback_later(end_within_s, exit=True)
            stop.set()
            while numbers.read(1):  # more signals change nothing
                pass

    try:
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    except RuntimeError as error:  # rcl cannot read the arguments or a parameter file
        raise UserError(f"ROS arguments refused: {str(error).splitlines()[0]}") from error
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=await_signals, name="await_signals", daemon=True).start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # gets the number of each signal
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    try:
        yield stop
    except ParameterException as error:
        raise UserError(f"parameter refused: {error}") from error
    finally:
        rclpy.try_shutdown()
        signal.set_wakeup_fd(before)
        os.close(writer)


def spin(executor: Executor, is_over: Callable[[], bool], on_error: Callable[[Exception], None]) -> None:
    """Runs callbacks until `is_over()`. Passes an exception of a callback to `on_error`, and goes on."""
    while not is_over():
        try:
            executor.spin_once(timeout_sec=0.1)
        except Exception as error:
            on_error(error)


def keep_freed_memory() -> None:
    """Lets malloc keep freed memory, up to KEPT_BYTES per heap. Only glibc has this setting.

    By default glibc returns freed blocks of a megabyte to the kernel, and every step asks for them again: the
    kernel clears each page anew. With two images of 640x480 these were 1,000 page faults, 4 ms of a step on
    one core (docs/benchmarks/node-latency.md).
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, KEPT_BLOCK_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def end_now(status: int) -> None:
    """Ends the process at once with this exit status, without the slow clean-up of Python and torch."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
