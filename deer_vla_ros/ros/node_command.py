"""The policy node: two cameras, an instruction and a measured pose in; pose, twist and gripper commands out.

Example: with the embedded checkpoint, and with your own and your robot's limits:

    python -m deer_vla_ros node
    python -m deer_vla_ros node --ros-args -p model.path:=/data/my_checkpoint --params-file config/deer_vla.yaml

A managed (lifecycle) node that configures and activates itself unless `autostart` is false. Ctrl-C: it holds, then ends.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything is a ROS parameter."""


def run(args: argparse.Namespace) -> int:
    """0 after a signal; an error in the control thread is raised here, after the last hold."""
    # Only here: help needs neither rclpy nor torch.
    from rclpy.executors import SingleThreadedExecutor

    from deer_vla_ros.ros.policy_node import PolicyNode
    from deer_vla_ros.ros.process import END_WITHIN_S, ros_process

    with ros_process(args.ros_args, END_WITHIN_S) as stop:
        node = PolicyNode()
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        try:
            node.autostart()
            while not stop.is_set() and node.failure is None:
                executor.spin_once(timeout_sec=0.1)
        finally:
            node.close()
            executor.shutdown()
            node.destroy_node()
        if node.failure is not None:
            raise node.failure
    return 0
