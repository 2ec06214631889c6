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

END_SOON_S, END_WITHIN_S = 1.3, 1.8
"""How long after a signal the process ends without waiting for what hangs, and is ended by force."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything is a ROS parameter."""


def run(args: argparse.Namespace) -> int:
    """0 after a signal, 1 where the control thread has ended by itself; both after a last hold."""
    # Only here: help needs neither rclpy nor torch. A signal that comes while torch is imported is obeyed,
    # too.
    from rclpy.executors import SingleThreadedExecutor

    from deer_vla_ros.ros.process import end_now, ros_process, spin

    nodes: list[PolicyNode] = []
    with ros_process(args.ros_args, END_WITHIN_S) as stop:
        # An inference or a load that hangs must not keep a process alive that was told to end.
        threading.Thread(target=_end_soon, args=(stop, nodes), name="end", daemon=True).start()

        from deer_vla_ros.ros.policy_node import PolicyNode

        node = PolicyNode(args.ros_args, on_failure=stop.set)
        nodes.append(node)
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        try:
            node.autostart()
            spin(executor, stop.is_set, node.on_callback_error)
        finally:
            node.close()
            executor.shutdown()
            node.destroy_node()  # tells others that its publishers are gone: DDS keeps a killed one's for 20 s
    end_now(1 if node.failed else 0)


def _end_soon(stop: threading.Event, nodes: list[PolicyNode]) -> None:
    """Ends the process some time after the signal even where its main thread hangs; the arm is told to hold
    first."""
    from deer_vla_ros.control.types import HoldReason
    from deer_vla_ros.ros.process import end_now

    stop.wait()
    time.sleep(END_SOON_S)
    for node in nodes:
        node.hold_and_stop(HoldReason.STOPPING)
    end_now(1 if any(node.failed for node in nodes) else 0)
