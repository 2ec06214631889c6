"""How many milliseconds will a step take that goes to a certain exit? Measured here, kept up to date by live steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.types import PolicyStep, StageTimes

TABLE = "latency.json"
"""Of a checkpoint folder: latencies measured once, which replay goes by."""
TABLE_REMEDY = "measure one with `python -m deer_vla_ros benchmark latency`"
WINDOW = 200
"""Steps that the figures cover."""
HIGH = 0.99
"""Quantile of the steps that a deadline is to be kept for."""


@dataclass(frozen=True)
class LatencyTable:
    """Latencies that were measured once and are kept, so that a replay decides alike wherever it runs.

    parts: of each observed step, milliseconds before the layers, per layer of mean cost, per probe of the head. about: where they were measured.
    """

    parts: tuple[tuple[float, float, float], ...]
    about: str

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """UserError for a file that is none."""
        try:
            values = json.loads(path.read_text())
            parts = np.array(values["parts"], float)
            if (
                parts.ndim != 2
                or parts.shape[1] != 3
                or not len(parts)
                or not (np.isfinite(parts).all() and (parts >= 0).all())
            ):
                raise ValueError("parts are no rows of three milliseconds")
            return cls(tuple(map(tuple, parts.tolist())), str(values["about"]))
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): {TABLE_REMEDY}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: no latency table ({error}): {TABLE_REMEDY}") from error


class LatencyModel:
    """Milliseconds of a whole step: what it costs before the first layer, per layer run, and per probe of the head.

    A step observes its own parts, so that every step teaches something about every exit, also those that are rarely taken. Layers that
    compute more are taken to need longer in proportion.
    """

    def __init__(self, layers: Sequence[float]):
        """layers: cost of each layer, in any unit."""
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
        """One step's stage times; nothing where a table is in use."""
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
        """What was observed, to be kept."""
        return LatencyTable(tuple(map(tuple, self._parts[: self._count].tolist())), about)

    def use(self, table: LatencyTable) -> None:
        """The table's figures from now on."""
        self._parts = np.array(table.parts)
        self._count, self.is_frozen = len(self._parts), True

    def times(self, step: PolicyStep) -> StageTimes:
        """What a step of this depth takes on average, by stage."""
        before, layer, probe = self._parts[: self._count].mean(0).tolist()
        return StageTimes(0.0, before, layer * float(self._depth[step.layers_run]), probe * step.head_probes)

    def expected(self, layers_run: int, head_probes: int) -> float:
        """Mean milliseconds of a step."""
        return float(np.mean(self._steps(layers_run, head_probes)))

    def high(self, layers_run: int, head_probes: int) -> float:
        """Milliseconds that all but one of a hundred such steps stay within."""
        return float(np.quantile(self._steps(layers_run, head_probes), HIGH))

    def _steps(self, layers_run: int, head_probes: int) -> np.ndarray:
        """What each observed step would have taken, had it gone that deep [ms]."""
        return self._parts[: self._count] @ (1.0, self._depth[layers_run], head_probes)
