"""Chooses how the steps of a network run, and compares it with the eager operators before it is used."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.backends import Compiled, CudaGraphs
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.inference.types import Observation, PolicyStep
from deer_vla_ros.model.network import MultiExitVLA
from deer_vla_ros.model.text import InstructionTokenizer

EAGER = "eager"
BACKENDS = {"compiled": Compiled, "graphs": CudaGraphs}
NAMES = ("auto", EAGER, *BACKENDS)
OBSERVATIONS = 20
WITHIN_S = 20.0
"""The comparison ends this many seconds after it has compared each exit once."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 5e-2}
"""The most by which a pose, a delta or a probability may differ. It is above the rounding of the number type:
on the released sizes, float16 changes deltas by up to 0.0014, bfloat16 by up to 0.017."""


@dataclass(frozen=True)
class Chosen:
    """A policy, and what its steps run with: one of NAMES without `auto`.

    report: how that was found, in one line; empty if nothing was to be found. is_refused: the backend that
    was asked for is not used.
    """

    policy: DeerPolicy
    backend: str
    report: str = ""
    is_refused: bool = False


def choose(name: str, model: MultiExitVLA, tokenizer: InstructionTokenizer, rule: ExitRule) -> Chosen:
    """The policy of a network with the backend `name`, one of NAMES.

    A backend that fails, or whose decisions differ from those of the eager operators by more than TOLERANCE,
    is not used: the policy is eager then. Raises UserError if the device does not have the backend.
    """
    device = model.device
    if name == "auto":
        name = "graphs" if device.type == "cuda" else EAGER
    if name == "graphs" and device.type != "cuda":
        raise UserError(
            f"model.backend is 'graphs', which are CUDA graphs, and the network is on {device.type}: "
            "use 'auto'"
        )
    eager = DeerPolicy(model, tokenizer, rule)
    if name == EAGER:
        return Chosen(eager, EAGER)
    began = time.monotonic()
    try:
        policy = DeerPolicy(model, tokenizer, rule, backend=BACKENDS[name](device))
        difference, count = compare(policy, eager)
    except Exception as error:  # a compiler or a driver may fail in any way; eager operators remain
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Chosen(eager, EAGER, f"model.backend '{name}' failed ({reason}): steps run eagerly", True)
    found = f"steps differ from eager ones by at most {difference:.2g} in {count} random observations"
    most = TOLERANCE[model.dtype if model.bits is None else torch.bfloat16]  # of the layers' products
    if not difference <= most:
        return Chosen(
            eager, EAGER, f"model.backend '{name}': {found}, {most:g} is allowed: steps run eagerly", True
        )
    return Chosen(
        policy,
        name,
        f"model.backend '{name}': {found}; prepared and compared in {time.monotonic() - began:.1f} s",
    )


def compare(policy: DeerPolicy, eager: DeerPolicy) -> tuple[float, int]:
    """The largest difference of any number of two policies' decisions, and for how many random observations.

    Every exit in turn is forced. The rules are restored, also after an error. Give both policies their
    instruction again afterwards.
    """
    rule = eager.rule
    for each in (policy, eager):
        each.reset("compare the backends")
    try:
        return _largest_difference(policy, eager, rule)
    finally:
        for each in (policy, eager):
            each.rule = rule


def _largest_difference(policy: DeerPolicy, eager: DeerPolicy, rule: ExitRule) -> tuple[float, int]:
    random = np.random.default_rng(0)
    exits, worst, count = rule.exits, 0.0, 0
    while count < max(OBSERVATIONS, len(exits)):
        if count == len(exits):  # what was to be compiled is compiled
            begun = time.monotonic()
        if count > len(exits) and time.monotonic() - begun > WITHIN_S:
            break
        depth = 1 + count % len(exits)
        observation = _random_observation(random)
        for each in (policy, eager):
            each.rule = ExitRule(exits[:depth], (-1.0,) * depth, rule.delta)
        worst = np.maximum(worst, _difference(policy.step(observation), eager.step(observation)))
        count += 1
    return float(worst), count


def _random_observation(random: np.random.Generator) -> Observation:
    static, gripper = (random.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in (200, 84))
    return Observation(static, gripper, np.array([*random.normal(0, 0.3, 3), 0.0, 0.0, 0.0, 1.0]))


def _difference(one: PolicyStep, other: PolicyStep) -> float:
    """The largest difference of any number that two steps decided; NaN if one is not finite."""
    rows = [
        np.array([*step.action.pose, step.action.gripper_probability, *step.deltas]) for step in (one, other)
    ]
    return float(np.abs(rows[0] - rows[1]).max())
