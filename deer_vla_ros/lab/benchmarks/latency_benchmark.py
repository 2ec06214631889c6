"""The latency of a step on this machine, by depth.

It is measured once and stored, so that replays always decide with the same values.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from deer_vla_ros.budget.cost import cost_table
from deer_vla_ros.budget.latency import WINDOW, LatencyModel, LatencyTable
from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.inference.types import Observation, PolicyStep
from deer_vla_ros.model.checkpoint import load_as

INSTRUCTION = "place the grasped block on top of another block"
WARM_UP = 3
"""The most steps to each exit that are not timed. They end after a quarter of the time."""
ENOUGH = 20
"""The fewest timed steps that make a table: each of them times every part, and every exit is among them."""


def measure(
    folder: Path,
    device: str,
    dtype: str,
    seconds: float = math.inf,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> LatencyTable:
    """Measures WINDOW steps on random images, 200 x 200 and 84 x 84 pixels, every depth in turn.

    dtype: of the weights, as the parameter `model.dtype`.
    seconds: no step starts after this time. The table then says how many steps it is made of.
    on_progress: called before each step and after the last one, with the number of steps so far and in all.
    Raises UserError if there are fewer than ENOUGH timed steps.
    """
    checkpoint = load_as(dtype, folder, device)
    config, random = checkpoint.info.model, np.random.default_rng(0)
    rules = [
        ExitRule(config.exits[: n + 1], (-1.0,) * (n + 1), checkpoint.info.delta)
        for n in range(len(config.exits))
    ]
    policy = DeerPolicy(checkpoint.model, checkpoint.tokenizer, rules[0])
    latencies = LatencyModel(cost_table(config, policy.reset(INSTRUCTION)).layers)
    pose = np.array([0.4, 0.0, 0.3, 1.0, 0.0, 0.0, 0.0])
    begin, untimed, timed = time.monotonic(), 0, 0

    def step(number: int) -> PolicyStep:
        on_progress(untimed + timed, WARM_UP * len(rules) + WINDOW)
        policy.rule = rules[number % len(rules)]
        images = (random.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in (200, 84))
        return policy.step(Observation(*images, pose))

    while untimed < WARM_UP * len(rules) and time.monotonic() - begin < seconds / 4:
        step(untimed)
        untimed += 1
    while timed < WINDOW and time.monotonic() - begin < seconds:
        latencies.observe(step(timed))
        timed += 1
    on_progress(untimed + timed, untimed + timed)
    if timed < ENOUGH:
        raise UserError(
            f"benchmark: {timed} steps were timed in {seconds / 60:g} minutes, and {ENOUGH} are needed: "
            "give more --minutes, or a faster device (--device, --threads)"
        )
    part = "" if timed == WINDOW else f"; {timed} of {WINDOW} steps: the time was over"
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    )
    return latencies.table(f"{checkpoint.info.weights}; {dtype}; {name}; torch {torch.__version__}{part}")
