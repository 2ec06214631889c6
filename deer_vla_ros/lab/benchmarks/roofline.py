"""The roofline: the shortest time in which a device could do a step, from what the step reads and computes.

A stage takes at least the time in which its weights are read once, and at least the time of its
multiply-accumulates (MACs). The bound of a step is the sum of the bounds of its stages, which run one after
the other. Images, activations and the launch of kernels count as nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from deer_vla_ros.budget.cost import GIGA, CostTable
from deer_vla_ros.model.config import PRESETS, ModelConfig

BLOCK_BYTES = 2**28
"""The memory that is read or copied to measure the bandwidth: more than a cache holds."""
FULL_DEPTH = {"openflamingo_3b": 24, "openflamingo_9b": 32}
"""The layers of the static networks that the paper compares with."""
SAVED = 5.2
"""The paper's factor between the language MACs of the static 3B network and of DeeR at the same average
length (Yue et al., arXiv 2411.02359, ABCD -> D; 5.9 on D -> D and 6.5 on ABC -> D)."""


@dataclass(frozen=True)
class Rates:
    """What a device can do: bytes per second of its memory, and MACs per second in one number type."""

    bytes_per_s: float
    macs_per_s: float

    def best(self, other: Rates) -> Rates:
        """The better of two measurements of one device."""
        return Rates(max(self.bytes_per_s, other.bytes_per_s), max(self.macs_per_s, other.macs_per_s))

    def bound_ms(self, weight_bytes: float, gmac: float) -> float:
        """The shortest time [ms] that reads this many bytes and does this many GMAC."""
        return max(weight_bytes / self.bytes_per_s, gmac * GIGA / self.macs_per_s) * 1e3


class StepWork:
    """The bytes of weights and the MACs of a step, by stage (vision, language, head).

    A step to the k-th exit reads the head k times: the layer before the first exit and the first exit are one
    batch. Static full depth reads it once.
    """

    def __init__(self, costs: CostTable, sizes: Mapping[str, int]):
        """sizes: the bytes of each tensor of the network, by name."""
        self._costs = costs
        self._layers = [
            sum(size for name, size in sizes.items() if name.startswith(f"layers.{index}."))
            for index in range(len(costs.layers))
        ]
        head = {name: size for name, size in sizes.items() if name.startswith("shared_head.")}
        self._memory = sum(size for name, size in head.items() if "weight_hh" in name)
        self._head = sum(head.values()) - self._memory
        seen = ("vision.", "resampler.", "proprioception.", "grounding.")
        self._vision = sum(size for name, size in sizes.items() if name.startswith(seen))

    def weight_bytes(self, layers: int, readings: int) -> dict[str, int]:
        """The bytes of weights that a step of so many layers and readings of the head has to read.

        The part of the LSTMs that multiplies the state is the same for all readings, so it is read once.
        """
        return {
            "vision": self._vision,
            "language": sum(self._layers[:layers]),
            "head": self._memory + readings * self._head,
        }

    def gmac(self, layers: int, probes: int) -> dict[str, float]:
        """GMAC of a step of so many layers and features that the head gets."""
        return {
            "vision": self._costs.vision,
            "language": self._costs.language(layers),
            "head": probes * self._costs.head,
        }

    def bound_ms(self, rates: Rates, layers: int, readings: int, probes: int) -> dict[str, float]:
        """The shortest time of each stage [ms]."""
        weights, gmac = self.weight_bytes(layers, readings), self.gmac(layers, probes)
        return {stage: rates.bound_ms(weights[stage], gmac[stage]) for stage in weights}


def mean_layers(config: ModelConfig) -> float:
    """The mean number of layers that DeeR runs at the static network's success: its layers / SAVED.

    The paper tells SAVED for the 3B network, whose layers all cost the same. For another network this takes
    the same share. The static network of a released one has FULL_DEPTH layers, even if `config` has fewer.
    """
    layers = config.decoder.layers
    for name, full in FULL_DEPTH.items():
        if PRESETS[name](layers).decoder == config.decoder:
            return full / SAVED
    return layers / SAVED


def at_depth(depth: float, values: Mapping[int, float]) -> float | None:
    """A figure of a step at a mean depth, by linear interpolation between the measured depths.

    That is the mean over steps that stop at the two neighbouring exits. For a depth less than the shallowest
    exit it is the figure of that exit. None if the deepest measured exit is shallower. values: the figure by
    layers run.
    """
    if not values or depth > max(values):
        return None
    layers = sorted(values)
    return float(np.interp(depth, layers, [values[each] for each in layers]))


def measured_rates(device: torch.device, dtype: torch.dtype, seconds: float = 2.0) -> Rates:
    """The best copy and the best matrix product of a few in about `seconds`, on this device.

    A copy reads and writes each byte; the better of a copy and a matrix-vector product, which only reads,
    counts as the bandwidth, because a step only reads its weights.
    """
    part = seconds / 3
    bandwidth = max(_copied_per_s(device, part), _read_per_s(device, dtype, part))
    width = 8192 if device.type == "cuda" else 2048
    square = torch.ones(width, width, dtype=dtype, device=device)
    product = torch.empty_like(square)
    return Rates(bandwidth, width**3 / _best_s(device, lambda: torch.mm(square, square, out=product), part))


def _copied_per_s(device: torch.device, seconds: float) -> float:
    """The bytes that a copy reads and writes per second."""
    source = torch.zeros(BLOCK_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * BLOCK_BYTES / _best_s(device, lambda: target.copy_(source), seconds)


def _read_per_s(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """The bytes of a matrix that its product with a vector reads per second."""
    width = 8192
    matrix = torch.zeros(BLOCK_BYTES // (width * dtype.itemsize), width, dtype=dtype, device=device)
    vector = torch.zeros(width, dtype=dtype, device=device)
    return BLOCK_BYTES / _best_s(device, lambda: torch.mv(matrix, vector), seconds)


def _best_s(device: torch.device, work: Callable[[], object], seconds: float) -> float:
    """The shortest time of one call, over calls in about `seconds` and at least three rounds.

    A GPU gets ten calls per round, so that the wait at its end does not count much.
    """
    calls = 10 if device.type == "cuda" else 1
    until, best, rounds = time.perf_counter() + seconds, math.inf, 0
    while rounds < 3 or time.perf_counter() < until:
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - begin) / calls)
        rounds += 1
    return best
