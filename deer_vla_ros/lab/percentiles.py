"""Percentiles of measured values, by name."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def percentiles(
    values: Iterable[float | None], shares: tuple[int, ...] = (50, 95)
) -> dict[str, float | None]:
    """Returns the percentiles by name (p50, p95) of the values that are not None, rounded to 0.001; None for
    each if there are no values. shares: 0 to 100."""
    known = [value for value in values if value is not None]
    return {f"p{share}": round(float(np.percentile(known, share)), 3) if known else None for share in shares}
