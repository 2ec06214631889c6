"""Converts recordings to a training dataset in CALVIN's format, with an episode per instruction.

Example: convert a recording, and train the released network on it (its weights are in a checkpoint folder):

    python -m deer_vla_ros convert-bag test/data/table --out out/dataset
    python -m deer_vla_ros train --config config/training/deer_3b_d.yaml --data out/dataset

Frames are paired and paced as in the policy node, at control.rate_hz. An action is the motion from one
measured pose to the next in the checkpoint's action space; with --actions target, it is the motion to the
recorded target. The command counts what it leaves out.
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
    arguments.add_recording_arguments(parser)
    parser.add_argument(
        "--actions",
        choices=("measured", "target"),
        default="measured",
        help="where a motion leads (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the counts as JSON")


def run(args: argparse.Namespace) -> int:
    """Returns 0 when the dataset is written. Raises UserError for wrong arguments or recordings."""
    from rich.progress import track

    from deer_vla_ros.bag.conversion import convert
    from deer_vla_ros.bag.observed import Account, observed
    from deer_vla_ros.files import write_json
    from deer_vla_ros.model.checkpoint import folder_of, load_info
    from deer_vla_ros.ros import parameters

    given = parameters.from_file(args.params, args.node)
    space = parameters.action_space(given, load_info(folder_of(given["model.path"])).action_space)
    settings, account = parameters.controller_settings(given), Account()
    topics = arguments.topics_of(args)
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
            ),
        )
        for path in track(args.bag, description="converting")
    )
    found = convert(recordings, args.out, space, settings.rate_hz, args.actions)
    print(f"{args.out}: {found.episodes} episodes with {found.steps} steps, actions in {space}")
    for text, count in found.texts.most_common():
        print(f"  {count} x {text}")
    left_out = [
        *account.lines(),
        f"{found.episodes} last steps of episodes, which have no next pose",
        *([f"{found.short} episodes of fewer than 3 steps"] if found.short else []),
    ]
    print("left out:\n  " + "\n  ".join(left_out))
    if found.clipped:
        print(
            f"{found.clipped} of {found.steps} steps moved further than an action can say, "
            "and were cut to it: record at a higher rate"
        )
    if args.json:
        write_json(args.json, {**vars(found), "left_out": left_out})
    return 0
