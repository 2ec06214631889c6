"""Tests of the exit rule: deltas, thresholds, and where a step stops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.exit_rule import DELTAS, ExitRule, compared

NUMPY_DELTAS = {
    "l2": lambda a, b: np.sqrt(np.mean((a - b) ** 2)),
    "mean": lambda a, b: np.mean(np.abs(a - b)),
    "max": lambda a, b: np.max(np.abs(a - b)),
    "cosine": lambda a, b: 1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b)),
    "feature": lambda a, b: 1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b)),
}

deltas_of_three_exits = st.tuples(*[st.floats(0, 2, width=32) | st.just(math.nan)] * 3)
three_thresholds = st.tuples(*[st.floats(-1, 2, width=32)] * 3)


def stops_at(rule: ExitRule, deltas: tuple[float, ...]) -> int:
    """The index of the first exit that agrees; the deepest where none does."""
    return next((i for i, delta in enumerate(deltas) if rule.agrees(i, delta)), len(deltas) - 1)


def test_every_kind_of_delta_is_checked_here():
    assert NUMPY_DELTAS.keys() == DELTAS.keys()


@pytest.mark.parametrize("kind", DELTAS)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_delta_is_what_its_formula_says(kind, seed):
    poses = np.random.default_rng(seed).uniform(-1, 1, (2, 6)).astype(np.float32)
    measured = DELTAS[kind](*torch.from_numpy(poses)).item()
    assert measured == pytest.approx(NUMPY_DELTAS[kind](*poses.astype(np.float64)), abs=1e-5)


@pytest.mark.parametrize("kind", DELTAS)
def test_two_equal_poses_have_no_delta(kind):
    pose = torch.tensor([0.1, -0.2, 0.3, -0.4, 0.5, -0.6])
    assert DELTAS[kind](pose, pose.clone()).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", DELTAS)
def test_poses_in_half_precision_are_compared_in_full(kind):
    poses = torch.tensor([[0.1, -0.2, 0.3, -0.4, 0.5, -0.6], [0.11, -0.2, 0.3, -0.4, 0.5, -0.59]]).half()
    measured = DELTAS[kind](*(compared(kind, pose, pose) for pose in poses)).item()
    assert measured == pytest.approx(NUMPY_DELTAS[kind](*poses.numpy().astype(np.float64)), abs=1e-6)


def test_a_delta_equal_to_its_threshold_agrees():
    rule = ExitRule((1, 3), (0.25, 0.0))
    assert rule.agrees(0, 0.25)
    assert not rule.agrees(0, math.nextafter(0.25, 1))


@given(threshold=st.floats(-1, 1e8))
def test_nan_never_agrees(threshold):
    assert not ExitRule((1,), (threshold,)).agrees(0, math.nan)


@given(
    deltas=deltas_of_three_exits,
    thresholds=three_thresholds,
    raises=st.tuples(*[st.floats(0, 1, width=32)] * 3),
)
def test_larger_thresholds_never_exit_later(deltas, thresholds, raises):
    strict = ExitRule((1, 3, 5), thresholds)
    generous = ExitRule((1, 3, 5), tuple(threshold + more for threshold, more in zip(thresholds, raises)))
    assert stops_at(generous, deltas) <= stops_at(strict, deltas)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"exits": (), "thresholds": ()}, "give at least one"),
        ({"exits": (3, 1), "thresholds": (1.0, 1.0)}, "ascending"),
        ({"exits": (1, 1), "thresholds": (1.0, 1.0)}, "none twice"),
        ({"exits": (1, 3), "thresholds": (1.0,)}, "1 thresholds for 2 exits"),
        ({"exits": (1,), "thresholds": (math.nan,)}, "contain NaN"),
        (
            {"exits": (1,), "thresholds": (1.0,), "delta": "l3"},
            "unknown delta 'l3': use one of l2, mean, max, cosine",
        ),
        ({"exits": (1,), "thresholds": (1.0,), "steps_per_stage": 0}, "steps_per_stage is 0"),
    ],
)
def test_a_bad_rule_is_refused_by_name(arguments, complaint):
    with pytest.raises(UserError, match=complaint):
        ExitRule(**arguments)


def test_a_stage_probes_on_its_first_step_only():
    rule = ExitRule((1,), (0.0,), steps_per_stage=3)
    assert [rule.probes(step) for step in range(7)] == [True, False, False, True, False, False, True]
    assert all(ExitRule((1,), (0.0,)).probes(step) for step in range(5))


def test_a_depth_is_kept_as_near_as_the_exits_allow():
    rule = ExitRule((1, 3, 5), (0.0,) * 3)
    assert [rule.exits[rule.index_not_shallower(layer)] for layer in (-1, 1, 2, 3, 5, 9)] == [
        1,
        1,
        3,
        3,
        5,
        5,
    ]
