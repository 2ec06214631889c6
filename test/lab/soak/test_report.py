"""Tests of the soak's report: its figures follow from the findings, and it names every missed goal."""

import json

import pytest

from deer_vla_ros.lab.soak.logs import unhandled_lines
from deer_vla_ros.lab.soak.sampling import Sample, sample
from deer_vla_ros.lab.soak.soak_report import (
    SoakFindings,
    by_minute,
    growth_percent_per_hour,
    longest_lived,
    missed,
    report,
    summary_lines,
)
from deer_vla_ros.lab.soak.strike import StrikeOutcome

GOOD = {
    "commands": 100,
    "motions": 60,
    "commands_outside_limits": 0,
    "stale_commands": 0,
    "longest_silence_s": 0.41,
    "stalls": 0,
    "longest_stall_s": 0.0,
    "violations": [],
}


def outcome(name="pose_nan", recovered_s=0.1, restarted=False):
    return StrikeOutcome((name,), 1.0, recovered_s, False, restarted, ())


def test_a_good_run_misses_no_goal_and_restarts_are_told_apart():
    outcomes = [outcome(), outcome(recovered_s=0.3), outcome("node_killed", 8.0, True)]
    figures = report(SoakFindings(1, 2.0, outcomes, GOOD))
    assert missed(figures) == []
    assert figures["faults"] == {"node_killed": 1, "pose_nan": 2}
    assert figures["recoveries"] == {"expected": 3, "seen": 3, "missing": []}
    assert (figures["time_to_recover_p50"], figures["restart_p50"]) == (0.2, 8.0)
    json.dumps(figures, allow_nan=False)
    assert summary_lines(figures)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"commands_outside_limits": 2}, "2 commands outside their limits"),
        ({"stale_commands": 1}, "1 stale commands"),
        ({"longest_silence_s": 0.6}, "a silence of 0.6 s"),
        ({"commands": 0}, "no command was heard"),
    ],
)
def test_each_goal_that_is_missed_is_named(changes, told):
    (line,) = missed(report(SoakFindings(1, 2.0, [outcome()], GOOD | changes)))
    assert told in line


def test_memory_is_told_by_the_minute():
    life = [Sample(10.0 + at_s, 7, 1024 * kib, 1, 1) for at_s, kib in ((0, 1), (59, 2), (61, 3), (130, 4))]
    assert by_minute(life) == [2.0, 3.0, 4.0] and by_minute([]) == []


def test_recoveries_that_take_too_long_are_missed_goals():
    figures = report(SoakFindings(1, 2.0, [outcome(recovered_s=4.0)], GOOD))
    assert missed(figures) == [
        "a median recovery of 4 s where 1 s are allowed",
        "a 95th percentile of the recoveries of 4 s where 3 s are allowed",
    ]


def test_memory_that_grows_is_a_missed_goal():
    figures = report(SoakFindings(1, 60.0, [outcome()], GOOD)) | {"memory_growth_percent_per_hour": 1.5}
    assert missed(figures) == ["the node's memory grew per hour by 1.5% where 1% are allowed"]


def test_a_recovery_that_did_not_come_and_an_exception_are_missed_goals():
    exceptions = ["node.log: KeyError: 1"]
    figures = report(SoakFindings(1, 2.0, [outcome(recovered_s=None)], GOOD, exceptions=exceptions))
    assert missed(figures) == ["1 unhandled exceptions", "0 of 1 recoveries"]


def test_numbers_that_json_does_not_know_are_null():
    violation = {
        "at_ns": 1,
        "what": "not_finite",
        "value": float("nan"),
        "limit": 0.0,
        "message": "",
        "faults": [],
    }
    figures = report(SoakFindings(1, 2.0, [], GOOD | {"violations": [violation]}))
    assert json.loads(json.dumps(figures, allow_nan=False))["violations"][0]["value"] is None


def life(pid, begin, seconds, kib_per_s=0.0):
    return [Sample(begin + at, pid, round(1e6 + kib_per_s * at), 20, 30) for at in range(seconds)]


def test_memory_is_judged_on_the_process_that_lived_longest_after_its_first_minute():
    samples = life(1, 0, 100) + life(2, 100, 1000, kib_per_s=1.0)
    longest = longest_lived(samples)
    assert {each.pid for each in longest} == {2}
    growth, reason = growth_percent_per_hour(longest)
    assert growth == pytest.approx(0.36, rel=0.01) and not reason


def test_a_life_that_is_too_short_gives_no_figure_and_says_why():
    growth, reason = growth_percent_per_hour(life(1, 0, 100))
    assert growth is None and "240 s are needed" in reason


def test_one_great_outlier_does_not_move_the_slope():
    samples = life(1, 0, 1000)
    samples[500] = Sample(500, 1, 10_000_000, 20, 30)
    assert growth_percent_per_hour(samples)[0] == 0.0


def test_this_process_can_be_sampled_and_one_that_is_gone_cannot():
    import os

    found = sample(os.getpid())
    assert found.rss_kib > 1000 and found.threads >= 1 and found.fds >= 3
    assert sample(2**22 + 1) is None


def test_tracebacks_count_unless_soak_raised_the_error_itself():
    ours = "Traceback (most recent call last)\n  File x\nRuntimeError: soak did this on purpose\n"
    theirs = "Traceback (most recent call last):\n  File x\n    y\nKeyError: 'stamp'\nmore\n"
    assert unhandled_lines(ours) == []
    assert unhandled_lines(ours + theirs) == ["KeyError: 'stamp'"]
    assert unhandled_lines("terminate called after throwing\n") == ["terminate called after throwing"]
