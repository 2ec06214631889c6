"""Checks the network and its training against tensors recorded from the reference implementation.

Example: python -m deer_vla_ros parity ../shared/golden

The command prints one line per recording and kind of tensor: the largest absolute difference over all arrays
of that kind, the tolerance in the folder's tolerances.json (0 if it names none), and the worst array. The
exit status is 1 if a difference is above its tolerance. Training is compared over two steps in float32.
--train64 takes every recorded step of both stages in double precision, and compares losses, gradients and
parameters relative to the recorded values.
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
    """Returns 0 if every kind is within its tolerance, else 1. Raises UserError if there is no such
    folder."""
    from deer_vla_ros.lab.parity.parity import check_folder

    if not args.folder.is_dir():
        raise UserError(f"{args.folder} is no folder: give a folder of recorded tensors like shared/golden")
    verdicts = []
    for verdict in check_folder(args.folder, args.train64):
        verdicts.append(verdict)
        mark = "ok  " if verdict.passed else "FAIL"
        print(
            f"{mark} {verdict.recording:<8} {verdict.kind:<24} max {verdict.worst.value:8.2e}"
            f"  tolerance {verdict.tolerance:8.2e}  {verdict.arrays:3d} arrays, worst {verdict.worst.where}",
            flush=True,
        )
    failed = sum(not verdict.passed for verdict in verdicts)
    print(f"{len(verdicts) - failed} of {len(verdicts)} kinds within tolerance")
    if args.json:
        rows = [{**dataclasses.asdict(verdict), "passed": verdict.passed} for verdict in verdicts]
        write_json(args.json, rows)
    return 1 if failed else 0
