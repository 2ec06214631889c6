"""Tests of the latency model: predictions for exits that were never taken, and after a change of speed."""

import math

import numpy as np
import pytest

from deer_vla_ros.budget.cost import cost_table
from deer_vla_ros.budget.latency import WINDOW, LatencyModel
from deer_vla_ros.inference.types import Action, PolicyStep, StageTimes, StopReason
from deer_vla_ros.model.config import openflamingo_9b

LAYERS = cost_table(openflamingo_9b(), 16).layers
EXITS = openflamingo_9b().exits


def truth(layers_run: int, probes: int, slowness: float = 1.0) -> StageTimes:
    """Stage times in proportion to the cost of the layers."""
    return StageTimes(
        1.0 * slowness, 9.0 * slowness, 8.0 * sum(LAYERS[:layers_run]) * slowness, 0.5 * probes * slowness
    )


def step(index: int, slowness: float = 1.0) -> PolicyStep:
    layers_run, probes = EXITS[index] + 1, index + 2
    action, nan = Action(np.zeros(6, np.float32), 0.5), (math.nan,)
    return PolicyStep(
        action,
        EXITS[index : index + 1],
        0,
        StopReason.DEEPEST,
        nan,
        nan,
        probes,
        16,
        truth(layers_run, probes, slowness),
    )


def test_deep_exits_are_predicted_from_shallow_steps_also_where_layers_differ():
    model = LatencyModel(LAYERS)
    for _ in range(50):
        model.observe(step(0))
    for index, layer in enumerate(EXITS):
        expected = truth(layer + 1, index + 2).total
        assert model.expected(layer + 1, index + 2) == pytest.approx(expected)
        assert model.high(layer + 1, index + 2) == pytest.approx(expected)


def test_one_slow_step_in_fifty_is_within_the_high_quantile():
    model = LatencyModel(LAYERS)
    for number in range(WINDOW):
        model.observe(step(0, 3.0 if number % 50 == 0 else 1.0))
    assert model.high(2, 2) == pytest.approx(truth(2, 2, 3.0).total)
    assert model.expected(2, 2) < 1.1 * truth(2, 2).total


def test_a_machine_that_becomes_slower_is_never_predicted_to_be_slower_than_it_is():
    model = LatencyModel(LAYERS)
    for _ in range(WINDOW):
        model.observe(step(3))
    slow = truth(16, 9, 2.0).total
    for _ in range(2 * WINDOW):
        model.observe(step(3, 2.0))
        assert model.high(16, 9) <= slow * (1 + 1e-9)
    assert model.expected(16, 9) == pytest.approx(slow)
