"""Tests of the latency benchmark with and without enough time, by a clock that every reading moves on."""

import itertools
from types import SimpleNamespace

import pytest
from small_model import INFO, SMALL, small_model, small_tokenizer

from deer_vla_ros.budget.latency import WINDOW
from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.benchmarks import latency_benchmark
from deer_vla_ros.lab.benchmarks.latency_benchmark import ENOUGH, WARM_UP, measure
from deer_vla_ros.model.checkpoint import Checkpoint, save

UNTIMED = WARM_UP * len(SMALL.exits)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    save(folder, Checkpoint(INFO, small_model(), small_tokenizer()), "made by a test")
    return folder


@pytest.fixture
def measured(folder, monkeypatch):
    """The table of so many readings of the clock, and the newest progress."""

    def measured(seconds: float):
        clock, told = itertools.count(), []
        fake = SimpleNamespace(monotonic=lambda: float(next(clock)))
        monkeypatch.setattr(latency_benchmark, "time", fake)
        table = measure(folder, "cpu", "float32", seconds, lambda *progress: told.append(progress))
        return table, told

    return measured


def test_with_enough_time_the_table_has_a_whole_window(measured):
    table, told = measured(1e6)
    assert len(table.parts) == WINDOW and "time was over" not in table.about
    assert told == [(steps, UNTIMED + WINDOW) for steps in range(UNTIMED + WINDOW + 1)]


def test_when_the_time_is_over_the_table_is_made_of_the_steps_so_far_and_says_so(measured):
    table, told = measured(100.0)
    assert ENOUGH < len(table.parts) < WINDOW
    assert f"{len(table.parts)} of {WINDOW} steps: the time was over" in table.about
    assert told[-1][0] == told[-1][1]


def test_too_few_steps_are_refused_with_the_remedy(measured):
    with pytest.raises(
        UserError, match=f"steps were timed in 0.333.* {ENOUGH} are needed: give more --minutes"
    ):
        measured(20.0)
