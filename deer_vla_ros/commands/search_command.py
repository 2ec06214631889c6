"""Searches thresholds in closed loop for the best average chain length under an average budget.

The first lines search at 30% of full depth. The others compare the result with the calibration's thresholds,
on chains that the search never saw:

    python -m deer_vla_ros search --fraction 0.3 --json out/search.json
    thresholds=$(jq -r '.thresholds | map(tostring) | join(",")' out/search.json)
    python -m deer_vla_ros evaluate --chains 500 --thresholds=$thresholds
    python -m deer_vla_ros evaluate --chains 500 --budget average_fraction=0.3

The search is a Bayesian optimisation, the "online" variant of the paper. It starts from the calibration's
thresholds and proposes others, 20 in all. Every proposal runs the same chains; their seeds start at 900,000
and stay below those of evaluation. With --study FILE the search can be interrupted, and several machines that
share the file can work on one search.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from deer_vla_ros.errors import UserError
from deer_vla_ros.files import write_json

SEARCH_SET = -1
"""Number of the set of chains whose seeds lie directly below the seeds of evaluation."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fraction", type=float, required=True, help="budget.average_fraction: share of full depth"
    )
    parser.add_argument(
        "--checkpoint", default="", metavar="DIR", help="checkpoint folder (default: the embedded one)"
    )
    parser.add_argument(
        "--chains", type=int, default=64, metavar="N", help="chains per proposal (default: %(default)s)"
    )
    parser.add_argument(
        "--trials", type=int, default=20, metavar="N", help="proposals (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=80, metavar="N", help="per instruction (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the search (default: %(default)s)")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument(
        "--study", type=Path, metavar="FILE", help="remembers the search: the same command goes on from there"
    )
    parser.add_argument(
        "--default", action="store_true", help="also make what was found the checkpoint's own thresholds"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was found as JSON")


def run(args: argparse.Namespace) -> int:
    """Returns 0 after the trials are done. Raises UserError for a budget that the checkpoint cannot keep."""
    import numpy as np

    from deer_vla_ros.budget.calibration import CALIBRATION, REMEDY, Calibration
    from deer_vla_ros.budget.types import Budget
    from deer_vla_ros.lab.scoring.chain_report import summary
    from deer_vla_ros.lab.scoring.evaluation_run import Evaluation, evaluate, files_of
    from deer_vla_ros.lab.scoring.network_driver import ExitChoice
    from deer_vla_ros.lab.scoring.table_benchmark import TableBenchmark, tasks_sha256
    from deer_vla_ros.lab.search.search import search
    from deer_vla_ros.lab.search.search_task import Outcome
    from deer_vla_ros.model.checkpoint import folder_of, load, set_thresholds

    for name in ("chains", "trials", "steps", "jobs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"search: --{name} is {value}: give 1 or more")
    folder = folder_of(args.checkpoint)
    checkpoint, calibration = load(folder), Calibration.load(folder)
    if calibration is None:
        raise UserError(f"{folder} has no calibration, which the search starts from: {REMEDY}")
    config = checkpoint.info.model
    rule = ExitChoice(budget=Budget(average_fraction=args.fraction)).rule_of(checkpoint)(
        config.max_tokens // 2, 0
    )
    files = files_of(folder)
    study = (
        f"fraction {args.fraction:g} of {files['checkpoint_sha256'][:12]}, "
        f"calibration {files['other_files_sha256'][CALIBRATION][:12]}, "
        f"{args.chains} chains of {args.steps} steps each, tasks {tasks_sha256()[:12]}, seed {args.seed}"
    )
    table = TableBenchmark(SEARCH_SET)

    def score(thresholds: tuple[float, ...]) -> Outcome:
        choice = ExitChoice(thresholds=thresholds)
        chains, _ = evaluate(Evaluation(folder, choice, args.chains, table, steps=args.steps, jobs=args.jobs))
        report = summary(config, chains, [], table.tasks)
        return Outcome(report["average_length"], report["llm_gmac_mean"] / report["llm_gmac_full"])

    def report_trial(number: int, outcome: Outcome) -> None:
        kept = "" if outcome.cost <= args.fraction else ", above the budget"
        print(
            f"trial {number}: average length {outcome.score:.2f} at {outcome.cost:.3f} of full depth{kept}",
            flush=True,
        )
        outcomes[number] = outcome

    outcomes: dict[int, Outcome] = {}
    candidates = [np.sort(calibration.deltas[:, index]) for index in range(len(config.exits) - 1)]
    found = search(
        score,
        rule.thresholds,
        args.fraction,
        candidates,
        args.trials,
        args.study,
        study,
        args.seed,
        report_trial,
    )
    start = outcomes.get(0)
    before = f"{start.score:.2f} at {start.cost:.3f}" if start else "their evaluation failed"
    print(
        f"calibration's thresholds: {before}; found in trial {found.trial}: "
        f"{found.outcome.score:.2f} at {found.outcome.cost:.3f}: "
        f"{', '.join(f'{value:.6g}' for value in found.thresholds)}"
    )
    if args.default:
        set_thresholds(folder, found.thresholds)
    if args.json:
        report = {
            "fraction": args.fraction,
            "chains": args.chains,
            "thresholds": list(found.thresholds),
            "found": vars(found.outcome),
            "start": vars(start) if start else None,
            "start_thresholds": list(rule.thresholds),
            "trials": {str(number): vars(outcome) for number, outcome in sorted(outcomes.items())},
        }
        write_json(args.json, report)
    return 0
