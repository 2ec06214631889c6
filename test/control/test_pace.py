"""Tests of the pace: the mean never exceeds the rate, and jitter at the rate loses no frame."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deer_vla_ros.control.pace import Pace

MS = 1_000_000


def taken(pace: Pace, stamps: list[int]) -> list[int]:
    """The stamps that the pace admits."""
    result = []
    for stamp in stamps:
        if pace.admits(stamp):
            pace.take(stamp)
            result.append(stamp)
    return result


@given(st.lists(st.integers(0, 200), min_size=2, max_size=200))
def test_the_mean_never_exceeds_the_rate(gaps_ms):
    stamps = [sum(gaps_ms[: i + 1]) * MS for i in range(len(gaps_ms))]
    steps = taken(Pace(10.0), stamps)
    assert len(steps) <= (stamps[-1] - stamps[0]) / (100 * MS) + 1 + 0.2


@given(st.lists(st.integers(-9, 9), min_size=2, max_size=100))
def test_a_jittering_camera_at_the_rate_loses_no_frame(jitter_ms):
    stamps = [(100 * i + jitter) * MS for i, jitter in enumerate(jitter_ms)]
    assert taken(Pace(10.0), stamps) == stamps


@pytest.mark.parametrize(
    ("camera_hz", "expected_hz"),
    [(5, 5), (10, 10), (12, 10), (12.5, 10), (15, 10), (25, 10), (30, 10), (60, 10)],
)
def test_faster_cameras_are_stepped_at_no_more_than_the_rate(camera_hz, expected_hz):
    stamps = [round(i / camera_hz * 1e9) for i in range(round(60 * camera_hz))]
    steps = taken(Pace(10.0), stamps)
    assert 0.65 * expected_hz <= len(steps) / 60 <= expected_hz * 1.01


def test_two_publishers_on_one_topic_do_not_double_the_rate():
    stamps = [stamp for i in range(100) for stamp in (100 * i * MS, (100 * i - 5) * MS)]
    assert len(taken(Pace(10.0), stamps)) == 100
