"""A model of the milliseconds that a step to each exit takes, measured here and updated by each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deer_vla_ros.errors import UserError, cause
from deer_vla_ros.inference.types import PolicyStep, StageTimes
from deer_vla_ros.untrusted import read_json

TABLE = "latency.json"
"""File in a checkpoint folder: latencies that were measured once, for replays."""
TABLE_REMEDY = "measure one with `python -m deer_vla_ros benchmark latency`"
WINDOW = 200
"""Number of newest steps that the figures cover."""
MOST_STEPS, MOST_MS = 10_000, 1e7
"""The most rows of a table, and the longest time in it."""
HIGH = 0.99
"""Share of the steps that must meet a deadline."""


@dataclass(frozen=True)
class LatencyTable:
    """Latencies that were measured once, so that a replay decides the same on every machine.

    parts: for each observed step, milliseconds before the layers, per layer of mean cost, and per probe of
    the head. about: where they were measured.
    """

    parts: tuple[tuple[float, float, float], ...]
    about: str

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """The table of a file. Raises UserError if the file holds no table."""
        values = read_json(path, TABLE_REMEDY)
        try:
            parts = np.array(values["parts"], float)
            if (
                parts.ndim != 2
                or parts.shape[1] != 3
                or not 0 < len(parts) <= MOST_STEPS
                or not ((parts >= 0) & (parts <= MOST_MS)).all()  # NaN is neither
            ):
                raise ValueError("parts are no rows of three milliseconds")
            return cls(tuple(map(tuple, parts.tolist())), str(values["about"]))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise UserError(f"{path}: no latency table ({cause(error)}): {TABLE_REMEDY}") from error


class LatencyModel:
    """Predicts the milliseconds of a step from three parts: before the layers, per layer, per head probe.

    Each observed step gives all three parts, so it improves the prediction for every exit, even a rare one.
    The time of a layer is assumed to be proportional to its cost.
    """

    def __init__(self, layers: Sequence[float]):
        """layers: the cost of each layer, in any unit."""
        self._depth = np.concatenate(([0.0], np.cumsum(layers) / np.mean(layers)))
        self._parts = np.zeros(
            (WINDOW, 3)
        )  # a ring: before the layers, per layer of mean cost, per probe [ms]
        self._count = 0
        self.is_frozen = False

    @property
    def is_measured(self) -> bool:
        return self._count > 0

    def observe(self, step: PolicyStep) -> None:
        """Takes the stage times of one step; ignores them if a table is in use."""
        if self.is_frozen:
            return
        times = step.times
        self._parts[self._count % WINDOW] = (
            times.preprocess + times.vision,
            times.language / self._depth[step.layers_run],
            times.head / step.head_probes,
        )
        self._count += 1

    def table(self, about: str) -> LatencyTable:
        """The observed latencies as a table."""
        return LatencyTable(tuple(map(tuple, self._parts[: self._count].tolist())), about)

    def use(self, table: LatencyTable) -> None:
        """Uses the table from now on, and observes no more steps."""
        self._parts = np.array(table.parts)
        self._count, self.is_frozen = len(self._parts), True

    def times(self, step: PolicyStep) -> StageTimes:
        """The mean time of a step of this depth, by stage."""
        before, layer, probe = self._parts[: self._count].mean(0).tolist()
        return StageTimes(0.0, before, layer * float(self._depth[step.layers_run]), probe * step.head_probes)

    def expected(self, layers_run: int, head_probes: int) -> float:
        """The mean milliseconds of a step."""
        return float(np.mean(self._steps(layers_run, head_probes)))

    def high(self, layers_run: int, head_probes: int) -> float:
        """The milliseconds within which a share HIGH of such steps stays."""
        return float(np.quantile(self._steps(layers_run, head_probes), HIGH))

    def _steps(self, layers_run: int, head_probes: int) -> np.ndarray:
        """The time of each observed step if it had gone to this depth [ms]."""
        return self._parts[: self._count] @ (1.0, self._depth[layers_run], head_probes)
