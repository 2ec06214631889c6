"""Attacks the running policy node with random faults over real DDS, and judges it from outside.

Example: two minutes of all faults, two faults for longer, and the simulated table instead of the fake robot:

    python -m deer_vla_ros soak --minutes 2 --json out/soak.json
    python -m deer_vla_ros soak --minutes 10 --faults pose_frozen,node_killed --seed 3
    python -m deer_vla_ros soak --minutes 60 --robot table

The command starts the policy node, a fake robot (two cameras, a measured pose, an arm that follows), an
operator that calls the services, and an observer that receives every command and judges it by limits of its
own. Faults come one at a time, sometimes two at once, with healthy motion between them. Their order depends
on the seed only. After each fault the arm has to move again: by itself, or, after a serious hold, when ~/hold
is called with false.

The exit status is 1 if a goal is missed: a command outside its limits, a stale command, a silence of more
than 0.5 s, an unhandled exception, a broken promise, a missing recovery, half of the recoveries later
than 1 s or one in 20 later than 3 s, or memory that grows by more than 1% per hour (in runs of five minutes
or more). Logs and events of all processes are in `--out`. Without ROS_DOMAIN_ID it takes a random domain, so
that no robot nearby follows.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deer_vla_ros.commands.arguments import TABLE_GUARD, positive
from deer_vla_ros.errors import UserError
from deer_vla_ros.files import write_json
from deer_vla_ros.processes import keep_off_other_robots, leave_out_shared_memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=positive, default=2.0, help="how long (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=1, help="of the order of the faults (default: %(default)s)"
    )
    parser.add_argument(
        "--faults",
        default="all",
        metavar="NAMES",
        help="all, or names parted by commas; a wrong one lists them all",
    )
    parser.add_argument(
        "--robot",
        choices=("fake", "table"),
        default="fake",
        help="what the node moves (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report as JSON")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/soak"),
        metavar="DIR",
        help="folder of logs (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0 if all goals are met, and 1 after a missed goal or an interruption. UserError if nothing can
    run."""
    from deer_vla_ros.lab.soak import schedule
    from deer_vla_ros.lab.soak.soak_report import SoakFindings, missed, report, summary_lines
    from deer_vla_ros.lab.soak.soak_run import limits_for, soak

    faults = schedule.chosen(args.faults, args.robot == "table")
    table_parameters = TABLE_GUARD if args.robot == "table" else None
    _prepare(args.out)
    seen = SoakFindings(args.seed, args.minutes)
    try:
        with _progress(args.minutes * 60) as on_progress:
            soak(seen, faults, limits_for(table_parameters), args.out, table_parameters, on_progress)
    except KeyboardInterrupt:
        seen.interrupted = True
    except UserError as error:
        if not seen.outcomes:
            raise
        seen.broken.append({"at_ns": 0, "message": str(error)})
    figures = report(seen)
    if args.json:
        write_json(args.json, figures)
    print(*summary_lines(figures), sep="\n")
    failures = [*(["interrupted"] if seen.interrupted else []), *missed(figures)]
    if failures:
        print(f"failed: {'; '.join(failures)}; logs in {args.out}", file=sys.stderr)
    return 1 if failures else 0


def _prepare(out: Path) -> None:
    """Removes the logs of an earlier soak, and chooses a ROS domain that no robot nearby uses."""
    out.mkdir(parents=True, exist_ok=True)
    for log in out.glob("*.log"):
        log.unlink()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: the processes in order
    keep_off_other_robots()
    leave_out_shared_memory()


@contextlib.contextmanager
def _progress(total_s: float) -> Iterator[Any]:
    """Yields a callback for the outcome of an attack: it moves a bar on a terminal, and prints lines
    elsewhere."""
    if not sys.stdout.isatty():
        yield lambda gone_s, outcome: print(_line(gone_s, outcome), flush=True)
        return
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("soaking", total=total_s)

        def on_progress(gone_s: float, outcome: Any) -> None:
            bar.update(task, completed=min(gone_s, total_s), description=" + ".join(outcome.faults))
            if outcome.recovered_s is None:
                bar.console.print(_line(gone_s, outcome))

        yield on_progress


def _line(gone_s: float, outcome: Any) -> str:
    back = "not recovered" if outcome.recovered_s is None else f"recovered in {outcome.recovered_s:.2f} s"
    cleared = ", cleared" if outcome.cleared else ""
    return f"{gone_s:7.1f} s  {' + '.join(outcome.faults)}: {back}{cleared}"
