"""Checks the network and its training against tensors recorded from the reference implementation.

Example: python -m deer_vla_ros parity ../shared/golden

Prints one line per recording and kind of tensor: the largest absolute difference over all arrays of that kind, the tolerance
of the folder's tolerances.json (0 where it names none: must be equal), and the worst array. Exit status 1 if any fails.
Training is compared over two steps in float32; --train64 takes every recorded step of both stages in double precision, and
compares losses, gradients and parameters relative to what was recorded.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from deer_vla_ros.errors import UserError
from deer_vla_ros.files import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="folder of recorded tensors, in the format of shared/golden"
    )
    parser.add_argument(
        "--train64", action="store_true", help="also every recorded training step, in double precision"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the verdicts as JSON")


def run(args: argparse.Namespace) -> int:
    """0: every kind within tolerance; 1: one is not."""
    from deer_vla_ros.lab.parity.parity import check_folder

    if not args.folder.is_dir():
        raise UserError(f"{args.folder} is no folder: give a folder of recorded tensors like shared/golden")
    verdicts = []
    for verdict in check_folder(args.folder, args.train64):
        verdicts.append(verdict)
        mark = "ok  " if verdict.passed else "FAIL"
        print(
            f"{mark} {verdict.recording:<8} {verdict.kind:<24} max {verdict.worst.value:8.2e}  tolerance {verdict.tolerance:8.2e}"
            f"  {verdict.arrays:3d} arrays, worst {verdict.worst.where}",
            flush=True,
        )
    failed = sum(not verdict.passed for verdict in verdicts)
    print(f"{len(verdicts) - failed} of {len(verdicts)} kinds within tolerance")
    if args.json:
        rows = [{**dataclasses.asdict(verdict), "passed": verdict.passed} for verdict in verdicts]
        write_json(args.json, rows)
    return 1 if failed else 0
