"""The policy node: two cameras, an instruction and a measured pose in; pose, twist and gripper commands out.

Example: with the embedded checkpoint, and with your own and your robot's limits:

    python -m deer_vla_ros node
    python -m deer_vla_ros node --ros-args -p model.path:=/data/my_checkpoint --params-file config/deer_vla.yaml

A managed (lifecycle) node that configures and activates itself unless `autostart` is false. Ctrl-C: it holds, then ends.
"""

from __future__ import annotations

import argparse
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deer_vla_ros.ros.policy_node import PolicyNode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything is a ROS parameter."""


def run(args: argparse.Namespace) -> int:
    """0 after a signal, 1 where the control thread has ended by itself; both after a last hold."""
    # Only here: help needs neither rclpy nor torch.
    from rclpy.executors import SingleThreadedExecutor

    from deer_vla_ros.ros.policy_node import END_WITHIN_S, PolicyNode
    from deer_vla_ros.ros.process import end_now, ros_process, spin

    with ros_process(args.ros_args, END_WITHIN_S) as stop:
        node = PolicyNode(args.ros_args)
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        # An inference or a load that hangs must not keep a process alive whose arm holds.
        threading.Thread(target=_end_soon, args=(stop, node), name="end", daemon=True).start()
        try:
            node.autostart()
            spin(executor, lambda: stop.is_set() or node.failed, node.on_callback_error)
        finally:
            node.close()
    end_now(1 if node.failed else 0)


def _end_soon(stop: threading.Event, node: PolicyNode) -> None:
    """Ends the process some time after the signal even where its main thread hangs; the arm is told to hold first."""
    from deer_vla_ros.control.types import HoldReason
    from deer_vla_ros.ros.policy_node import END_SOON_S
    from deer_vla_ros.ros.process import end_now

    stop.wait()
    time.sleep(END_SOON_S)
    node.hold_and_stop(HoldReason.STOPPING)
    end_now(1 if node.failed else 0)
