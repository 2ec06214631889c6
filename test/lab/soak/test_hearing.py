"""Tests of the observer's input: commands in the order of time from two topics, and times of silence."""

import numpy as np

from deer_vla_ros.lab.soak.bench import Bench
from deer_vla_ros.lab.soak.heard import SECOND
from deer_vla_ros.lab.soak.pairing import PATIENCE_NS, Half, Pairing, Publishers
from deer_vla_ros.lab.soak.silence import Silence

MS = 1_000_000


def half(is_twist: bool, said_ns: int, stamp_ns: int, value: float = 0.0) -> Half:
    second = np.zeros(3) if is_twist else np.array([0.0, 0.0, 0.0, 1.0])
    return Half(is_twist, said_ns, said_ns, stamp_ns, False, 1, np.array([value, 0.0, 0.3]), second)


def test_a_twist_and_a_target_of_one_stamp_are_one_command_whatever_comes_first():
    pairing = Pairing()
    pairing.put(half(False, 2 * MS, 7))
    pairing.put(half(True, 1 * MS, 7))
    (command,) = pairing.take(3 * MS + PATIENCE_NS)
    assert command.said_ns == 2 * MS and command.position is not None and command.linear is not None


def test_a_half_that_stays_alone_is_a_command_after_a_while_and_the_order_is_that_of_time():
    pairing = Pairing()
    pairing.put(half(True, 5 * MS, 2))
    pairing.put(half(False, 6 * MS, 2))
    pairing.put(half(True, 1 * MS, 1))
    assert pairing.take(3 * MS) == []
    first, second = pairing.take(10 * MS + PATIENCE_NS)
    assert (first.said_ns, first.position) == (1 * MS, None)
    assert second.said_ns == 6 * MS


def test_publishers_are_told_apart_by_their_counts_and_a_gap_is_a_loss():
    publishers = Publishers()
    node, lost = publishers.of(1)
    assert not lost
    assert publishers.of(2) == (node, False)
    watchdog, lost = publishers.of(1)
    assert watchdog != node and not lost
    assert publishers.of(3) == (node, False)
    assert publishers.of(2) == (watchdog, False)
    assert publishers.of(9)[1]


def test_silence_is_the_longest_gap_less_what_is_excused():
    silence = Silence()
    silence.heard(0)
    silence.heard(2 * SECOND)
    assert [quiet.seconds for quiet in silence.stretches(2 * SECOND)] == [2.0]
    silence.excuse(SECOND // 2, SECOND)
    assert [quiet.seconds for quiet in silence.stretches(2 * SECOND)] == [0.5, 1.0]
    silence.excuse(SECOND, 3 * SECOND)
    assert [quiet.seconds for quiet in silence.stretches(4 * SECOND)] == [0.5, 1.0]


def test_a_violation_names_the_faults_in_progress_and_a_stalled_observer_is_excused():
    told = []
    bench = Bench(lambda **what: told.append(what))
    now_ns = 1_000 * SECOND
    bench.fault("pose_nan", now_ns - 1)
    bench.half(half(True, now_ns, now_ns))
    bench.half(half(False, now_ns, now_ns, value=float("nan")))
    bench.judge_until(now_ns + 5 * SECOND)
    bench.stalled(now_ns, now_ns + 6 * SECOND)
    summary = bench.summary()
    assert [(each["what"], each["faults"]) for each in summary.violations] == [("not_finite", ["pose_nan"])]
    assert (
        summary.commands_outside_limits == 1
        and summary.stale_commands == 0
        and summary.longest_silence_s == 0.0
    )
    assert told[0] == {"motion": now_ns}
