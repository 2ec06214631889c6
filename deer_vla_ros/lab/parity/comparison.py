"""The comparison of recorded arrays with ours: one difference per array, one verdict per kind of array."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

EXACT = 0.0


@dataclass(frozen=True)
class Difference:
    """The difference between one recorded array and ours.

    kind: the kind of array, which has a tolerance of its own. where: the array's name in the recording.
    value: the difference; infinite if the shapes or the places of missing values (NaN) disagree.
    """

    kind: str
    where: str
    value: float


@dataclass(frozen=True)
class Verdict:
    """The result for the `arrays` arrays of one kind in one recording. worst: the largest difference."""

    recording: str
    kind: str
    arrays: int
    worst: Difference
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the largest difference is within the tolerance."""
        return self.worst.value <= self.tolerance


def compare(kind: str, where: str, recorded: np.ndarray, ours: object) -> Difference:
    """The largest absolute difference of one array, over the places where neither value is missing (NaN)."""
    recorded, ours = np.asarray(recorded), np.asarray(ours)
    if recorded.shape != ours.shape or not np.array_equal(np.isnan(recorded), np.isnan(ours)):
        return Difference(kind, where, float("inf"))
    with np.errstate(invalid="ignore"):  # The difference of two equal infinities is NaN, and counts as none.
        difference = np.abs(recorded.astype(np.float64) - ours.astype(np.float64))
    return Difference(kind, where, 0.0 if np.isnan(difference).all() else float(np.nanmax(difference)))


def compare_relative(kind: str, where: str, recorded: float, ours: float) -> Difference:
    """The difference of one number, relative to the recorded one; infinite for NaN or a recorded 0."""
    if recorded == ours:
        return Difference(kind, where, EXACT)
    relative = abs(ours - recorded) / abs(recorded) if recorded else float("inf")
    return Difference(kind, where, relative if relative == relative else float("inf"))


def judge(
    recording: str, differences: Iterable[Difference], kinds: Iterable[str], tolerances: Mapping[str, float]
) -> Iterator[Verdict]:
    """Yields one verdict for each of `kinds`, with the worst array. A kind without a tolerance must be equal.

    A kind without any array fails. Raises KeyError for a difference whose kind is not in `kinds`.
    """
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
