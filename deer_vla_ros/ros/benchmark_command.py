"""How long is it from a camera's stamp to the command? The policy node beside a bare rclpy relay, in one run, on this machine.

Example: as the documentation's figures were measured, and a quick look:

    python -m deer_vla_ros benchmark node --json out/node-latency.json
    python -m deer_vla_ros benchmark node --seconds 5

Two 640x480 rgb8 cameras at 30 Hz, real processes over real DDS. Overhead is the node's stamp-to-command less the policy's own
compute; the ratio is overhead to the relay's stamp-to-pose. Measured idle and with every core loaded, with model.cpu_threads 1
and 0 (torch's choice); p50_ratio and p99_ratio of the JSON are those of idle with 1. Logs of all processes are in `--out`.

`camera`, `relay`, `listener` and `load` are the processes that `node` starts. Without ROS_DOMAIN_ID it takes a random one, and
without FASTRTPS_DEFAULT_PROFILES_FILE a shared memory segment that holds such images: Fast DDS's own loses most of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import time
from pathlib import Path

from deer_vla_ros.errors import UserError
from deer_vla_ros.ros.demo_command import HIGHEST_PORTABLE_DOMAIN

PARTS = ("camera", "relay", "listener", "load")
ENOUGH_SAMPLES = 300
"""With fewer, the 99th percentile rests on two or three of them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("node", *PARTS), metavar="WHAT", help=f"node; {', '.join(PARTS)}: see above")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--seconds", type=_positive, default=15.0, help="measured time of each condition (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/benchmark"), metavar="DIR", help="folder of logs (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """0 where all conditions were measured, whatever the figures; UserError otherwise. No process is left behind either way."""
    if args.what in PARTS:
        from deer_vla_ros.ros import benchmark_parts  # only here: what starts the processes has no thread of rclpy to fork

        getattr(benchmark_parts, args.what)()
        return 0

    from deer_vla_ros.ros.benchmark_run import measure

    started = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: the processes in order
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("ROS_DOMAIN_ID", str(random.SystemRandom().randint(1, HIGHEST_PORTABLE_DOMAIN)))
    rows = measure(args.seconds, args.out)
    quiet = rows[0]
    report = {"p50_ratio": quiet.p50_ratio, "p99_ratio": quiet.p99_ratio, "rows": [dataclasses.asdict(row) for row in rows]}
    if args.json:
        try:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(report, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{args.json} cannot be written ({error}): give --json another place") from error
    print(
        f"idle: the node's overhead is {quiet.p50_ratio:.2f} x the relay beside it at p50, {quiet.p99_ratio:.2f} x at p99; "
        f"{quiet.p50_ratio_alone:.2f} x and {quiet.p99_ratio_alone:.2f} x the relay alone"
    )
    if min(row.samples for row in rows) < ENOUGH_SAMPLES:
        print(f"fewer than {ENOUGH_SAMPLES} samples in a condition: take p99 as a hint, or measure longer")
    print(f"measured in {time.monotonic() - started:.0f} s")
    return 0


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return value
