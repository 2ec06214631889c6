"""How many milliseconds will a step take that goes to a certain exit? Measured here, kept up to date by live steps."""

from __future__ import annotations

import numpy as np

from deer_vla_ros.inference.types import PolicyStep

WINDOW = 200
"""Steps that the figures cover."""
HIGH = 0.99
"""Quantile of the steps that a deadline is to be kept for."""


class LatencyModel:
    """Milliseconds of a whole step: what it costs before the first layer, per layer run, and per probe of the head.

    A step observes its own parts, so that every step teaches something about every exit, also those that are rarely taken.
    """

    def __init__(self) -> None:
        self._parts = np.zeros((WINDOW, 3))  # rings: before the layers, per layer, per probe [ms]
        self._ratios = np.ones(WINDOW)
        self._count = 0

    @property
    def is_measured(self) -> bool:
        return self._count > 0

    def observe(self, step: PolicyStep) -> None:
        """One step's stage times."""
        times, place = step.times, self._count % WINDOW
        expected = self.expected(step.layers_run, step.head_probes) if self._count else 0.0
        self._ratios[place] = times.total / expected if expected > 0 else 1.0
        self._parts[place] = (
            times.preprocess + times.vision,
            times.language / step.layers_run,
            times.head / step.head_probes,
        )
        self._count += 1

    def expected(self, layers_run: int, head_probes: int) -> float:
        """Mean milliseconds of a step."""
        before, layer, probe = self._parts[: self._count].mean(0)
        return float(before + layers_run * layer + head_probes * probe)

    def high(self, layers_run: int, head_probes: int) -> float:
        """Milliseconds that all but one of a hundred such steps stay within."""
        ratio = float(np.quantile(self._ratios[: self._count], HIGH))
        return max(ratio, 1.0) * self.expected(layers_run, head_probes)
