"""How does a node process live and end? It spins until SIGINT or SIGTERM, then ends in order, exit status 0.

rclpy's own signal handler would invalidate the context before a last hold could be published: the signal is ours.
"""

from __future__ import annotations

import faulthandler
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import rclpy
from rclpy.exceptions import ParameterException
from rclpy.signals import SignalHandlerOptions

from deer_vla_ros.errors import UserError

END_WITHIN_S = 10.0
"""How long a node may take from the signal to its end."""


@contextmanager
def ros_process(args: list[str] | None, end_within_s: float | None = None) -> Iterator[threading.Event]:
    """rclpy from init to shutdown; yields an event that SIGINT or SIGTERM sets. A refused parameter raises UserError.

    end_within_s: a process that has not ended so long after the signal says where each of its threads stands and ends at once, exit
    status 1: a middleware that hangs must not keep a node alive that was told to end. None: it may take its time.
    """
    stop = threading.Event()

    def end(*_) -> None:
        stop.set()
        if end_within_s is not None:
            faulthandler.dump_traceback_later(end_within_s, exit=True)

    try:
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    except RuntimeError as error:  # rcl's own, for arguments and parameter files that it cannot read
        raise UserError(f"ROS arguments refused: {str(error).splitlines()[0]}") from error
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    try:
        yield stop
    except ParameterException as error:
        raise UserError(f"parameter refused: {error}") from error
    finally:
        rclpy.try_shutdown()
