"""Runs the whole system on one machine: the simulated table and the policy node, with six instructions.

Example: as `make demo` runs it, and a shorter demo on another arrangement with your own instruction:

    python -m deer_vla_ros demo
    python -m deer_vla_ros demo --seconds 6 --seed 3 --instruction "open the drawer" --out out/drawer

Table and node are two processes. The folder `--out` gets summary.json, steps.jsonl (every ~/step message, one
JSON object per line, with stamps as sec and nanosec, and NaN as null), cameras.png (camera images and the
exit taken), table.log and node.log. The exit status is 1 if less than 90% of the steps that are expected at
10 Hz came. Without ROS_DOMAIN_ID the demo takes a random domain, so that no robot nearby follows it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import deer_vla_ros
from deer_vla_ros.commands.arguments import TABLE_GUARD, positive
from deer_vla_ros.errors import UserError
from deer_vla_ros.model.foreign_files import check_checkpoint_folder
from deer_vla_ros.processes import (
    ChildProcess,
    keep_off_other_robots,
    kept,
    leave_out_shared_memory,
)

INSTRUCTIONS = (
    "lift the pink block",
    "place the block in the drawer",
    "close the drawer",
    "turn off the led",
    "turn on the lamp",
    "move the slider to the right",
)
SEED = 33
"""An arrangement in which these instructions make sense. The embedded network carries out all of them here,
whether its command reaches the arm 0 or 80 ms after the image (docs/explanation/embedded-model.md, "Commands
that reach the arm late")."""
RESULTS = ("summary.json", "steps.jsonl", "cameras.png")
MOMENTS = 12
"""Number of moments of the run that the picture shows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/demo"),
        metavar="DIR",
        help="folder of the results (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        default=20.0,
        help="longest control time, from the first step on (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=_seed, default=SEED, help="arrangement of the table (default: %(default)s)"
    )
    parser.add_argument(
        "--model",
        default="",
        metavar="DIR",
        help="checkpoint folder (default: the one embedded in the package)",
    )
    parser.add_argument(
        "--instruction",
        action="append",
        metavar="TEXT",
        help="what to do; the next follows when one is done or its share of the time is over",
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0 if at least 90% of the expected steps came. Raises UserError otherwise. It ends all
    processes."""
    started = time.monotonic()
    weights = _weights(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in RESULTS:  # so that no result of an earlier demo remains
        (args.out / name).unlink(missing_ok=True)
    keep_off_other_robots()
    leave_out_shared_memory()

    parameters = ["--ros-args", "--params-file", str(TABLE_GUARD)]
    if args.model:
        parameters += ["-p", f"model.path:={Path(args.model).expanduser().resolve()}"]
    # The node comes first, because it takes longest to start.
    node = ChildProcess("policy node", ["node", *parameters], args.out / "node.log")
    table = ChildProcess("table", ["sim", "--seed", str(args.seed)], args.out / "table.log")
    with kept(node, table):
        # rclpy and rich load while the processes start. A fork must not copy a thread of rclpy, so rclpy
        # comes later.
        from deer_vla_ros.lab.demo.demo_run import control

        recorded = control(
            args.instruction or list(INSTRUCTIONS),
            args.seconds,
            args.seconds / MOMENTS,
            [node, table],
            weights,
            started,
        )
    return _report(args, recorded, weights)


def _report(args: argparse.Namespace, recorded: Any, weights: dict[str, Any]) -> int:
    """Writes and prints the results. Raises UserError if too few steps came."""
    from deer_vla_ros.lab.demo import demo_picture, demo_report

    reason = demo_report.verdict_on(recorded.rows, recorded.seconds)
    summary = demo_report.summarise(
        recorded.rows,
        recorded.before,
        recorded.after,
        recorded.told,
        first_step_s=round(recorded.first_step_s, 3),
        seconds=round(recorded.seconds, 3),
        seed=args.seed,
        weights=weights["weights"],
        trained=weights["trained"],
        passed=not reason,
        reason=reason,
    )
    demo_report.write_steps(recorded.rows, args.out / "steps.jsonl")
    demo_picture.draw(recorded.rows, recorded.moments, weights, args.out / "cameras.png")
    # The summary comes last: if it exists, the other results exist, too.
    demo_report.write_summary(summary, args.out / "summary.json")
    recorded.view.summary(summary, str(args.out))
    if reason:
        raise UserError(reason)
    return 0


def _weights(model: str) -> dict[str, Any]:
    """`config.json` of the checkpoint. It is read here because the module that loads checkpoints needs
    torch."""
    embedded = Path(deer_vla_ros.__file__).parent / "embedded"
    folder = Path(model).expanduser() if model else embedded
    check_checkpoint_folder(folder)
    path = folder / "config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): --model takes a checkpoint folder") from error


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 0 to {2**31 - 1}")
    return int(text)
