"""Measures the deltas and actions of all exits on recordings, and writes them into a checkpoint folder.

Example: the embedded checkpoint on the simulated table, as it was released, and your own checkpoint:

    python -m deer_vla_ros calibrate table
    python -m deer_vla_ros calibrate table --checkpoint /data/my_checkpoint --episodes 200
    python -m deer_vla_ros calibrate bags/monday bags/tuesday --checkpoint /data/my_checkpoint \\
        --topic ee_pose:=/arm/tcp

SOURCE is 'table', or rosbag2 recordings of your robot at work, whose frames are paired and paced as in the
policy node. The command writes calibration.safetensors, from which average budgets are solved. The file is
replaced as a whole: after an interruption the old one is still there. The command also prints how far the new
deltas are from the stored ones. A large distance means that the robot's scenes differ from those of the old
calibration.

With --minutes the measurement ends after this time, and what was measured is the result: half of the time is
for the steps, the other half for the closed loop in which their costs are measured. The file says how many
steps it has.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from deer_vla_ros.commands import arguments
from deer_vla_ros.errors import UserError
from deer_vla_ros.files import write_json

if TYPE_CHECKING:
    from deer_vla_ros.budget.calibration import Calibration, Episode
    from deer_vla_ros.inference.types import Observation
    from deer_vla_ros.model.action_space import ActionSpace
    from deer_vla_ros.model.checkpoint import Checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="'table': the simulated table, where the scripted expert shows the tasks; or recordings",
    )
    parser.add_argument(
        "--checkpoint", default="", metavar="DIR", help="checkpoint folder (default: the embedded one)"
    )
    parser.add_argument(
        "--dtype",
        choices=arguments.DTYPES,
        default="float32",
        help="number type of the weights on the CPU, as the node's model.dtype (default: %(default)s)",
    )
    parser.add_argument("--episodes", type=int, default=144, help="table: sessions (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="table: steps of each (default: %(default)s)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the first session at the table, and of what is drawn (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes",
        type=arguments.positive,
        metavar="M",
        help="the most time; with fewer than 200 steps nothing is written (default: no limit)",
    )
    parser.add_argument(
        "--default-fraction",
        type=float,
        metavar="F",
        help="also make this budget.average_fraction the checkpoint's own thresholds",
    )
    arguments.add_recording_arguments(parser, of="recordings: ")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was measured as JSON")


def run(args: argparse.Namespace) -> int:
    """Returns 0 when the file is written. Raises UserError for a wrong source or number."""
    import numpy as np

    from deer_vla_ros.budget.calibration import CALIBRATION
    from deer_vla_ros.lab.scoring.table_episodes import table_episodes
    from deer_vla_ros.model.checkpoint import folder_of, load_as

    if "table" in args.source and len(args.source) > 1:
        raise UserError(
            f"calibrate: 'table' and {len(args.source) - 1} more: calibrate on the table or on recordings"
        )
    for name in ("episodes", "steps"):
        if getattr(args, name) < 1:
            raise UserError(f"calibrate: --{name} is {getattr(args, name)}: give 1 or more")
    folder = folder_of(args.checkpoint)
    checkpoint = load_as(args.dtype, folder)
    left_out: list[str] = []
    if args.source == ["table"]:
        seeds = range(args.seed, args.seed + args.episodes)
        source = (
            f"simulated table, seeds {seeds.start} to {seeds.stop - 1}, "
            f"{args.steps} steps of the scripted expert each"
        )
        steps, episodes = args.episodes * args.steps, table_episodes(seeds, args.steps)
    else:
        steps = None
        source = f"recordings {', '.join(Path(name).name for name in args.source)}"
        episodes = _recorded(args, checkpoint.info.action_space, left_out)
    stored = _stored(folder)
    calibration = _measured(args, checkpoint, episodes, steps, {"source": source, "dtype": args.dtype})
    if limit := calibration.provenance.get("time limit"):
        of_all = f", {steps} were asked for" if steps else ""
        left_out.append(f"what came later: the time limit was {limit}{of_all}")
    if closed_loop := calibration.provenance.get("closed loop"):
        left_out.append(f"some of the closed loop, for the same reason: it covers {closed_loop}")
    differences = distances(calibration, stored)
    calibration.save(folder)
    if args.default_fraction is not None:
        set_default(folder, args.default_fraction)
    rows = [
        {
            "layer": layer,
            "delta_p50": float(np.median(calibration.deltas[:, index])),
            "delta_p95": float(np.quantile(calibration.deltas[:, index], 0.95)),
            "window_delta_p50": float(np.median(calibration.window_deltas[:, index]))
            if len(calibration.window_deltas)
            else None,
            "deviation": float(calibration.deviations[:, index].mean()),
            "distance_from_stored": differences[index] if differences else None,
        }
        for index, layer in enumerate(calibration.exits)
    ]
    print(
        f"{folder / CALIBRATION}: {len(calibration.deltas)} steps, "
        f"{len(calibration.window_deltas)} window positions; {source}"
    )
    print("layer  delta p50   p95      in windows p50   deviation from full depth")
    for row in rows:
        window = "-" if row["window_delta_p50"] is None else f"{row['window_delta_p50']:.4f}"
        print(
            f"{row['layer']:>5}  {row['delta_p50']:.4f}     {row['delta_p95']:.4f}   "
            f"{window:<14}   {row['deviation']:.4f}"
        )
    if differences:
        told = "  ".join(f"{row['layer']}: {row['distance_from_stored']:.3f}" for row in rows)
        print(
            f"from the deltas that were stored ({stored.provenance.get('source', 'unknown')}), by layer: "
            f"{told}; 0 is the same, 1 is apart"
        )
    for line in left_out:
        print(f"left out: {line}")
    if args.json:
        write_json(args.json, {"exits": rows, "provenance": calibration.provenance, "left_out": left_out})
    return 0


def _measured(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    episodes: Iterator[Episode],
    steps: int | None,
    provenance: dict[str, str],
) -> Calibration:
    """Measures, and shows the progress. steps: how many there are; None if nobody knows that yet."""
    from deer_vla_ros.budget.calibration import Episode, measure
    from deer_vla_ros.lab.workers import progress_bar

    seconds = math.inf if args.minutes is None else args.minutes * 60
    with progress_bar() as bar, contextlib.closing(episodes):
        observing = bar.add_task("steps", total=steps)
        closed_loop = bar.add_task("closed loop", total=None, visible=False)

        def seen(observations: Iterable[Observation]) -> Iterator[Observation]:
            for observation in observations:
                yield observation
                bar.advance(observing)

        return measure(
            checkpoint,
            (Episode(episode.instruction, seen(episode.observations)) for episode in episodes),
            provenance,
            args.seed,
            seconds,
            lambda done, total: bar.update(closed_loop, completed=done, total=total, visible=True),
        )


def _recorded(args: argparse.Namespace, space: ActionSpace, left_out: list[str]) -> Iterator[Episode]:
    """Yields the episodes of the recordings, and fills left_out at its end."""
    from itertools import groupby

    from deer_vla_ros.bag.input_topics import INSTRUCTION, recorded_parameters
    from deer_vla_ros.bag.observed import Account, observed, paced
    from deer_vla_ros.budget.calibration import Episode
    from deer_vla_ros.ros import parameters

    bags, topics = [Path(name) for name in args.source], arguments.topics_of(args)
    read = (INSTRUCTION,) if args.instruction is None else ()
    given = recorded_parameters(args.params, bags, topics, read, args.node)
    settings, frame = parameters.controller_settings(given), parameters.action_space(given, space).frame
    account = Account()
    try:
        for path in bags:
            seen = observed(
                path,
                account,
                settings.rate_hz,
                settings.inputs,
                frame,
                topics,
                args.clock,
                args.instruction,
                node=args.node,
            )
            for text, moments in groupby(
                paced(seen, settings.rate_hz), key=lambda moment: moment.instruction
            ):
                yield Episode(text, (moment.observation for moment in moments))
    finally:
        left_out += account.lines()


def _stored(folder: Path) -> Calibration | None:
    """The folder's calibration, whatever weights it was measured on; None if there is no readable one."""
    from deer_vla_ros.budget.calibration import Calibration

    try:
        return Calibration.load(folder)
    except UserError:
        return None


def distances(new: Calibration, stored: Calibration | None) -> list[float] | None:
    """By exit, the distance 0..1 between the distributions of the deltas: the Kolmogorov-Smirnov statistic.

    None if there is no stored calibration of the same exits and the same kind of delta.
    """
    from scipy.stats import ks_2samp

    if stored is None or stored.exits != new.exits or stored.delta != new.delta:
        return None
    return [float(ks_2samp(new.deltas[:, i], stored.deltas[:, i]).statistic) for i in range(len(new.exits))]


def set_default(folder: Path, fraction: float) -> None:
    """Makes the thresholds of an average budget (share of full depth) the checkpoint's own. Raises
    UserError."""
    from deer_vla_ros.budget.keeper import BudgetKeeper
    from deer_vla_ros.budget.types import Budget
    from deer_vla_ros.model.checkpoint import load, set_thresholds

    budget, keeper = Budget(average_fraction=fraction, governor=False), BudgetKeeper.of(load(folder))
    keeper.check(budget)
    keeper.set(budget)
    set_thresholds(folder, keeper.rule.thresholds)
    print(
        f"{folder}: thresholds {', '.join(f'{value:.4g}' for value in keeper.rule.thresholds)}, "
        f"{fraction:g} of full depth"
    )
