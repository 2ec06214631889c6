"""The simulated table as a ROS 2 node: two cameras, an arm and a gripper behind a robot's topics.

Example: at real time, and then in lock step with a policy on the table's own clock:

    python -m deer_vla_ros sim --seed 3
    python -m deer_vla_ros sim --ros-args -p clock.publish:=true -p clock.mode:=lockstep

Publishes camera/static/image_raw, camera/gripper/image_raw, ee_pose and joint_states; obeys target_pose (frame `base`)
and gripper_command (opening in metres, 0 closed to 0.08 open); `~/reset` sets the table anew. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, help="arrangement of the table (default: the parameter `seed`, 0)")


def run(args: argparse.Namespace) -> int:
    # Only here: help needs neither rclpy nor MuJoCo.
    from deer_vla_ros.ros import table_node

    seed = [] if args.seed is None else ["--ros-args", "-p", f"seed:={args.seed}", "--"]
    return table_node.main([*args.ros_args, *seed])
