"""Scores instruction chains on the simulated table: how far, how surely, at what cost.

Example: the embedded checkpoint at 30% of full depth, and single instructions in words that training never used:

    python -m deer_vla_ros evaluate --chains 200 --budget average_fraction=0.3 --json out/chains.json
    python -m deer_vla_ros evaluate --chains 0 --trials 20 --phrasings held-out

Chains of five instructions without a reset in between, at most --steps steps each; the first failure ends a chain (CALVIN's LH-MTLC
protocol). The scripted expert has carried out every chain beforehand, so each can be done. Chain i has seed 1,000,000 + 100,000 S + i
(single instructions from i = 50,000 on): never one of training, calibration or search. With --json FILE the run can be interrupted:
what is done stands in FILE.partial.jsonl, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from deer_vla_ros.errors import UserError
from deer_vla_ros.json_file import write_json

LANES = 8
"""Chains in lock step in one process. They are always run in the same eights, so that every repetition gives the same numbers."""
PHRASINGS = ("training", "held-out", "both")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chains", type=int, default=200, metavar="N", help="chains of five (default: %(default)s)")
    parser.add_argument(
        "--trials", type=int, default=0, metavar="N", help="also every task alone, N times (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="which set of chains, from 0 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=80, metavar="N", help="per instruction (default: %(default)s)")
    parser.add_argument(
        "--phrasings", choices=PHRASINGS, default="training", help="wordings, both: half and half (default: %(default)s)"
    )
    parser.add_argument("--checkpoint", default="", metavar="DIR", help="checkpoint folder (default: the embedded one)")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument(
        "--budget",
        action="append",
        metavar="NAME=VALUE",
        help="average_fraction, average_gmac, peak_gmac or memory_gib, as the node's budget.* (several: repeat); "
        "default: the checkpoint's own thresholds",
    )
    depth.add_argument("--exit", type=int, metavar="LAYER", help="always exit at this layer, counted from 0")
    depth.add_argument("--full-depth", action="store_true", help="always exit at the last layer")
    depth.add_argument("--thresholds", metavar="A,B,...", help="one per exit")
    depth.add_argument(
        "--exit-by-time",
        metavar="LAYER:STEP,...",
        help="exit at this layer until that step of the instruction, then at the next; after the last one at the last layer",
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON; makes the run resumable")


def run(args: argparse.Namespace) -> int:
    """0 when measured; UserError for arguments that this checkpoint or table cannot meet."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("LP_NUM_THREADS", "1")
    check(args)
    from deer_vla_ros.evaluation.chain_report import summary, tell
    from deer_vla_ros.evaluation.evaluation_run import evaluate, groups_of
    from deer_vla_ros.evaluation.resume_file import ResumeFile
    from deer_vla_ros.model.checkpoint import folder_of, load

    folder, choice = folder_of(args.checkpoint), exit_choice(args)
    checkpoint = load(folder)
    choice.rule_of(checkpoint)  # says now what the workers would
    about = arguments_of(args, folder)
    resume = ResumeFile(args.json.with_name(f"{args.json.name}.partial.jsonl"), about) if args.json else None
    if resume and resume.done:
        print(f"{args.json}: going on from an interrupted run")
    groups = groups_of(args.chains, args.trials, LANES)
    jobs = args.jobs or len(os.sched_getaffinity(0))
    chains, singles = evaluate(folder, choice, args.seed, args.phrasings, args.steps, groups, jobs, resume)
    report = {**summary(checkpoint.info.model, chains, singles), **about}
    print(f"{folder}: {checkpoint.info.weights}\n{tell(report)}")
    if resume:
        write_json(args.json, report)
        resume.remove()
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises UserError for numbers that make no sense."""
    from deer_vla_ros.evaluation.chains import MOST_TRIALS, SINGLES_FROM

    limits = {"chains": (0, SINGLES_FROM), "trials": (0, MOST_TRIALS), "seed": (0, None), "steps": (1, None), "jobs": (1, None)}
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value is not None and (value < low or (high is not None and value > high)):
            why = ", since seeds below 1,000,000 belong to training" if name == "seed" else ""
            raise UserError(f"evaluate: --{name} is {value}: give {low} {f'to {high}' if high else 'or more'}{why}")
    if not args.chains and not args.trials:
        raise UserError("evaluate: neither --chains nor --trials asks for anything: give one of them")


def exit_choice(args: argparse.Namespace):
    """The ExitChoice that the arguments name."""
    from deer_vla_ros.evaluation.network_driver import ExitChoice

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
        raise UserError(f"evaluate: --exit-by-time is {text!r}: give LAYER:STEP with commas between, steps rising") from None
    return tuple(zip(layers, steps))


def _thresholds(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"evaluate: --thresholds is {text!r}: give numbers with commas between them, one per exit") from None


def _budget(texts: list[str]):
    from deer_vla_ros.budget.types import AVERAGES, PEAKS, UNITS, Budget, amounts_of

    names = [name for name in (*AVERAGES, *PEAKS) if UNITS[name] != "ms"]  # which would make a score depend on the machine's load
    return Budget(**amounts_of(texts, names, "evaluate: --budget"))


def arguments_of(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All that the figures depend on."""
    return {
        "budget": exit_choice(args).to_json(),
        **files_of(folder),
        "tasks_sha256": tasks_sha256(),
        "seed": args.seed,
        "chains_asked_for": args.chains,
        "trials_per_task": args.trials,
        "steps_per_instruction": args.steps,
        "phrasings": args.phrasings,
    }


def files_of(folder: Path) -> dict[str, Any]:
    """What tells one checkpoint from another."""
    from deer_vla_ros.budget.calibration import CALIBRATION
    from deer_vla_ros.model.checkpoint import CONFIG, TOKENIZER, WEIGHTS

    return {
        "checkpoint_sha256": _sha256(folder / WEIGHTS),
        "other_files_sha256": {name: _sha256(folder / name) for name in (CONFIG, TOKENIZER, CALIBRATION)},
    }


def tasks_sha256() -> str:
    """What tells one set of tasks and their wordings from another; how the table moves and what counts as done is not in it."""
    from deer_vla_ros.sim.tasks import TASKS

    wordings = [[task.name, task.phrasings, task.held_out] for task in TASKS]
    return hashlib.sha256(json.dumps(wordings).encode()).hexdigest()


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
