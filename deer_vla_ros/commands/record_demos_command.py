"""Records demonstrations on the simulated table: the scripted expert alone, or after a policy's own attempts.

Example: data of the embedded checkpoint, more data in which a policy acts first (DAgger), and CALVIN's
format:

    python -m deer_vla_ros record-demos --demos 6400 --out out/data/demos --seed 1
    python -m deer_vla_ros record-demos --demos 1600 --out out/data/dagger --seed 2 \\
        --policy out/train/tabletop/checkpoint
    python -m deer_vla_ros record-demos --demos 1000 --out out/data/calvin/training --format calvin

The same arguments give the same bytes, whatever --jobs is, and on several machines (--cluster,
docs/how-to/run-on-a-cluster.md). After an interruption, the same command records what is missing. Shard k
uses the seed 1,000 S + k. All seeds are below 1,000,000, because evaluation uses the others.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from deer_vla_ros.commands.arguments import add_cluster_argument
from deer_vla_ros.errors import UserError

FORMATS = ("frames", "calvin")
IMAGE_SIZE = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--demos", type=int, required=True, metavar="N", help="demonstrations, of about 19 steps each"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to record into")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="which set of demonstrations, 0 to 999 (default: %(default)s)",
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--jobs", type=int, metavar="J", help="processes (default: one per core)")
    add_cluster_argument(place)
    parser.add_argument(
        "--policy",
        type=Path,
        metavar="CHECKPOINT",
        help="checkpoint folder whose network acts first (DAgger)",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="frames",
        help="ours, fast to train on, or CALVIN's (default: %(default)s)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PX",
        help=f"the network's (default: {IMAGE_SIZE}; calvin: as the cameras give them)",
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0 when all demonstrations are in the folder. Raises UserError for wrong arguments."""
    for name, low, high in (("demos", 1, None), ("jobs", 1, None), ("image_size", 8, 512)):
        value = getattr(args, name)
        if value is not None and (value < low or (high and value > high)):
            option = name.replace("_", "-")
            raise UserError(
                f"record-demos: --{option} is {value}: give {low} {f'to {high}' if high else 'or more'}"
            )
    if args.format == "calvin" and args.image_size:
        raise UserError(
            "record-demos: --image-size is for --format frames: "
            "CALVIN's images are as the cameras give them; leave it out"
        )
    from deer_vla_ros.lab.demonstrations.record_run import DemoRequest, record

    image_size = None if args.format == "calvin" else args.image_size or IMAGE_SIZE
    request = DemoRequest(args.out, args.demos, args.seed, image_size, args.policy)
    begin = time.monotonic()
    frames, kept = record(request, args.jobs or os.cpu_count() or 1, args.cluster)
    seconds = time.monotonic() - begin
    new = args.demos - kept
    print(f"{args.out}: {args.demos} demonstrations" + (f", {kept} of them from before" if kept else ""))
    if new:
        print(
            f"{new} new ones with {frames} frames in {seconds:.0f} s: "
            f"{60 * new / seconds:.0f} demonstrations per minute"
        )
    return 0
