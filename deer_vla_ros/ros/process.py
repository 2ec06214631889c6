"""How does a node process live and end? It spins until SIGINT or SIGTERM, then ends in order, exit status 0.

rclpy's own signal handler would invalidate the context before a last hold could be published: the signal is ours.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import rclpy
from rclpy.exceptions import ParameterException
from rclpy.signals import SignalHandlerOptions

from deer_vla_ros.errors import UserError


@contextmanager
def ros_process(args: list[str] | None) -> Iterator[threading.Event]:
    """rclpy from init to shutdown; yields an event that SIGINT or SIGTERM sets. A refused parameter raises UserError."""
    stop = threading.Event()
    try:
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    except RuntimeError as error:  # rcl's own, for arguments and parameter files that it cannot read
        raise UserError(f"ROS arguments refused: {str(error).splitlines()[0]}") from error
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        yield stop
    except ParameterException as error:
        raise UserError(f"parameter refused: {error}") from error
    finally:
        rclpy.try_shutdown()
