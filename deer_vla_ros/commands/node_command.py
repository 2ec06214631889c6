"""The policy node: two cameras, an instruction and a measured pose in; pose, twist and gripper commands out.

Example: with the embedded checkpoint, and with your own checkpoint and your robot's limits:

    python -m deer_vla_ros node
    python -m deer_vla_ros node --ros-args \\
        -p model.path:=/data/my_checkpoint --params-file config/deer_vla.yaml

This is a managed (lifecycle) node. It configures and activates itself unless `autostart` is false. After
Ctrl-C it publishes a hold and ends.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deer_vla_ros.ros.policy_node import PolicyNode

SWITCH_S = 0.0005
"""After this many seconds a thread hands Python's lock to another thread that waits for it. A step calls
hundreds of operators, which release the lock each, and may wait this long to get it back while another thread
takes an image. Python's default of 5 ms made the steps longer (docs/benchmarks/node-latency.md)."""
END_SOON_S, END_WITHIN_S = 1.3, 1.8
"""Seconds after a signal until the process ends in spite of a main thread that hangs; until force."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: every setting is a ROS parameter."""


def run(args: argparse.Namespace) -> int:
    """Publishes a last hold at its end. Returns 0 after a signal, and 1 if the control thread has failed."""
    # Late imports: help needs neither rclpy nor torch. Signals are handled before the import of torch.
    from rclpy.executors import SingleThreadedExecutor

    from deer_vla_ros.ros.process import end_now, keep_freed_memory, ros_process, spin

    sys.setswitchinterval(SWITCH_S)
    keep_freed_memory()
    nodes: list[PolicyNode] = []
    with ros_process(args.ros_args, END_WITHIN_S) as stop:
        # An inference or a load that hangs must not keep the process alive after a signal.
        threading.Thread(target=_end_soon, args=(stop, nodes), name="end", daemon=True).start()

        from deer_vla_ros.ros.policy_node import PolicyNode

        node = PolicyNode(args.ros_args, on_failure=stop.set, is_ending=stop.is_set)
        nodes.append(node)
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        try:
            node.autostart()
            spin(executor, stop.is_set, node.on_callback_error)
        finally:
            node.close()
            executor.shutdown()
            node.destroy_node()  # announces that the publishers are gone: DDS lists a killed node's for 20 s
    end_now(1 if node.failed else 0)


def _end_soon(stop: threading.Event, nodes: list[PolicyNode]) -> None:
    """Ends the process END_SOON_S after the signal even if its main thread hangs. It publishes a hold
    first."""
    from deer_vla_ros.control.types import HoldReason
    from deer_vla_ros.ros.process import end_now

    stop.wait()
    time.sleep(END_SOON_S)
    for node in nodes:
        node.hold_and_stop(HoldReason.STOPPING)
    end_now(1 if any(node.failed for node in nodes) else 0)
