"""Cost against deviation from full depth, for thresholds of the nested path and of the paper's families."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deer_vla_ros.budget.calibration import Calibration
from deer_vla_ros.budget.cost import cost_table, exit_fractions
from deer_vla_ros.budget.families import FAMILIES, thresholds_within
from deer_vla_ros.budget.path import ThresholdPath, exits_taken
from deer_vla_ros.files import whole_file
from deer_vla_ros.model.config import ModelConfig

OURS = "path"
METHODS = (OURS, *FAMILIES)
COLOURS = {OURS: "#0d9488", "exp": "#d97706", "gauss": "#7c3aed", "gamma": "#dc2626"}


@dataclass(frozen=True)
class Offer:
    """The result of one budget.

    fraction: the mean cost of the language part, as a share of full depth, 0..1. gmac: the same cost [GMAC
    per step]. shares: each exit's share of the steps, measured in closed loop by the calibration. deviation:
    for each of METHODS, the mean distance of the chosen action from the full-depth one. The distance is the
    root mean square over the six pose values; 1 is half of an action value's range. It is measured on
    calibration steps from which the method's thresholds were not solved.
    """

    fraction: float
    gmac: float
    shares: list[float]
    deviation: dict[str, float]


def offers(model: ModelConfig, calibration: Calibration, fractions: np.ndarray, tokens: int) -> list[Offer]:
    """One offer per budget.

    fractions: (budgets,) mean costs as shares of full depth; one below the first exit's cost is raised to
    that cost. tokens: the number of tokens of the instruction, on which costs depend.
    """
    layers = np.cumsum(cost_table(model, tokens).layers)
    costs = exit_fractions(model, tokens)
    path = calibration.path(len(model.exits))
    solved_on, judged_on = calibration.episodes % 2 == 0, calibration.episodes % 2 == 1
    deltas, deviations = calibration.deltas, calibration.deviations
    ours = ThresholdPath.ordered(deltas[solved_on], deviations[solved_on], costs)
    found = []
    for fraction in np.maximum(fractions, costs[0]):
        thresholds = {OURS: ours.thresholds(ours.position_within(costs, fraction))}
        thresholds |= {
            family: thresholds_within(family, deltas[solved_on], costs, fraction) for family in FAMILIES
        }
        deviation = {
            method: float(
                deviations[judged_on][
                    np.arange(judged_on.sum()), exits_taken(deltas[judged_on], chosen)
                ].mean()
            )
            for method, chosen in thresholds.items()
        }
        shares = path.shares(path.position_within(costs, fraction))
        found.append(Offer(float(fraction), float(shares @ costs * layers[-1]), shares.tolist(), deviation))
    return found


def draw(found: list[Offer], exits: tuple[int, ...], title: str, path: Path) -> None:
    """Writes a figure with two plots: the deviation of each method against cost, and the exits' shares
    against cost.

    exits: the exits' layers, from 0. path: the image file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    fractions = [offer.fraction for offer in found]
    for method in METHODS:
        left.plot(
            fractions, [offer.deviation[method] for offer in found], label=method, color=COLOURS[method]
        )
    left.set(
        xlabel="mean language cost, share of full depth",
        ylabel="deviation from the full-depth action",
        title=title,
    )
    left.legend()
    right.stackplot(
        fractions,
        np.array([offer.shares for offer in found]).T,
        labels=[f"{layer + 1} layers" for layer in exits],
    )
    right.set(
        xlabel="mean language cost, share of full depth",
        ylabel="share of the steps",
        title="exits taken (path)",
        ylim=(0, 1),
    )
    right.legend(loc="lower left", fontsize=8)
    with whole_file(path) as scratch:
        figure.savefig(scratch, dpi=110)
    pyplot.close(figure)
