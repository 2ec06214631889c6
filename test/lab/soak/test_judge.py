"""Tests of the soak's judge: it finds each kind of violation, and finds none in a correct node."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deer_vla_ros.lab.soak.geometry import angle_between, twist_between
from deer_vla_ros.lab.soak.heard import SECOND, HeardCommand, HeardPose, Limits
from deer_vla_ros.lab.soak.judge import Judge

HOME = np.array([0.4, 0.0, 0.3])
UPRIGHT = np.array([1.0, 0.0, 0.0, 0.0])
PERIOD_NS = SECOND // 10
BEGIN_NS = 1_000 * SECOND


def turned(radians: float) -> np.ndarray:
    """The quaternion UPRIGHT, turned about the vertical axis."""
    half = radians / 2
    return np.array([math.cos(half), math.sin(half), 0.0, 0.0])


class Node:
    """A correct node whose arm is always at its target.

    Arguments of `step` and `hold` make it violate promises.
    """

    def __init__(self, limits: Limits = Limits()):  # noqa: B008
        self.judge = Judge(limits)
        self.now_ns = BEGIN_NS
        self.target, self.quaternion = HOME, UPRIGHT
        self._pose(HOME)

    def _pose(self, position: np.ndarray) -> None:
        self.judge.pose(HeardPose(self.now_ns, position, self.quaternion))

    def step(self, way=(0.02, 0.0, 0.0), turn: float = 0.0, late_s: float = 0.05, **changes):
        """Commands a motion by `way` from the last target. changes: fields of the command.

        Returns the kinds of violation.
        """
        self.now_ns += PERIOD_NS
        position = self.target + np.array(way)
        quaternion = turned(2 * math.atan2(self.quaternion[1], self.quaternion[0]) + turn)
        command = HeardCommand(
            self.now_ns,
            self.now_ns,
            self.now_ns,
            self.now_ns - round(late_s * SECOND),
            position,
            quaternion,
            np.array(way) * 10,
            twist_between(self.quaternion, quaternion) * 10,
        )
        found = self._give(dataclasses.replace(command, **changes))
        self.target, self.quaternion = position, quaternion
        self._pose(position)
        return found

    def hold(self, **changes):
        self.now_ns += PERIOD_NS
        zero = np.zeros(3)
        times = (self.now_ns, self.now_ns, self.now_ns, self.now_ns)
        found = self._give(
            dataclasses.replace(HeardCommand(*times, self.target, self.quaternion, zero, zero), **changes)
        )
        self._pose(self.target)
        return found

    def _give(self, command: HeardCommand) -> list[str]:
        return [violation.what for violation in self.judge.command(command)]


@pytest.fixture
def node():
    node = Node()
    assert node.step() == []
    return node


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.tuples(*[st.floats(-0.034, 0.034)] * 3),
            st.floats(-0.29, 0.29),
            st.floats(0.0, 0.45),
        ),
        max_size=30,
    )
)
def test_a_node_that_keeps_its_limits_is_never_blamed(steps):
    node = Node()
    for holds, way, turn, late_s in steps:
        late_s = min(late_s, 0.09)  # The stamps of one publisher must not go back.
        inside = np.clip(node.target + np.array(way), [-0.8, -0.8, 0.0], [0.8, 0.8, 1.2]) - node.target
        assert (node.hold() if holds else node.step(tuple(inside), turn, late_s)) == []


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"way": (0.061, 0.0, 0.0)}, "step_m"),
        ({"turn": 0.31}, "step_rad"),
        ({"late_s": 0.51}, "stale"),
        ({"linear": np.array([0.61, 0.0, 0.0])}, "speed_m"),
        ({"angular": np.array([0.0, 0.0, 3.1])}, "speed_rad"),
        ({"linear": np.array([0.0, 0.2, 0.0])}, "twist"),
        ({"position": np.array([0.4, math.nan, 0.3])}, "not_finite"),
        ({"linear": np.array([math.inf, 0.0, 0.0])}, "not_finite"),
        ({"quaternion": UPRIGHT * 1.01}, "quaternion_length"),
        ({"quaternion": -UPRIGHT}, "quaternion_sign"),
        ({"way": (0.0, 0.0, -0.31)}, "box"),
        ({"way": (0.16, 0.0, 0.0)}, "leash_m"),
        ({"turn": 0.61}, "leash_rad"),
        ({"stamp_ns": BEGIN_NS}, "stamp_back"),
    ],
)
def test_each_promise_of_a_motion_is_watched(node, changes, kind):
    assert kind in node.step(**changes)


def test_a_motion_that_arrives_late_is_stale_and_slow_delivery_alone_is_not(node):
    assert node.step(heard_ns=node.now_ns + PERIOD_NS + SECOND // 10) == []
    assert node.step(heard_ns=node.now_ns + PERIOD_NS + SECOND) == ["stale"]


def test_the_first_motion_after_a_hold_begins_at_the_arm(node):
    node.hold()
    assert "start" in node.step(way=(0.07, 0.0, 0.0), linear=np.array([0.1, 0.0, 0.0]))
    node.hold()
    assert node.step() == []


def test_a_held_target_stays_within_the_leash_of_an_arm_that_is_carried_away(node):
    assert node.hold() == []
    for way in (0.1, 0.2):
        node.now_ns += SECOND
        node.judge.pose(HeardPose(node.now_ns + PERIOD_NS, HOME + np.array([way, 0.0, 0.0]), UPRIGHT))
        found = node._give(
            HeardCommand(*[node.now_ns + PERIOD_NS] * 4, node.target, UPRIGHT, np.zeros(3), np.zeros(3))
        )
        assert found == (["leash_m"] if way > 0.17 else [])


def test_an_arm_outside_the_box_may_come_back_and_not_go_further_out():
    node = Node()
    node.target = np.array([0.9, 0.0, 0.3])
    node._pose(node.target)
    assert node.step(way=(-0.02, 0.0, 0.0)) == []
    assert "box" in node.step(way=(0.05, 0.0, 0.0))


def test_small_steps_that_come_too_often_are_too_fast():
    node = Node()
    found = []
    for index in range(40):
        node.now_ns += -PERIOD_NS + PERIOD_NS // 4
        found += node.step(way=(0.05 if index % 2 else -0.05, 0.0, 0.0), late_s=0.0)
    assert set(found) == {"travel_m"}


def test_stamps_may_go_back_with_the_nodes_own_clock_and_between_two_publishers(node):
    jump_ns = 20 * SECOND
    past_ns = node.now_ns + PERIOD_NS - jump_ns
    assert node.hold(stamp_ns=past_ns, clock_ns=past_ns) == []
    assert node.hold(stamp_ns=node.now_ns, publisher=2) == []


def test_a_command_that_was_stamped_before_the_node_heard_of_a_new_time_is_no_reason_to_blame_the_next(node):
    past_ns = node.now_ns + 2 * PERIOD_NS - 20 * SECOND
    assert node.hold(clock_ns=past_ns, clock_just_set=True) == []
    assert node.hold(stamp_ns=past_ns, clock_ns=past_ns) == []
    assert node.hold(stamp_ns=past_ns - SECOND, clock_ns=past_ns + PERIOD_NS) == ["stamp_back"]


def test_after_a_loss_nothing_is_compared_with_what_came_before(node):
    assert node.step(way=(0.0, 0.0, 0.059), turn=0.0) == []
    node.judge.pose(HeardPose(node.now_ns, node.target + np.array([0.0, 0.0, 0.1]), UPRIGHT))
    assert node.step(way=(0.0, 0.0, 0.1), linear=np.array([0.1, 0.0, 0.0]), after_loss=True) == []


def test_a_robot_that_is_gone_is_no_place_to_be_near_to(node):
    node.judge.lose_arm()
    assert node.hold(position=np.array([0.0, 0.5, 0.3])) == []


def test_motions_while_the_arm_had_to_hold_are_found_afterwards(node):
    node.hold()
    begin_ns = node.now_ns
    assert not node.judge.check_held(begin_ns, begin_ns + SECOND)
    node.step()
    assert [each.what for each in node.judge.check_held(begin_ns, begin_ns + SECOND)] == ["motion_in_fault"]
    node.judge.decision(begin_ns + 5, held=True)
    assert not node.judge.check_held(begin_ns, begin_ns + 50, by_decisions=True)
    node.judge.decision(begin_ns + 7, held=False)
    assert node.judge.check_held(begin_ns, begin_ns + 50, by_decisions=True)


@settings(max_examples=50)
@given(st.floats(-3.1, 3.1), st.floats(-3.1, 3.1))
def test_angles_and_rotation_vectors_agree(first, second):
    angle = abs(math.remainder(first - second, 2 * math.pi))
    assert angle_between(turned(first), -turned(second)) == pytest.approx(angle, abs=1e-6)
    assert np.linalg.norm(twist_between(turned(first), turned(second))) == pytest.approx(angle, abs=1e-6)
