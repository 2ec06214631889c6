"""Converts recordings to a training dataset in CALVIN's format, with an episode per instruction.

Example: convert a recording, and train the released network on it (its weights are in a checkpoint folder):

    python -m deer_vla_ros convert-bag test/data/table --out out/dataset
    python -m deer_vla_ros train --config config/training/deer_3b_d.yaml --data out/dataset

Frames are paired as in the policy node. After each step comes the frame that is nearest to one period of
control.rate_hz later. An action is the motion from the pose at one step's frame to that at the next one's, in
the checkpoint's action space; poses are interpolated between measured ones. With --actions target, it is the
motion to the recorded target. An episode ends where the next frame does not follow after about one control
period (0.6 to 1.4), because a lost frame would make an action of two periods, and where the pose or the
target is not known. The command counts these gaps, and what else it leaves out.

An arm that was led by hand has no commands. Its gripper's joint state tells when the gripper closed and
opened: by its motion, a tenth of its range or more, so that a wide object in the fingers counts as closed.

    python -m deer_vla_ros convert-bag BAG --out out/dataset --instruction "lift the red block" \\
        --topic gripper_state:=/franka_gripper/joint_states --gripper-range 0 0.08
"""

from __future__ import annotations

import argparse
from pathlib import Path

from deer_vla_ros.commands import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bag", type=Path, nargs="+", metavar="BAG", help="rosbag2 folders or files")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the dataset; DIR/training is written"
    )
    parser.add_argument(
        "--format",
        choices=("calvin", "lerobot", "lerobot-png"),
        default="calvin",
        help="calvin: what `train` reads; lerobot: a LeRobotDataset v3.0 with H.264 videos; lerobot-png: one "
        "with images without loss (default: %(default)s)",
    )
    arguments.add_recording_arguments(parser)
    parser.add_argument(
        "--actions",
        choices=("measured", "target"),
        default="measured",
        help="where a motion leads (default: %(default)s)",
    )
    parser.add_argument(
        "--gripper-range",
        type=float,
        nargs=2,
        metavar=("CLOSED", "OPEN"),
        help="read the gripper's joint state (topic gripper_state) in place of gripper commands; these are "
        "its positions when it is closed and open",
    )
    parser.add_argument(
        "--gripper-joint",
        default="",
        metavar="NAME",
        help="its joint there (default: the only one, or the sum of two fingers)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the counts as JSON")


def run(args: argparse.Namespace) -> int:
    """Returns 0 when the dataset is written. Raises UserError for wrong arguments or recordings."""
    from rich.progress import track

    from deer_vla_ros.bag.conversion import convert
    from deer_vla_ros.bag.gripper_state import GripperState
    from deer_vla_ros.bag.input_topics import GRIPPER_STATE, INSTRUCTION, recorded_parameters
    from deer_vla_ros.bag.observed import Account, observed
    from deer_vla_ros.errors import UserError
    from deer_vla_ros.files import write_json
    from deer_vla_ros.model.checkpoint import folder_of, load_info
    from deer_vla_ros.ros import parameters

    topics = arguments.topics_of(args)
    if args.gripper_range is None and (args.gripper_joint or GRIPPER_STATE in topics):
        raise UserError("--gripper-range CLOSED OPEN is missing: give the positions of the gripper's joint")
    read = (
        *([INSTRUCTION] if args.instruction is None else []),
        *([GRIPPER_STATE] if args.gripper_range else []),
    )
    given = recorded_parameters(args.params, args.bag, topics, read, args.node)
    space = parameters.action_space(given, load_info(folder_of(given["model.path"])).action_space)
    settings, account = parameters.controller_settings(given), Account()
    recordings = (
        (
            path,
            observed(
                path,
                account,
                settings.rate_hz,
                settings.inputs,
                space.frame,
                topics,
                args.clock,
                args.instruction,
                GripperState(space, *args.gripper_range, args.gripper_joint) if args.gripper_range else None,
                args.node,
            ),
        )
        for path in track(args.bag, description="converting")
    )
    writer = _writer(args.format)
    try:
        found = convert(recordings, args.out, space, settings.rate_hz, args.actions, writer=writer)
    except UserError as error:
        if account.seen or not account.holds:
            raise
        ((reason, _),) = account.holds.most_common(1)
        raise UserError(f"{error}; the controller would only have held: {reason.value}") from error
    amount, *more = found.lines()
    print(f"{args.out}: {amount}, actions in {space}", *more, sep="\n")
    left_out = [*account.lines(), *found.left_out()]
    print("left out:\n  " + "\n  ".join(left_out))
    mean_s, period_s = found.seconds / found.steps, 1 / settings.rate_hz
    if abs(mean_s - period_s) > 0.1 * period_s:
        print(
            f"steps are {mean_s:.3f} s apart, a control period is {period_s:.3f} s: an action is the motion "
            "of the former; set control.rate_hz to a rate that cameras and poses keep"
        )
    if found.clipped:
        print(
            f"{found.clipped} of {found.steps} steps moved further than an action can say, "
            "and were cut to it: record at a higher rate"
        )
    if args.json:
        write_json(args.json, {**vars(found), "left_out": left_out})
    return 0


def _writer(name: str):
    """The class that writes the dataset: pyarrow and PyAV are needed for a LeRobotDataset alone."""
    from functools import partial

    from deer_vla_ros.bag.calvin_files import CalvinWriter

    if name == "calvin":
        return CalvinWriter
    from deer_vla_ros.lab.lerobot.lerobot_writing import LerobotWriter

    return partial(LerobotWriter, dtype="image" if name == "lerobot-png" else "video")
