"""What a search of thresholds is about: its start, its budget, and the quantiles in which thresholds are proposed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deer_vla_ros.budget.families import ALWAYS, NEVER
from deer_vla_ros.errors import UserError

FIRST_SPREAD = 0.1
"""Standard deviation of the first trials' quantiles about the start's."""


@dataclass(frozen=True)
class Outcome:
    """What one closed-loop evaluation gave.

    score: larger is better, say the average successful length; cost: mean per step, in the unit of the budget.
    """

    score: float
    cost: float


def threshold_at(quantile: float, values: np.ndarray) -> float:
    """The threshold that about the share `quantile` of calibrated deltas `values` (samples,), sorted, does not exceed.

    Quantiles are counted in steps of 1 / (samples + 1): 0 is NEVER, 1 is ALWAYS, between them each delta has one.
    """
    taken = round(quantile * (len(values) + 1))
    if taken == 0:
        return NEVER
    return ALWAYS if taken > len(values) else float(values[taken - 1])


def quantile_of(threshold: float, values: np.ndarray) -> float:
    """The quantile of `threshold` among deltas `values` (samples,), sorted: `threshold_at` gives the threshold back exactly
    where it is one of them, NEVER or ALWAYS, and the next lower of these where it is not. Equal deltas share the highest."""
    if threshold >= ALWAYS:
        return 1.0
    return int(np.searchsorted(values, threshold, side="right")) / (len(values) + 1)


@dataclass(frozen=True, eq=False)
class SearchTask:
    """What is searched; a study is of one task."""

    start: tuple[float, ...]
    budget: float
    candidates: tuple[np.ndarray, ...]
    seed: int

    def check(self) -> None:
        if any(math.isnan(threshold) for threshold in self.start):
            raise UserError(
                f"search: start {self.start} contains NaN: use {NEVER:g} for never, {ALWAYS:g} for always"
            )
        if len(self.start) < 2:
            raise UserError(
                f"search: {len(self.start)} exits leave nothing to search, as the last is always taken: give two or more"
            )
        if len(self.candidates) != len(self.start) - 1:
            raise UserError(
                f"search: candidates are of {len(self.candidates)} exits, but start has {len(self.start)} thresholds: "
                f"give candidates for the {len(self.start) - 1} exits before the last"
            )
        for i, values in enumerate(self.candidates):
            if (
                values.ndim != 1
                or not len(values)
                or not np.all((values > NEVER) & (values < ALWAYS))
                or np.any(np.diff(values) < 0)
            ):
                raise UserError(
                    f"search: candidates of exit {i} have shape {values.shape}, and are to be one or more ascending deltas "
                    f"between {NEVER:g} and {ALWAYS:g}: calibrate again, or sort them"
                )
        if not math.isfinite(self.budget):
            raise UserError(
                f"search: budget is {self.budget}, which no cost can be held against: give a finite one"
            )
        if self.seed < 0:
            raise UserError(f"search: seed is {self.seed}: use 0 or more")

    def identity(self) -> dict[str, Any]:
        """What a later call on the same study has to repeat."""
        content = hashlib.sha256()
        for values in self.candidates:
            content.update(f"{len(values)} ".encode() + values.tobytes())
        return {"budget": self.budget, "start": list(self.start), "candidates": content.hexdigest()[:16]}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the searched exits, as the study calls their quantiles."""
        return tuple(f"exit {i}" for i in range(len(self.candidates)))

    def start_quantiles(self) -> list[float]:
        return [quantile_of(threshold, values) for threshold, values in zip(self.start, self.candidates)]

    def near_start(self, number: int) -> list[float]:
        """Quantiles for trial `number`, drawn around the start's."""
        drawn = np.random.default_rng([self.seed, number]).normal(self.start_quantiles(), FIRST_SPREAD)
        return np.clip(drawn, 0, 1).tolist()

    def thresholds(self, quantiles: Sequence[float]) -> tuple[float, ...]:
        return (
            *(threshold_at(quantile, values) for quantile, values in zip(quantiles, self.candidates)),
            self.start[-1],
        )
