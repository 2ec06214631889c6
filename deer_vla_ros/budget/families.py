"""Which thresholds does the paper's method give? Target shares of the exits from a family of one ratio, then quantiles.

Yue et al., NeurIPS 2024, arXiv 2411.02359, section 3.3, as the reference implementation computes it. There the user gives the
ratio; here it is solved from a budget.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from deer_vla_ros.errors import UserError

ALWAYS, NEVER = 1e8, -1e8
"""Thresholds that every delta is below, and none."""
BISECTIONS = 40


def _exponential(ratio: float, count: int) -> np.ndarray:
    return np.power(ratio, np.arange(1, count + 1))


def _gauss(ratio: float, count: int) -> np.ndarray:
    exponents = -((np.arange(count) - ratio) ** 2) / 2
    return np.exp(exponents - exponents.max())  # far from all exits, every weight alone would be 0


def _gamma(ratio: float, count: int) -> np.ndarray:
    """Density of the gamma distribution of shape `ratio` and scale 2 at 1..count, but for a factor."""
    k = np.arange(1, count + 1)
    return np.power(k, ratio - 1.0) * np.exp(-k / 2.0)


FAMILIES: dict[str, tuple[Callable[[float, int], np.ndarray], tuple[float, float]]] = {
    "exp": (_exponential, (1e-6, 1e6)),
    "gauss": (_gauss, (-30.0, 60.0)),
    "gamma": (_gamma, (-60.0, 120.0)),
}
"""Weights of the exits by name, and the range of the ratio; a larger ratio goes deeper."""


def target_shares(family: str, ratio: float, count: int, skip_first: bool = False) -> np.ndarray:
    """Shares of `count` exits, sum 1. skip_first: none for the first exit, as the reference does for its 9B model."""
    if family not in FAMILIES:
        raise UserError(f"threshold family '{family}' is unknown: use one of {', '.join(FAMILIES)}")
    weights = FAMILIES[family][0](ratio, count)
    if skip_first:
        weights[0] = 0.0
    return weights / weights.sum()


def thresholds_for_shares(deltas: np.ndarray, shares: np.ndarray) -> tuple[float, ...]:
    """Thresholds under which exit k takes about `shares[k]` of the samples (N, exits).

    For each exit but the last, the floor(N * share)-th smallest delta among the samples that no exit before took; then every sample
    not above it is taken. Where the share is less than one sample, or fewer samples are left, NEVER; the last is ALWAYS.
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
    """The family's thresholds with the largest ratio whose mean cost on the samples (N, exits) is within `budget`.

    costs (exits,), rising. The mean cost of the target shares rises with the ratio, so bisection finds it; a budget that the family
    cannot keep gives its cheapest thresholds. A ratio is judged by what its thresholds cost, not by the shares they aim at.
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


def exits_taken(deltas: np.ndarray, thresholds: tuple[float, ...]) -> np.ndarray:
    """(N,) index of the exit that each sample (N, exits) takes; the last where no exit before it stops."""
    stops = deltas <= np.asarray(thresholds, dtype=deltas.dtype)
    stops[:, -1] = True
    return stops.argmax(1)


def exit_shares(deltas: np.ndarray, thresholds: tuple[float, ...]) -> np.ndarray:
    """(exits,) share of the samples (N, exits) that each exit takes."""
    left, counts = np.ones(len(deltas), dtype=bool), [len(deltas)]
    for index, threshold in enumerate(thresholds[:-1]):
        left &= ~(deltas[:, index] <= threshold)
        counts.append(int(np.count_nonzero(left)))
    return -np.diff([*counts, 0]) / len(deltas)
