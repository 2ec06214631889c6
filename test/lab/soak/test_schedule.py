"""Tests of the order of faults: it is the same for the same seed, and every fault occurs."""

import itertools

import pytest

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.soak.fault import Clearing, Door
from deer_vla_ros.lab.soak.quirks import ARM_QUIRKS, CLOCK_QUIRKS, IMAGE_QUIRKS, POSE_QUIRKS
from deer_vla_ros.lab.soak.schedule import FAULTS, chosen, in_real_time, in_simulated_time

ALL = chosen("all", with_table=False)


def order(seed, count=200):
    return [
        tuple(fault.name for fault in attack) for attack in itertools.islice(in_real_time(ALL, seed), count)
    ]


def test_a_seed_always_gives_the_same_order_and_another_seed_another():
    assert order(3) == order(3)
    assert order(3) != order(4)


def test_every_fault_comes_in_the_first_round_and_those_that_end_the_node_only_there():
    attacks = order(1)
    singles = [attack[0] for attack in attacks if len(attack) == 1]
    wanted = {fault.name for fault in ALL if fault.door is not Door.CLOCK}
    assert set(singles[: len(wanted)]) == wanted
    assert singles.count("node_killed") == 1
    only = itertools.islice(in_real_time(chosen("node_killed", False), 1), 3)
    assert [attack[0].name for attack in only] == ["node_killed"] * 3


def test_two_at_once_come_in_by_different_doors_and_no_call_clears_the_other_one():
    pairs = [attack for attack in itertools.islice(in_real_time(ALL, 1), 1000) if len(attack) == 2]
    assert pairs
    for one, other in pairs:
        assert one.door is not other.door
        assert Door.CALLS not in (one.door, other.door) or Clearing.ASKED not in (
            one.clearing,
            other.clearing,
        )


def test_faults_of_the_clock_come_in_simulated_time_alone():
    names = {attack[0].name for attack in itertools.islice(in_simulated_time(ALL, 1), 10)}
    assert names == set(CLOCK_QUIRKS)
    assert not list(in_simulated_time(chosen("pose_nan", False), 1))


def test_every_quirk_of_the_robot_is_a_fault():
    assert {*IMAGE_QUIRKS, *POSE_QUIRKS, *CLOCK_QUIRKS, *ARM_QUIRKS} <= set(FAULTS)


def test_an_unknown_name_is_refused_with_the_names_that_are_known():
    with pytest.raises(UserError, match="no fault is called nonsense: .*pose_nan"):
        chosen("pose_nan,nonsense", False)
    with pytest.raises(UserError, match="pose_nan are faults of the fake robot"):
        chosen("pose_nan", True)
