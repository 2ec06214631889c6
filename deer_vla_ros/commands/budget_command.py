"""Shows what a budget buys: cost, deviation from the full-depth action, and the shares of the exits.

Example: the whole range for the embedded checkpoint, and one fraction for your own:

    python -m deer_vla_ros budget
    python -m deer_vla_ros budget /data/my_checkpoint --fraction 0.4

`path` is the method of the node; exp, gauss and gamma are the paper's families of thresholds at the same
cost. Every method is solved on one half of the calibration's episodes and judged on the other half.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from deer_vla_ros.errors import UserError
from deer_vla_ros.files import write_json

BUDGETS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", nargs="?", default="", metavar="CHECKPOINT", help="folder (default: the embedded one)"
    )
    parser.add_argument(
        "--fraction", type=float, help="only this share of full depth, instead of the whole range"
    )
    parser.add_argument(
        "--tokens", type=int, default=14, help="instruction tokens that GMAC hold for (default: %(default)s)"
    )
    parser.add_argument(
        "--plot", type=Path, default=Path("out/budget.png"), metavar="PNG", help="default: %(default)s"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Returns 0 after the output. Raises UserError if the checkpoint has no calibration for its exits."""
    import numpy as np

    from deer_vla_ros.budget.calibration import REMEDY, Calibration
    from deer_vla_ros.budget.cost import cost_table
    from deer_vla_ros.lab.benchmarks.budget_report import METHODS, draw, offers
    from deer_vla_ros.model.checkpoint import folder_of, load_info

    folder = folder_of(args.checkpoint)
    info, calibration = load_info(folder), Calibration.load(folder)
    if calibration is None:
        raise UserError(f"{folder} has no calibration: {REMEDY}")
    calibration.check(info.model.exits, info.delta)
    if not 1 <= args.tokens <= info.model.max_tokens:
        raise UserError(f"budget: --tokens is {args.tokens}: give 1 to {info.model.max_tokens}")
    table = cost_table(info.model, args.tokens)
    full, exits = table.language(info.model.decoder.layers), info.model.exits
    low = table.language(exits[0] + 1) / full
    if args.fraction is not None and not args.fraction >= low:
        raise UserError(
            f"budget: --fraction is {args.fraction:g}, below the first exit's {low:.4g}: give {low:.4g} to 1"
        )
    fractions = (
        np.linspace(low, 1.0, BUDGETS) if args.fraction is None else np.array([min(args.fraction, 1.0)])
    )
    found = offers(info.model, calibration, fractions, args.tokens)
    print(f"{folder}: {info.weights}")
    print(f"calibrated on {len(calibration.deltas)} steps: {calibration.provenance.get('source', 'unknown')}")
    print(
        f"full depth: {full:.4g} GMAC at {args.tokens} tokens; "
        "deviation of the chosen from the full-depth action, by method\n"
    )
    heads = "  ".join(f"{layer + 1:>5}" for layer in exits)
    print(
        f"fraction   GMAC     {'  '.join(f'{method:>7}' for method in METHODS)}   "
        f"share of the steps, by layers run\n{'':50}   {heads}"
    )
    for offer in found:
        deviation = "  ".join(f"{offer.deviation[method]:7.4f}" for method in METHODS)
        shares = "  ".join(f"{share:5.1%}" for share in offer.shares)
        print(f"{offer.fraction:8.3f}   {offer.gmac:.4g}".ljust(20) + f"{deviation}   {shares}")
    wins = sum(offer.deviation["path"] <= min(offer.deviation.values()) + 1e-12 for offer in found)
    print(f"\nleast deviation by path: {wins} of {len(found)} budgets; budget.average_fraction asks for one")
    if args.fraction is None:
        draw(found, exits, info.weights[:60], args.plot)
        print(f"plot: {args.plot}")
    if args.json:
        write_json(args.json, [dataclasses.asdict(offer) for offer in found])
    return 0
