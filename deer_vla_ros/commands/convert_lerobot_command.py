"""Converts a LeRobotDataset (format v2.1 or v3.0) to a training dataset in CALVIN's format.

Example: a dataset of a Franka arm whose state has the TCP pose as x y z roll pitch yaw, and whose gripper
command is the last number of the action, 0 open and 1 closed:

    python -m deer_vla_ros convert-lerobot ~/data/franka --out out/dataset \\
        --static observation.images.scene --gripper observation.images.wrist --state observation.state \\
        --gripper-range 1 0
    python -m deer_vla_ros train --config my_recipe.yaml --data out/dataset

An action is the motion from one measured TCP pose to the next at --rate-hz, along and about the fixed axes of
the frame that the poses are given in, in units of the checkpoint's action space. The command counts what it
leaves out, and what it had to cut. An option with an unknown KEY lists the columns that there are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from deer_vla_ros.commands import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "dataset", type=Path, metavar="DIR", help="the folder that holds meta/, data/, videos/"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the dataset; DIR/training is written"
    )
    parser.add_argument("--static", required=True, metavar="KEY", help="the camera that looks at the scene")
    parser.add_argument("--gripper", required=True, metavar="KEY", help="the camera on the gripper")
    parser.add_argument(
        "--state",
        required=True,
        nargs="+",
        metavar="KEY",
        help="the measured TCP pose; the numbers of several columns are put one after another",
    )
    parser.add_argument(
        "--pose-format",
        choices=("xyz_rpy", "xyz_quat_xyzw", "xyz_quat_wxyz", "xyz_rotvec"),
        default="xyz_rpy",
        help="position, and rotation: angles about the fixed axes X, Y, Z; a unit quaternion; axis times "
        "angle (default: %(default)s)",
    )
    parser.add_argument(
        "--pose-at",
        type=int,
        nargs="+",
        default=[0],
        metavar="N",
        help="where the position begins in --state, counted from 0, and where the rotation does (default: 0, "
        "and after the position)",
    )
    parser.add_argument("--position-unit", choices=("m", "mm"), default="m", help="(default: %(default)s)")
    parser.add_argument("--angle-unit", choices=("rad", "deg"), default="rad", help="(default: %(default)s)")
    parser.add_argument(
        "--gripper-from",
        default="action:-1",
        metavar="KEY:N",
        help="the number that says how open the gripper shall be (a column `action...`) or is (another one); "
        "negative: from the end (default: %(default)s)",
    )
    parser.add_argument(
        "--gripper-range",
        type=float,
        nargs=2,
        required=True,
        metavar=("CLOSED", "OPEN"),
        help="that number when the gripper is closed and when it is open",
    )
    parser.add_argument(
        "--rate-hz", type=arguments.positive, help="steps per second (default: control.rate_hz of --params)"
    )
    parser.add_argument(
        "--params",
        type=Path,
        metavar="FILE",
        help="the node's parameter file: its checkpoint and action.* give the action space (default: its "
        "defaults)",
    )
    parser.add_argument("--instruction", metavar="TEXT", help="in place of the tasks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the counts as JSON")


def run(args: argparse.Namespace) -> int:
    """Returns 0 when the dataset is written. Raises UserError for wrong arguments or a wrong dataset."""
    import dataclasses

    from rich.progress import track

    from deer_vla_ros.bag.conversion import convert
    from deer_vla_ros.errors import UserError
    from deer_vla_ros.files import write_json
    from deer_vla_ros.lab.lerobot.lerobot_columns import LerobotColumns
    from deer_vla_ros.lab.lerobot.lerobot_folder import LerobotFolder
    from deer_vla_ros.lab.lerobot.lerobot_reading import LerobotMoments
    from deer_vla_ros.model.checkpoint import folder_of, load_info
    from deer_vla_ros.ros import parameters

    given = parameters.from_file(args.params)
    rate_hz = args.rate_hz or given["control.rate_hz"]
    space = parameters.action_space(given, load_info(folder_of(given["model.path"])).action_space)
    space = dataclasses.replace(space, rate_hz=rate_hz)
    key, mark, number = args.gripper_from.rpartition(":")
    if not (mark and number.lstrip("-").isdecimal()):
        raise UserError(f"--gripper-from is {args.gripper_from!r}: give KEY:N, such as action:-1")
    if len(args.pose_at) > 2 or min(args.pose_at) < 0:
        raise UserError(f"--pose-at is {args.pose_at}: give one or two numbers of 0 or more")
    columns = LerobotColumns(
        static=args.static,
        gripper=args.gripper,
        state=tuple(args.state),
        gripper_closed=args.gripper_range[0],
        gripper_open=args.gripper_range[1],
        pose_format=args.pose_format,
        position_at=args.pose_at[0],
        rotation_at=args.pose_at[1] if len(args.pose_at) == 2 else args.pose_at[0] + 3,
        position_unit=args.position_unit,
        angle_unit=args.angle_unit,
        gripper_key=key,
        gripper_at=int(number),
    )
    folder = LerobotFolder(args.dataset)
    moments = LerobotMoments(folder, columns, space, rate_hz, args.instruction)
    counted = track(moments.episodes(), description="converting", total=folder.total or None)
    found = convert(moments.recordings(counted), args.out, space, rate_hz, "measured")
    amount, *more = found.lines()
    print(f"{args.out}: {amount}, actions in {space}", *more, sep="\n")
    left_out = [*moments.account.lines(), *found.left_out()]
    print("left out:\n  " + "\n  ".join(left_out))
    if found.clipped:
        print(
            f"{found.clipped} of {found.steps} steps moved further than an action can say, and were cut: "
            "give a higher --rate-hz, or a larger action.translation_m or action.rotation_rad in --params"
        )
    if args.json:
        write_json(args.json, {**vars(found), "left_out": left_out})
    return 0
