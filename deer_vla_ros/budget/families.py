"""The paper's exit thresholds: target shares of the exits from a family with one ratio, and their quantiles.

Yue et al., NeurIPS 2024, arXiv 2411.02359, section 3.3, as the reference implementation computes it. There,
the user gives the ratio; here, it is solved from a budget. Reports and benchmarks use this module; the node
uses `path`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from deer_vla_ros.budget.path import ALWAYS, NEVER, exit_shares
from deer_vla_ros.errors import UserError

BISECTIONS = 40


def _exponential(ratio: float, count: int) -> np.ndarray:
    return np.power(ratio, np.arange(1, count + 1))


def _gauss(ratio: float, count: int) -> np.ndarray:
    exponents = -((np.arange(count) - ratio) ** 2) / 2
    return np.exp(
        exponents - exponents.max()
    )  # without the maximum, all weights would be 0 far from the exits


def _gamma(ratio: float, count: int) -> np.ndarray:
    """The density of the gamma distribution of shape `ratio` and scale 2 at 1..count, up to a factor."""
    k = np.arange(1, count + 1)
    return np.power(k, ratio - 1.0) * np.exp(-k / 2.0)


FAMILIES: dict[str, tuple[Callable[[float, int], np.ndarray], tuple[float, float]]] = {
    "exp": (_exponential, (1e-6, 1e6)),
    "gauss": (_gauss, (-30.0, 60.0)),
    "gamma": (_gamma, (-60.0, 120.0)),
}
"""By name: the weights of the exits, and the range of the ratio. A larger ratio goes deeper."""


def target_shares(family: str, ratio: float, count: int, skip_first: bool = False) -> np.ndarray:
    """Shares of `count` exits; their sum is 1. Raises UserError for an unknown family.

    skip_first: the first exit has no share, as in the reference's 9B model.
    """
    if family not in FAMILIES:
        raise UserError(f"threshold family '{family}' is unknown: use one of {', '.join(FAMILIES)}")
    weights = FAMILIES[family][0](ratio, count)
    if skip_first:
        weights[0] = 0.0
    return weights / weights.sum()


def thresholds_for_shares(deltas: np.ndarray, shares: np.ndarray) -> tuple[float, ...]:
    """Thresholds with which exit k takes about `shares[k]` of the samples (N, exits).

    For each exit but the last: the floor(N * share)-th smallest delta among the samples that no earlier exit
    took. The exit takes all samples not above it. If the share is less than one sample, or more than the
    samples that are left, the threshold is NEVER. The last one is ALWAYS.
    """
    left, thresholds = np.ones(len(deltas), dtype=bool), []
    for index in range(len(shares) - 1):
        wanted = int(np.floor(len(deltas) * shares[index]))
        column = deltas[left, index]
        if wanted == 0 or wanted > len(column):
            thresholds.append(NEVER)
            continue
        thresholds.append(float(np.partition(column, wanted - 1)[wanted - 1]))
        left &= deltas[:, index] > thresholds[-1]
    return (*thresholds, ALWAYS)


def thresholds_within(
    family: str, deltas: np.ndarray, costs: np.ndarray, budget: float, skip_first: bool = False
) -> tuple[float, ...]:
    """The thresholds with the family's largest ratio whose mean cost on deltas (N, exits) keeps `budget`.

    costs (exits,): ascending. The mean cost rises with the ratio, so bisection finds it. A ratio is judged by
    the cost of its thresholds on the samples, not by the target shares. A budget that the family cannot keep
    gives its cheapest thresholds.
    """
    low, high = FAMILIES[family][1]
    is_geometric = low > 0

    def at(ratio: float) -> tuple[float, ...]:
        return thresholds_for_shares(deltas, target_shares(family, ratio, len(costs), skip_first))

    def keeps(thresholds: tuple[float, ...]) -> bool:
        return float(exit_shares(deltas, thresholds) @ costs) <= budget

    if keeps(found := at(high)):
        return found
    found = at(low)
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5 if is_geometric else (low + high) / 2
        if keeps(thresholds := at(middle)):
            low, found = middle, thresholds
        else:
            high = middle
    return found
