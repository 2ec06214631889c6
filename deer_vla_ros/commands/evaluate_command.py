"""Scores chains of instructions on the simulated table: their length, success rates and cost.

Example: the embedded checkpoint at 30% of full depth, and single instructions in wordings not used in
training:

    python -m deer_vla_ros evaluate --chains 200 --budget average_fraction=0.3 --json out/chains.json
    python -m deer_vla_ros evaluate --chains 0 --trials 20 --phrasings held-out

A chain has five instructions without a reset in between, of at most --steps steps each. The first failure
ends it (CALVIN's LH-MTLC protocol). The scripted expert has carried out every chain before, so each of them
is possible. Chain i has the seed 1,000,000 + 100,000 S + i (single instructions have i = 50,000 and above).
Training, calibration and search never use these seeds. With --json FILE the run can be interrupted: the
finished part is kept in FILE.partial.jsonl, and the same command goes on from there. With --cluster the
chains run on several machines, with the same figures (docs/how-to/run-on-a-cluster.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from deer_vla_ros.commands.arguments import DTYPES, PHRASINGS, add_cluster_argument
from deer_vla_ros.errors import UserError

if TYPE_CHECKING:
    from deer_vla_ros.lab.scoring.evaluation_run import Evaluation
    from deer_vla_ros.lab.scoring.network_driver import ExitChoice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chains", type=int, default=200, metavar="N", help="chains of five (default: %(default)s)"
    )
    parser.add_argument(
        "--trials",
        type=int,
        default=0,
        metavar="N",
        help="also every task alone, N times (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="which set of chains, from 0 (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=80, metavar="N", help="per instruction (default: %(default)s)"
    )
    parser.add_argument(
        "--phrasings",
        choices=PHRASINGS,
        default="training",
        help="wordings, both: half and half (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpoint", default="", metavar="DIR", help="checkpoint folder (default: the embedded one)"
    )
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument(
        "--budget",
        action="append",
        metavar="NAME=VALUE",
        help="average_fraction, average_gmac, peak_gmac or memory_gib, "
        "as the node's budget.* (several: repeat); default: the checkpoint's own thresholds",
    )
    depth.add_argument("--exit", type=int, metavar="LAYER", help="always exit at this layer, counted from 0")
    depth.add_argument("--full-depth", action="store_true", help="always exit at the last layer")
    depth.add_argument("--thresholds", metavar="A,B,...", help="one per exit")
    depth.add_argument(
        "--exit-by-time",
        metavar="LAYER:STEP,...",
        help="exit at this layer until that step of the instruction, then at the next; "
        "after the last one at the last layer",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="number type of the weights on the CPU, as the parameter model.dtype (default: %(default)s)",
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--jobs", type=int, metavar="N", help="processes (default: one per core)")
    add_cluster_argument(place)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the figures as JSON; makes the run resumable"
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0 after the evaluation. Raises UserError for arguments that do not fit this checkpoint or
    table."""
    from deer_vla_ros.lab.scoring.chain_report import report_text
    from deer_vla_ros.lab.scoring.evaluation_run import report_of
    from deer_vla_ros.model.checkpoint import load_info

    asked = asked_for(args)
    report = report_of(asked, args.json)
    print(f"{asked.folder}: {load_info(asked.folder).weights}\n{report_text(report)}")
    return 0


def asked_for(args: argparse.Namespace) -> Evaluation:
    """The evaluation that the arguments describe. Raises UserError for numbers that make no sense."""
    from deer_vla_ros.lab.scoring.evaluation_run import Evaluation
    from deer_vla_ros.model.checkpoint import folder_of

    asked = Evaluation(
        folder_of(args.checkpoint),
        exit_choice(args),
        args.chains,
        args.trials,
        args.seed,
        args.steps,
        args.phrasings,
        args.jobs,
        args.dtype,
        args.cluster,
    )
    asked.check()
    return asked


def exit_choice(args: argparse.Namespace) -> ExitChoice:
    """The ExitChoice that the arguments describe. Raises UserError for a wrong text."""
    from deer_vla_ros.lab.scoring.network_driver import ExitChoice

    if args.budget:
        return ExitChoice(budget=_budget(args.budget))
    if args.thresholds is not None:
        return ExitChoice(thresholds=_thresholds(args.thresholds))
    if args.exit_by_time is not None:
        return ExitChoice(by_time=_by_time(args.exit_by_time))
    return ExitChoice(exit_layer=args.exit, full_depth=args.full_depth)


def _by_time(text: str) -> tuple[tuple[int, int], ...]:
    try:
        layers, steps = zip(*((int(part) for part in pair.split(":")) for pair in text.split(",")))
        if list(steps) != sorted(steps):
            raise ValueError
    except ValueError:
        raise UserError(
            f"evaluate: --exit-by-time is {text!r}: give LAYER:STEP with commas between, steps rising"
        ) from None
    return tuple(zip(layers, steps))


def _thresholds(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"evaluate: --thresholds is {text!r}: give numbers with commas between them, one per exit"
        ) from None


def _budget(texts: list[str]):
    from deer_vla_ros.budget.types import AVERAGES, PEAKS, UNITS, Budget, amounts_of

    # No budgets in ms: with them a score would depend on the load of the machine.
    names = [name for name in (*AVERAGES, *PEAKS) if UNITS[name] != "ms"]
    return Budget(**amounts_of(texts, names, "evaluate: --budget"))
