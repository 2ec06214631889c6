"""When does a recorded array agree with ours? One difference per array, one verdict per kind of array."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

EXACT = 0.0


@dataclass(frozen=True)
class Difference:
    """One recorded array (`where`) of one kind against ours; infinite where shapes or missing values (NaN) disagree."""

    kind: str
    where: str
    value: float


@dataclass(frozen=True)
class Verdict:
    """All arrays of one kind in one recording."""

    recording: str
    kind: str
    arrays: int
    worst: Difference
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.worst.value <= self.tolerance


def compare(kind: str, where: str, recorded: np.ndarray, ours: object) -> Difference:
    """Largest absolute difference of one array."""
    recorded, ours = np.asarray(recorded), np.asarray(ours)
    if recorded.shape != ours.shape or not np.array_equal(np.isnan(recorded), np.isnan(ours)):
        return Difference(kind, where, float("inf"))
    with np.errstate(invalid="ignore"):  # of two infinities: equal ones do not differ
        difference = np.abs(recorded.astype(np.float64) - ours.astype(np.float64))
    return Difference(kind, where, 0.0 if np.isnan(difference).all() else float(np.nanmax(difference)))


def compare_relative(kind: str, where: str, recorded: float, ours: float) -> Difference:
    """Difference of one number, by the size of the recorded one; a number that differs from a recorded 0 is infinitely far."""
    if recorded == ours:
        return Difference(kind, where, EXACT)
    relative = abs(ours - recorded) / abs(recorded) if recorded else float("inf")
    return Difference(kind, where, relative if relative == relative else float("inf"))


def judge(
    recording: str, differences: Iterable[Difference], kinds: Iterable[str], tolerances: Mapping[str, float]
) -> Iterator[Verdict]:
    """One verdict for each of `kinds`, the worst array named; kinds without a tolerance must be equal."""
    by_kind: dict[str, list[Difference]] = {kind: [] for kind in kinds}
    for difference in differences:
        by_kind[difference.kind].append(difference)
    for kind, found in by_kind.items():
        worst = max(
            found,
            key=lambda difference: difference.value,
            default=Difference(kind, "nothing recorded", float("inf")),
        )
        yield Verdict(recording, kind, len(found), worst, tolerances.get(kind, EXACT))
