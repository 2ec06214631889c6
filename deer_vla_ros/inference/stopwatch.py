"""Where does a step's time go? Laps that wait for the device, since unsynchronised ones under-report."""

from __future__ import annotations

import time

import torch

from deer_vla_ros.inference.types import StageTimes


class Stopwatch:
    """Adds up milliseconds by stage; the stages are the fields of StageTimes."""

    def __init__(self, device: torch.device):
        self._device = device
        self._laps = {"preprocess": 0.0, "vision": 0.0, "language": 0.0, "head": 0.0}
        self._last = self._now()

    def lap(self, stage: str) -> None:
        """Books the time since the last lap on `stage`."""
        now = self._now()
        self._laps[stage] += (now - self._last) * 1e3
        self._last = now

    def times(self) -> StageTimes:
        return StageTimes(**self._laps)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
