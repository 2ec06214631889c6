"""Tests of the gripper switch: no flutter, and without hysteresis the rule of the reference."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deer_vla_ros.control.controller import GripperSwitch
from deer_vla_ros.inference.types import Action

probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=30)


def decisions(switch: GripperSwitch, probabilities: list[float]) -> list[bool]:
    return [switch.decide(Action(np.zeros(6, np.float32), probability)) for probability in probabilities]


@given(probabilities)
def test_without_hysteresis_it_opens_above_one_half(given):
    assert decisions(GripperSwitch(0.0), given) == [probability > 0.5 for probability in given]


@given(probabilities, st.floats(0.01, 0.4))
def test_it_changes_only_where_the_probability_is_clear(given, hysteresis):
    decided = decisions(GripperSwitch(hysteresis), given)
    for before, after, probability in zip(decided, decided[1:], given[1:]):
        if before != after:
            assert abs(probability - 0.5) >= hysteresis


def test_a_flutter_around_one_half_keeps_the_fingers_still():
    assert decisions(GripperSwitch(0.1), [0.9, 0.45, 0.55, 0.41, 0.39, 0.55, 0.61]) == [
        True,
        True,
        True,
        True,
        False,
        False,
        True,
    ]
