"""How many milliseconds will a step take that goes to a certain exit? Measured here, kept up to date by live steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deer_vla_ros.inference.types import PolicyStep

WINDOW = 200
"""Steps that the figures cover."""
HIGH = 0.99
"""Quantile of the steps that a deadline is to be kept for."""


class LatencyModel:
    """Milliseconds of a whole step: what it costs before the first layer, per layer run, and per probe of the head.

    A step observes its own parts, so that every step teaches something about every exit, also those that are rarely taken. Layers that
    compute more are taken to need longer in proportion.
    """

    def __init__(self, layers: Sequence[float]):
        """layers: cost of each layer, in any unit."""
        self._depth = np.concatenate(([0.0], np.cumsum(layers) / np.mean(layers)))
        self._parts = np.zeros((WINDOW, 3))  # a ring: before the layers, per layer of mean cost, per probe [ms]
        self._count = 0

    @property
    def is_measured(self) -> bool:
        return self._count > 0

    def observe(self, step: PolicyStep) -> None:
        """One step's stage times."""
        times = step.times
        self._parts[self._count % WINDOW] = (
            times.preprocess + times.vision,
            times.language / self._depth[step.layers_run],
            times.head / step.head_probes,
        )
        self._count += 1

    def expected(self, layers_run: int, head_probes: int) -> float:
        """Mean milliseconds of a step."""
        return float(np.mean(self._steps(layers_run, head_probes)))

    def high(self, layers_run: int, head_probes: int) -> float:
        """Milliseconds that all but one of a hundred such steps stay within."""
        return float(np.quantile(self._steps(layers_run, head_probes), HIGH))

    def _steps(self, layers_run: int, head_probes: int) -> np.ndarray:
        """What each observed step would have taken, had it gone that deep [ms]."""
        return self._parts[: self._count] @ (1.0, self._depth[layers_run], head_probes)
