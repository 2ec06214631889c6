"""Measures the deltas and actions of all exits on recordings, and writes them into a checkpoint folder.

Example: the embedded checkpoint on the simulated table, as it ships, and your own:

    python -m deer_vla_ros calibrate table
    python -m deer_vla_ros calibrate table --checkpoint /data/my_checkpoint --episodes 200

Average budgets are solved from this file (calibration.safetensors). It is replaced in one piece: interrupted, the old one stays.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from deer_vla_ros.errors import UserError
from deer_vla_ros.json_file import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", help="'table': the simulated table, where the scripted expert shows the tasks"
    )
    parser.add_argument("--checkpoint", default="", metavar="DIR", help="checkpoint folder (default: the embedded one)")
    parser.add_argument("--episodes", type=int, default=144, help="sessions at the table (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="steps of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first session (default: %(default)s)")
    parser.add_argument(
        "--default-fraction",
        type=float,
        metavar="F",
        help="also make this budget.average_fraction the checkpoint's own thresholds",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was measured as JSON")


def run(args: argparse.Namespace) -> int:
    """0 when the file is written."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    import numpy as np
    from rich.progress import track

    from deer_vla_ros.budget.calibration import CALIBRATION, measure
    from deer_vla_ros.evaluation.table_episodes import table_episodes
    from deer_vla_ros.model.checkpoint import folder_of, load

    if args.source != "table":
        raise UserError(f"calibrate: no such source '{args.source}': give 'table'")
    for name in ("episodes", "steps"):
        if getattr(args, name) < 1:
            raise UserError(f"calibrate: --{name} is {getattr(args, name)}: give 1 or more")
    folder = folder_of(args.checkpoint)
    seeds = range(args.seed, args.seed + args.episodes)
    source = f"simulated table, seeds {seeds.start} to {seeds.stop - 1}, {args.steps} steps of the scripted expert each"
    checkpoint = load(folder)
    sessions = track(seeds, description="calibrating")
    episodes = (episode for seed in sessions for episode in table_episodes(range(seed, seed + 1), args.steps))
    calibration = measure(checkpoint, episodes, {"source": source}, args.seed)
    calibration.save(folder)
    if args.default_fraction is not None:
        set_default(folder, args.default_fraction)
    rows = [
        {
            "layer": layer,
            "delta_p50": float(np.median(calibration.deltas[:, index])),
            "delta_p95": float(np.quantile(calibration.deltas[:, index], 0.95)),
            "window_delta_p50": float(np.median(calibration.window_deltas[:, index])) if len(calibration.window_deltas) else None,
            "deviation": float(calibration.deviations[:, index].mean()),
        }
        for index, layer in enumerate(calibration.exits)
    ]
    print(f"{folder / CALIBRATION}: {len(calibration.deltas)} steps, {len(calibration.window_deltas)} window positions; {source}")
    print("layer  delta p50   p95      in windows p50   deviation from full depth")
    for row in rows:
        window = "-" if row["window_delta_p50"] is None else f"{row['window_delta_p50']:.4f}"
        print(f"{row['layer']:>5}  {row['delta_p50']:.4f}     {row['delta_p95']:.4f}   {window:<14}   {row['deviation']:.4f}")
    if args.json:
        write_json(args.json, {"exits": rows, "provenance": calibration.provenance})
    return 0


def set_default(folder: Path, fraction: float) -> None:
    """Writes the thresholds of an average budget into the checkpoint's config.json: what it does where no budget is asked for."""
    import dataclasses
    import json

    from deer_vla_ros.budget.keeper import BudgetKeeper
    from deer_vla_ros.budget.types import Budget
    from deer_vla_ros.json_file import write_text
    from deer_vla_ros.model.checkpoint import CONFIG, load

    checkpoint, budget = load(folder), Budget(average_fraction=fraction, governor=False)
    keeper = BudgetKeeper.of(checkpoint)
    keeper.check(budget)
    keeper.set(budget)
    info = dataclasses.replace(checkpoint.info, thresholds=keeper.rule.thresholds)
    write_text(folder / CONFIG, json.dumps(info.to_dict(), indent=2) + "\n")
    print(f"{folder / CONFIG}: thresholds {', '.join(f'{value:.4g}' for value in info.thresholds)}, {fraction:g} of full depth")
