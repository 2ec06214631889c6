"""Runs the policy over a recording, and reports its decisions and their cost under one or several budgets.

The first example compares two budgets on one recording. The second keeps the decisions, and the third
compares a later replay with them:

    python -m deer_vla_ros replay test/data/table --out out/replay \\
        --budget average_fraction=0.3 --budget average_fraction=0.6
    python -m deer_vla_ros replay test/data/table --golden out/golden.csv
    python -m deer_vla_ros replay test/data/table --check out/golden.csv --tolerance 1e-4

BAG is a rosbag2 folder or one of its files, MCAP or sqlite3, compressed or not. The node's own controller
gets the messages in lock step on bag time: without DDS and without a wall clock, as fast as the machine
allows. With --follow, the replay repeats the steps of a live run, each with the inputs that its ~/step
message names. It shows whether the replay decides the same as the live run.

--out DIR gets report.html, report.json, and a folder for each budget with steps.csv (one row for each
decision; the file is identical in every run on one machine), timings.csv, holds.csv and bag/ (an MCAP
recording with the topics of BAG that the node reads, and with target_pose, gripper_command and
deer_vla/step). DIR is written only if the whole replay succeeds. It may replace the folder of an earlier
replay, and no other folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deer_vla_ros.commands import arguments
from deer_vla_ros.errors import UserError
from deer_vla_ros.files import whole_folder

if TYPE_CHECKING:  # The command line imports its modules when a command runs.
    from deer_vla_ros.bag.run import Request, Result

OWN = "own thresholds"
"""The label of the run without --budget."""
MARK = "report.json"
"""A folder that contains this file was written by a replay, and may be replaced."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bag", type=Path, metavar="BAG", help="rosbag2 folder, or one of its files")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for tables, recordings and the report"
    )
    parser.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="NAME=VALUE[,NAME=VALUE]",
        help="replay under this budget; NAME is a budget parameter without the prefix `budget.`. Repeat the "
        "option for several runs. Changes of the budget in the recording are then ignored",
    )
    arguments.add_recording_arguments(parser)
    parser.add_argument(
        "--start",
        type=float,
        default=0.0,
        metavar="S",
        help="begin this many seconds after the start of the recording (default: %(default)s)",
    )
    parser.add_argument(
        "--duration", type=float, metavar="S", help="replay this many seconds (default: to the end)"
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="repeat the recorded ~/step messages on their own inputs; exit status 1 if a decision differs",
    )
    parser.add_argument(
        "--latency-table",
        type=Path,
        metavar="FILE",
        help="how long an inference takes, from `benchmark latency`; budgets in ms need it (default: "
        "latency.json of the checkpoint folder, if there is one)",
    )
    parser.add_argument(
        "--no-inputs", action="store_true", help="leave the input's topics out of the recordings in --out"
    )
    parser.add_argument(
        "--golden", type=Path, metavar="FILE", help="write the decisions to FILE, for --check"
    )
    parser.add_argument(
        "--check",
        type=Path,
        metavar="FILE",
        help="compare with decisions that --golden wrote; exit status 1 if one differs",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="T",
        help="largest absolute difference of a number in --check (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report's figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Returns 1 if --check or --follow finds a decision that differs, otherwise 0. A recorded step that
    cannot be compared does not differ. Raises UserError if options contradict each other, if --out is another
    folder, or if recording, checkpoint or tables cannot be read."""
    from deer_vla_ros.bag import golden, report
    from deer_vla_ros.files import write_json

    _check(args)
    if args.check:
        next(golden.read_rows(args.check), None)  # fails now, not after a long replay
    requests = requests_of(args)
    if args.out and args.out.exists() and not (args.out / MARK).is_file():
        raise UserError(
            f"replay: --out is {args.out}, which exists and was not written by replay: give another folder"
        )
    rows: list[dict[str, Any]] = []
    on_row = rows.append if args.golden or args.check else _forget
    with whole_folder(args.out) if args.out else contextlib.nullcontext() as folder:
        results = [
            _run(request, label, folder and folder / _slug(label), on_row)
            for label, request in requests.items()
        ]
        full = _full_depth(requests) if folder or args.json else None
        reference = _run(full, report.FULL_DEPTH, None, _forget) if full else None
        figures = {"bag": str(args.bag), "runs": [report.summary(result, reference) for result in results]}
        for result, figure in zip(results, figures["runs"]):
            _print(result, figure)
        if folder:
            (folder / "report.html").write_text(
                report.page(f"Replay of {args.bag.name}", results, figures["runs"], reference)
            )
            (folder / MARK).write_text(json.dumps(figures, indent=2) + "\n")
    if args.out:
        print(f"{args.out / 'report.html'}")
    if args.json:
        write_json(args.json, figures)
    if args.golden:
        golden.write(rows, args.golden)
        print(f"{args.golden}: {len(rows)} decisions")
    failed = False
    if args.check:
        differs = golden.compare(rows, args.check, args.tolerance)
        print(differs or f"{args.check}: all {len(rows)} decisions agree within {args.tolerance:g}")
        failed = bool(differs)
    return int(failed or (args.follow and any(result.differences for result in results)))


def _check(args: argparse.Namespace) -> None:
    if not (args.out or args.golden or args.check or args.json):
        raise UserError(
            "replay: no output is asked for: give --out DIR, --golden FILE, --check FILE or --json FILE"
        )
    if (args.golden or args.check) and len(args.budget) > 1:
        raise UserError(
            f"replay: --budget is given {len(args.budget)} times, but --golden and --check work with one "
            "run: give --budget once, or not at all"
        )
    if args.golden and args.check:
        raise UserError("replay: --golden writes what --check reads: give one of them")
    for name in ("golden", "check"):
        path = getattr(args, name)
        if path and args.out and args.out.resolve() in path.resolve().parents:
            raise UserError(
                f"replay: --{name} is {path}, inside --out, and the whole folder is replaced: "
                "give it another place"
            )
    for name, low in (("start", 0.0), ("duration", 0.0), ("tolerance", 0.0)):
        value = getattr(args, name)
        if (
            value is not None
            and not (math.isfinite(value) and value >= low)
            or (name == "duration" and value == 0)
        ):
            raise UserError(
                f"replay: --{name} is {value:g}: give "
                f"{'a number above 0' if name == 'duration' else '0 or more'}"
            )


def requests_of(args: argparse.Namespace) -> dict[str, Request]:
    """Returns the requests by label: one for each --budget; without any, one with the parameters' budget."""
    from deer_vla_ros.bag.request import request

    common = {
        "params": args.params,
        "topics": arguments.topics_of(args),
        "clock": args.clock,
        "start_s": args.start,
        "duration_s": args.duration,
        "instruction": args.instruction,
        "follow": args.follow,
        "latency_table": args.latency_table,
        "with_inputs": not args.no_inputs,
        "node": args.node,
    }
    return {text or OWN: request(args.bag, budget=text, **common) for text in args.budget or [""]}


def _full_depth(requests: dict[str, Request]) -> Request | None:
    """Returns the request for a run at full depth on the same recording, with which the report compares the
    others; None if the checkpoint has no calibration."""
    import dataclasses

    from deer_vla_ros.bag.request import no_budget
    from deer_vla_ros.budget.calibration import Calibration
    from deer_vla_ros.model.checkpoint import folder_of

    first = next(iter(requests.values()))
    if Calibration.load(folder_of(first.given["model.path"])) is None:
        return None
    given = {**first.given, **no_budget(), "budget.average_fraction": 1.0}
    return dataclasses.replace(first, given=given, latencies=None, keep=("budget.",))


def _run(request: Request, label: str, folder: Path | None, on_row: Callable[[dict], None]) -> Result:
    """Runs one request, and shows a progress bar."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from deer_vla_ros.bag.run import run as replay

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[speed]}"),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(label, total=1.0, speed="")

        def on_progress(seconds: float, of: float) -> None:
            elapsed = bar.tasks[task].elapsed or 0.0
            bar.update(
                task,
                completed=seconds,
                total=of,
                speed=f"{seconds / elapsed:.1f} x real time" if elapsed else "",
            )

        result = replay(request, label, folder, on_row, on_progress)
        bar.update(task, completed=result.seconds, total=result.seconds)
    return result


def _print(result: Result, figures: dict[str, Any]) -> None:
    """Prints the figures of one run. Layers are counted from 1 here."""
    shares = "  ".join(
        f"{int(layer) + 1}: {share:.0%}" for layer, share in figures["exit_shares"].items() if share
    )
    away = figures["deviation_from_full_depth"]
    print(
        f"{result.label}: {figures['steps']} steps, {figures['language_gmac_mean']:.4g} GMAC each "
        f"({figures['language_gmac_mean'] / figures['language_gmac_full']:.0%} of full depth), after layers "
        f"{shares}"
        + (f", {away['mean']:.3g} from full depth on average" if away else "")
        + f"; {figures['seconds'] / max(figures['wall_s'], 1e-9):.1f} x real time"
    )
    for reason, count in figures["holds"].items():
        print(f"  held {count} times: {reason}")
    for line in (*figures["left_out"], *figures["notes"]):
        print(f"  {line}")
    if result.followed:
        different, unknown = len(result.differences), result.followed.unknown
        print(f"  decided as recorded in {result.same} steps, unknown in {unknown}")
        if different:
            print(f"  decided differently in {different} steps, first: {result.differences[0]}")


def _forget(row: dict[str, Any]) -> None:
    """Ignores a row that no option needs."""


def _slug(label: str) -> str:
    return "".join(character if character.isalnum() or character in "._=-" else "_" for character in label)
