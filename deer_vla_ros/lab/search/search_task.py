"""The task of a threshold search: its start, its budget, and the quantiles of the proposed thresholds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deer_vla_ros.budget.path import ALWAYS, NEVER
from deer_vla_ros.errors import UserError

FIRST_SPREAD = 0.1
"""Standard deviation of the quantiles of the first trials around the quantiles of the start."""


@dataclass(frozen=True)
class Outcome:
    """The result of one closed-loop evaluation.

    score: larger is better, for example the average successful length. cost: mean per step, in the unit of
    the budget.
    """

    score: float
    cost: float


def threshold_at(quantile: float, values: np.ndarray) -> float:
    """Returns the threshold at `quantile` of the calibrated deltas `values` (samples,), sorted.

    About the share `quantile` of the deltas does not exceed it. Quantiles have steps of 1 / (samples + 1): 0
    is NEVER, 1 is ALWAYS, and each delta has one step between them.
    """
    taken = round(quantile * (len(values) + 1))
    if taken == 0:
        return NEVER
    return ALWAYS if taken > len(values) else float(values[taken - 1])


def quantile_of(threshold: float, values: np.ndarray) -> float:
    """Returns the quantile of `threshold` among deltas `values` (samples,), sorted.

    `threshold_at` returns the same threshold if it is one of the deltas, NEVER or ALWAYS, and otherwise the
    next lower one of these. Equal deltas have the highest of their quantiles.
    """
    if threshold >= ALWAYS:
        return 1.0
    return int(np.searchsorted(values, threshold, side="right")) / (len(values) + 1)


@dataclass(frozen=True, eq=False)
class SearchTask:
    """What one search looks for. A study belongs to one task."""

    start: tuple[float, ...]
    budget: float
    candidates: tuple[np.ndarray, ...]
    seed: int

    def check(self) -> None:
        """Raises UserError if the values do not fit together."""
        if any(math.isnan(threshold) for threshold in self.start):
            raise UserError(
                f"search: start {self.start} contains NaN: use {NEVER:g} for never, {ALWAYS:g} for always"
            )
        if len(self.start) < 2:
            raise UserError(
                f"search: {len(self.start)} exits leave nothing to search, as the last is always taken: "
                "give two or more"
            )
        if len(self.candidates) != len(self.start) - 1:
            raise UserError(
                f"search: candidates are of {len(self.candidates)} exits, but start has {len(self.start)} "
                f"thresholds: give candidates for the {len(self.start) - 1} exits before the last"
            )
        for i, values in enumerate(self.candidates):
            if (
                values.ndim != 1
                or not len(values)
                or not np.all((values > NEVER) & (values < ALWAYS))
                or np.any(np.diff(values) < 0)
            ):
                raise UserError(
                    f"search: candidates of exit {i} have shape {values.shape}, and are to be one or more "
                    f"ascending deltas between {NEVER:g} and {ALWAYS:g}: calibrate again, or sort them"
                )
        if not math.isfinite(self.budget):
            raise UserError(
                f"search: budget is {self.budget}, which no cost can be held against: give a finite one"
            )
        if self.seed < 0:
            raise UserError(f"search: seed is {self.seed}: use 0 or more")

    def identity(self) -> dict[str, Any]:
        """Returns the values that a later call on the same study must repeat."""
        content = hashlib.sha256()
        for values in self.candidates:
            content.update(f"{len(values)} ".encode() + values.tobytes())
        return {"budget": self.budget, "start": list(self.start), "candidates": content.hexdigest()[:16]}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the searched exits in the study."""
        return tuple(f"exit {i}" for i in range(len(self.candidates)))

    def start_quantiles(self) -> list[float]:
        """Returns the quantiles of the start's thresholds."""
        return [quantile_of(threshold, values) for threshold, values in zip(self.start, self.candidates)]

    def near_start(self, number: int) -> list[float]:
        """Returns quantiles for trial `number`, drawn around the quantiles of the start."""
        drawn = np.random.default_rng([self.seed, number]).normal(self.start_quantiles(), FIRST_SPREAD)
        return np.clip(drawn, 0, 1).tolist()

    def thresholds(self, quantiles: Sequence[float]) -> tuple[float, ...]:
        """Returns one threshold per exit; the last one is the start's."""
        return (
            *(threshold_at(quantile, values) for quantile, values in zip(quantiles, self.candidates)),
            self.start[-1],
        )
