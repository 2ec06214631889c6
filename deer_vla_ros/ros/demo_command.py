"""The whole system on one machine: simulated table and policy node as two processes, six instructions, at most 20 s of control.

Example: as `make demo` runs it, and shorter on another arrangement with your own words:

    python -m deer_vla_ros demo
    python -m deer_vla_ros demo --seconds 6 --seed 3 --instruction "open the drawer" --out out/drawer

Leaves in the folder `--out`: summary.json, steps.jsonl (every ~/step message, one JSON object a line; stamps as sec and nanosec,
NaN as null), cameras.png (what the cameras saw and the exit taken), table.log and node.log. Exit status 1 unless 90% of the steps
expected at 10 Hz came. Without ROS_DOMAIN_ID it takes a random one, so that no robot nearby obeys a demo.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import deer_vla_ros
from deer_vla_ros.errors import UserError

INSTRUCTIONS = (
    "lift the pink block",
    "place the block in the drawer",
    "close the drawer",
    "turn off the led",
    "turn on the lamp",
    "move the slider to the right",
)
SEED = 33
"""An arrangement in which these make sense. The embedded network does all of them here, whether its command
reaches the arm 0 or 80 ms after the image (docs/explanation/embedded-model.md)."""
RESULTS = ("summary.json", "steps.jsonl", "cameras.png")
MOMENTS = 12
"""How many moments of the run the picture shows."""
TABLE_GUARD = Path(deer_vla_ros.__file__).parent / "sim" / "assets" / "guard.yaml"
"""The policy node's limits on this table; found without importing MuJoCo."""
HIGHEST_PORTABLE_DOMAIN = 101
"""Above it a domain's ports reach into the range that Linux hands out to other programs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), metavar="DIR", help="folder of the results (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=positive_seconds,
        default=20.0,
        help="longest control time, from the first step on (default: %(default)s)",
    )
    parser.add_argument("--seed", type=_seed, default=SEED, help="arrangement of the table (default: %(default)s)")
    parser.add_argument("--model", default="", metavar="DIR", help="checkpoint folder (default: the one embedded in the package)")
    parser.add_argument(
        "--instruction",
        action="append",
        metavar="TEXT",
        help="what to do; the next follows when one is done or its share of the time is over",
    )


def run(args: argparse.Namespace) -> int:
    """0 where at least 90% of the expected steps came; UserError otherwise. No process is left behind either way."""
    started = time.monotonic()
    weights = _weights(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in RESULTS:  # what an earlier demo found must not stand for this one
        (args.out / name).unlink(missing_ok=True)
    os.environ.setdefault("ROS_DOMAIN_ID", str(random.SystemRandom().randint(1, HIGHEST_PORTABLE_DOMAIN)))
    # Without shared memory: there a process that is killed can leave the others waiting for good (eProsima/Fast-DDS#5469).
    os.environ.setdefault("FASTDDS_BUILTIN_TRANSPORTS", "UDPv4")

    from deer_vla_ros.ros.children import ChildProcess, kept

    parameters = ["--ros-args", "--params-file", str(TABLE_GUARD)]
    if args.model:
        parameters += ["-p", f"model.path:={Path(args.model).expanduser().resolve()}"]
    node = ChildProcess("policy node", ["node", *parameters], args.out / "node.log")  # first: it takes longest to start
    table = ChildProcess("table", ["sim", "--seed", str(args.seed)], args.out / "table.log")
    with kept(node, table):
        # rclpy and rich load while the others start; rclpy only after them, so that no thread of it is there to be forked.
        from deer_vla_ros.ros.demo_run import control

        recorded = control(
            args.instruction or list(INSTRUCTIONS), args.seconds, args.seconds / MOMENTS, [node, table], weights, started
        )
    return _report(args, recorded, weights)


def _report(args: argparse.Namespace, recorded: Any, weights: dict[str, Any]) -> int:
    """Writes the results and tells them; raises UserError where too few steps came."""
    from deer_vla_ros.evaluation import demo_picture, demo_report

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
    demo_report.write_summary(summary, args.out / "summary.json")  # last: where it stands, the rest stands too
    recorded.view.summary(summary, str(args.out))
    if reason:
        raise UserError(reason)
    return 0


def _weights(model: str) -> dict[str, Any]:
    """`config.json` of the checkpoint; read here, because the module that loads checkpoints brings torch."""
    embedded = Path(deer_vla_ros.__file__).parent / "embedded"
    path = (Path(model).expanduser() if model else embedded) / "config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): --model takes a checkpoint folder") from error


def positive_seconds(text: str) -> float:
    """An argument in seconds, finite and above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"'{text}' is no number of seconds above 0")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 0 to {2**31 - 1}")
    return int(text)
