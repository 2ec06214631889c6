"""The latency of a step on this machine, by depth.

It is measured once and stored, so that replays always decide with the same values.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from deer_vla_ros.budget.cost import cost_table
from deer_vla_ros.budget.latency import WINDOW, LatencyModel, LatencyTable
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.inference.types import Observation
from deer_vla_ros.model.checkpoint import load

INSTRUCTION = "place the grasped block on top of another block"
WARM_UP = 3


def measure(
    folder: Path, device: str, dtype: torch.dtype, on_progress: Callable[[float], None] = lambda share: None
) -> LatencyTable:
    """Measures steps on random images, 200 x 200 and 84 x 84 pixels, every depth in turn.

    on_progress: gets the finished share of the measurement, 0..1.
    """
    checkpoint = load(folder, device, dtype)
    config, random = checkpoint.info.model, np.random.default_rng(0)
    rules = [
        ExitRule(config.exits[: n + 1], (-1.0,) * (n + 1), checkpoint.info.delta)
        for n in range(len(config.exits))
    ]
    policy = DeerPolicy(checkpoint.model, checkpoint.tokenizer, rules[0])
    latencies = LatencyModel(cost_table(config, policy.reset(INSTRUCTION)).layers)
    pose = np.array([0.4, 0.0, 0.3, 1.0, 0.0, 0.0, 0.0])
    for number in range(WARM_UP * len(rules) + WINDOW):
        policy.rule = rules[number % len(rules)]
        images = (random.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in (200, 84))
        step = policy.step(Observation(*images, pose))
        if number >= WARM_UP * len(rules):
            latencies.observe(step)
        on_progress(number / (WARM_UP * len(rules) + WINDOW - 1))
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    )
    return latencies.table(f"{checkpoint.info.weights}; {dtype}; {name}; torch {torch.__version__}")
