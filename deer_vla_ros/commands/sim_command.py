"""The simulated table as a ROS 2 node: two cameras, an arm and a gripper behind a robot's topics.

Example: in real time, in lock step with a policy on the table's own clock, and a recording of the expert:

    python -m deer_vla_ros sim --seed 3
    python -m deer_vla_ros sim --ros-args -p clock.publish:=true -p clock.mode:=lockstep
    python -m deer_vla_ros sim --record out/table --seed 5 \\
        --show "open the drawer" --show "lift the pink block"

It publishes camera/static/image_raw, camera/gripper/image_raw, ee_pose and joint_states. It follows
target_pose (frame `base`) and gripper_command (opening in metres, from 0, closed, to 0.08, open). The service
`~/reset` sets up the table anew. Ctrl-C ends the node.

--record BAG records these topics and `instruction` as a rosbag2 folder (MCAP). With --show, the scripted
expert follows the instructions, no node runs, and the recording is made as fast as the machine allows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from deer_vla_ros.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed", type=int, help="arrangement of the table (default: the parameter `seed`, 0)"
    )
    parser.add_argument("--record", type=Path, metavar="BAG", help="record what goes over the topics")
    parser.add_argument(
        "--show",
        action="append",
        default=[],
        metavar="TEXT",
        help="an instruction that the scripted expert follows; repeat",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the table node, or records the scripted expert. Returns the exit status; raises UserError."""
    # Late imports: help needs neither rclpy nor MuJoCo.
    if args.show:
        return _show(args)
    from deer_vla_ros.lab.sim import table_node

    seed = [] if args.seed is None else ["--ros-args", "-p", f"seed:={args.seed}", "--"]
    return table_node.main([*args.ros_args, *seed], args.record)


def _show(args: argparse.Namespace) -> int:
    """Records the scripted expert. Returns 0 if it carried out all instructions."""
    from deer_vla_ros.lab.sim.table_recording import record_expert

    if args.record is None:
        raise UserError("sim: --show without --record BAG: name the recording")
    told = record_expert(args.record, args.seed or 0, args.show)
    for text, is_done, steps in told:
        print(f"{text}: {'done' if is_done else 'not done'} in {steps} steps")
    print(f"{args.record}: {sum(file.stat().st_size for file in args.record.iterdir()) / 1e6:.1f} MB")
    return 0 if all(is_done for _, is_done, _ in told) else 1
