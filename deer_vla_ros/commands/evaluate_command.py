"""Scores chains of instructions, on the simulated table or on CALVIN: their length, success rates and cost.

Example: the embedded checkpoint at 30% of full depth, and single instructions in wordings not used in
training:

    python -m deer_vla_ros evaluate --chains 200 --budget average_fraction=0.3 --json out/chains.json
    python -m deer_vla_ros evaluate --chains 0 --trials 20 --phrasings held-out

The success of sentences of your own, each given in the same five states of its task:

    python -m deer_vla_ros evaluate --wordings plain.json --tasks open_drawer,close_drawer

A chain has five instructions without a reset in between, of at most --steps steps each. The first failure
ends it (CALVIN's LH-MTLC protocol). On the table, the scripted expert has carried out every chain before, so
each of them is possible. Chain i has the seed 1,000,000 + 100,000 S + i (single instructions have i = 50,000
and above). Training, calibration and search never use these seeds. CALVIN has the chains of its own protocol:
docs/how-to/evaluate-on-calvin.md. With --json FILE the run can be interrupted: the finished part is kept in
FILE.partial.jsonl, and the same command goes on from there. With --cluster the chains run on several
machines, with the same figures (docs/how-to/run-on-a-cluster.md).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from deer_vla_ros.commands.arguments import DTYPES, PHRASINGS, add_cluster_argument
from deer_vla_ros.errors import UserError

if TYPE_CHECKING:
    from deer_vla_ros.lab.calvin.calvin_benchmark import CalvinBenchmark
    from deer_vla_ros.lab.scoring.evaluation_run import Evaluation
    from deer_vla_ros.lab.scoring.network_driver import ExitChoice
    from deer_vla_ros.lab.scoring.sentences import Sentence
    from deer_vla_ros.lab.scoring.table_benchmark import TableBenchmark


BENCHMARKS = ("table", "calvin")
OF_TABLE = ("phrasings",)
OF_CALVIN = ("calvin_root", "calvin_python", "calvin_scene", "calvin_renderer", "sequences", "enriched")
CHAINS, TRIALS = 200, 5
STEPS = {"table": 80, "calvin": 360}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--benchmark",
        choices=BENCHMARKS,
        default="table",
        help="the simulated table of this package, or CALVIN (default: %(default)s)",
    )
    parser.add_argument(
        "--chains",
        type=int,
        metavar="N",
        help=f"chains of five (default: {CHAINS}, or all --sequences; 0 with --wordings)",
    )
    parser.add_argument(
        "--trials",
        type=int,
        metavar="N",
        help=f"also every task, or every sentence of --wordings, alone, N times "
        f"(default: 0, or {TRIALS} with --wordings)",
    )
    parser.add_argument(
        "--tasks", metavar="A,B,...", help="only chains and single instructions of these tasks (default: all)"
    )
    parser.add_argument(
        "--wordings",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.json",
        help="sentences in place of the benchmark's own, as {task: [sentence, ...]}; every sentence and "
        "every file has figures of its own (several: repeat)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="which set of chains, from 0 (default: %(default)s)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help=f"per instruction (default: {STEPS['table']}, or {STEPS['calvin']} on CALVIN)",
    )
    parser.add_argument(
        "--phrasings",
        choices=PHRASINGS,
        help=f"table: its own wordings, both: half and half (default: {PHRASINGS[0]})",
    )
    calvin = parser.add_argument_group("--benchmark calvin")
    calvin.add_argument(
        "--calvin-root", type=Path, metavar="DIR", help="a clone of mees/calvin with its submodules"
    )
    calvin.add_argument(
        "--calvin-python",
        metavar="PYTHON",
        help="the Python with pybullet that runs CALVIN (default: this one)",
    )
    calvin.add_argument(
        "--calvin-scene", metavar="NAME", help="the scene of calvin_env/conf/scene (default: calvin_scene_D)"
    )
    calvin.add_argument(
        "--calvin-renderer",
        choices=("tiny", "egl"),
        help="pybullet's own, on the CPU, or OpenGL on a GPU, as CALVIN's authors do (default: tiny)",
    )
    calvin.add_argument(
        "--sequences",
        metavar="FILE|N",
        help="the chains: a published JSON file, or N of CALVIN's own generator (default: 1000)",
    )
    calvin.add_argument(
        "--enriched",
        type=Path,
        metavar="FILE",
        help="a published JSON file of other wordings for the chains, by chain or by task "
        "(default: CALVIN's own validation sentences)",
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
        help="number type of the weights, as the parameter model.dtype (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the network runs; figures of two devices differ by rounding (default: %(default)s)",
    )
    parser.add_argument(
        "--lanes",
        type=int,
        metavar="N",
        help="chains that run in lock step in one process, as one batch of the network (default: 8)",
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="processes (default: as many as keep the cores busy; one on a GPU)",
    )
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
    """The evaluation that the arguments describe. Raises UserError for arguments that make no sense."""
    from deer_vla_ros.lab.scoring.evaluation_run import LANES, LIMITS, Evaluation, check_numbers
    from deer_vla_ros.model.checkpoint import folder_of

    _check(args)
    trials = args.trials if args.trials is not None else TRIALS if args.wordings else 0
    check_numbers({**{name: getattr(args, name) for name in LIMITS}, "trials": trials})
    benchmark, chains = _table(args) if args.benchmark == "table" else _calvin(args, trials)
    asked = Evaluation(
        folder_of(args.checkpoint),
        exit_choice(args),
        chains,
        benchmark,
        trials,
        STEPS[args.benchmark] if args.steps is None else args.steps,
        args.jobs,
        args.dtype,
        args.device,
        LANES if args.lanes is None else args.lanes,
        args.cluster,
    )
    asked.check()
    return asked


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for arguments that do not belong together."""
    if args.seed < 0:
        raise UserError(
            f"evaluate: --seed is {args.seed}: give 0 or more, since seeds below 1,000,000 belong to training"
        )
    for name in OF_CALVIN if args.benchmark == "table" else OF_TABLE:
        if getattr(args, name) is not None:
            raise UserError(f"evaluate: --{name.replace('_', '-')} is not for --benchmark {args.benchmark}")
    if args.benchmark == "calvin" and args.calvin_root is None:
        raise UserError("evaluate: --benchmark calvin needs --calvin-root DIR, a clone of mees/calvin")
    for name in ("phrasings", "enriched"):
        if args.wordings and getattr(args, name):
            raise UserError(f"evaluate: --{name} and --wordings both choose the sentences: give one of them")


def _table(args: argparse.Namespace) -> tuple[TableBenchmark, int]:
    """The table as a benchmark, and the number of chains."""
    from deer_vla_ros.lab.scoring.table_benchmark import ALL_TASKS, TableBenchmark

    tasks, sentences = _tasks_and_sentences(args, ALL_TASKS)
    chains = args.chains if args.chains is not None else 0 if sentences else CHAINS
    if sentences and chains and (missing := set(tasks) - {each.task for each in sentences}):
        raise UserError(
            f"evaluate: --wordings has no sentence for {', '.join(sorted(missing))}, which chains may "
            "contain: give sentences, or --chains 0, or --tasks without these"
        )
    return TableBenchmark(args.seed, args.phrasings or PHRASINGS[0], tasks, sentences), chains


def _calvin(args: argparse.Namespace, trials: int) -> tuple[CalvinBenchmark, int]:
    """CALVIN as a benchmark, and the number of chains."""
    from deer_vla_ros.lab.calvin.calvin_choice import SEQUENCES, CalvinChoice
    from deer_vla_ros.lab.calvin.calvin_process import CalvinInstall
    from deer_vla_ros.lab.calvin.calvin_sequences import TASK_RULES

    python = args.calvin_python
    if python is not None and os.sep in python:
        # Workers have other working directories. A link is not resolved: it belongs to a venv.
        python = os.path.abspath(os.path.expanduser(python))
    given = {
        "python": python,
        "scene": args.calvin_scene,
        "renderer": args.calvin_renderer,
    }
    install = CalvinInstall(
        args.calvin_root.expanduser().absolute(),
        **{name: value for name, value in given.items() if value is not None},
    )
    tasks, sentences = _tasks_and_sentences(args, tuple(TASK_RULES))
    text = str(SEQUENCES) if args.sequences is None else args.sequences
    benchmark = CalvinChoice(
        install,
        sequences=int(text) if text.isdecimal() and len(text) < 10 else Path(text),
        chains=0 if args.chains is None and sentences else args.chains,
        enriched=args.enriched,
        tasks=tasks,
        sentences=sentences,
        trials=trials,
        seed=args.seed,
    ).benchmark()
    return benchmark, len(benchmark.sequences)


def _tasks_and_sentences(
    args: argparse.Namespace, known: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[Sentence, ...]]:
    """The tasks of --tasks, in the benchmark's order, and the sentences of --wordings that belong to them.

    Raises UserError for an unknown task, and for one of --tasks without a sentence.
    """
    from deer_vla_ros.lab.scoring.sentences import read_sentences, unknown_task

    asked = known if args.tasks is None else [name.strip() for name in args.tasks.split(",")]
    for name in asked:
        if name not in known:
            raise UserError(f"evaluate: --tasks: {unknown_task(name, known)}")
    sentences = tuple(each for each in read_sentences(args.wordings, known) if each.task in asked)
    if args.wordings and args.tasks and (missing := set(asked) - {each.task for each in sentences}):
        raise UserError(
            f"evaluate: --wordings has no sentence for {', '.join(sorted(missing))} of --tasks: add one"
        )
    return tuple(name for name in known if name in asked), sentences


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
