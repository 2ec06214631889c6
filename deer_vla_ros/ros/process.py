"""How does a node process live and end? It spins until SIGINT or SIGTERM, then ends in order, exit status 0.

rclpy's own signal handler would invalidate the context before a last hold could be published: the signal is ours.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import rclpy
from rclpy.signals import SignalHandlerOptions


@contextmanager
def ros_process(args: list[str] | None) -> Iterator[threading.Event]:
    """rclpy from init to shutdown; yields an event that SIGINT or SIGTERM sets."""
    stop = threading.Event()
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        yield stop
    finally:
        rclpy.try_shutdown()
