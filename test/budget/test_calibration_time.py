"""Tests of a calibration with a time limit, by a clock that goes on by a second whenever it is read."""

import itertools
from types import SimpleNamespace

import pytest
from small_model import INFO, INSTRUCTION, SMALL, observations, small_model, small_tokenizer

from deer_vla_ros.budget import calibration
from deer_vla_ros.budget.calibration import Episode, measure
from deer_vla_ros.errors import UserError
from deer_vla_ros.model.checkpoint import Checkpoint

STEPS = 125


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(INFO, small_model(), small_tokenizer())


@pytest.fixture
def measured(checkpoint, monkeypatch):
    """Measures three episodes of STEPS steps within so many readings of the clock."""

    def measured(seconds: float) -> calibration.Calibration:
        clock = itertools.count()
        monkeypatch.setattr(calibration, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
        episodes = (Episode(INSTRUCTION, iter(observations(STEPS, seed))) for seed in range(3))
        return measure(checkpoint, episodes, {"source": "made up"}, seconds=seconds)

    return measured


def test_with_enough_time_all_steps_count_and_nothing_tells_of_a_limit(measured):
    found = measured(1e6)
    assert len(found.deltas) == 3 * STEPS
    assert not {"time limit", "closed loop"} & found.provenance.keys()


def test_when_half_of_the_time_is_over_what_was_measured_is_the_result_and_says_so(measured):
    found = measured(480.0)
    assert found.episodes.tolist() == [0] * STEPS + [1] * (240 - STEPS)
    assert found.provenance["samples"] == "240"
    assert found.provenance["time limit"] == "8 minutes, over after 240 steps"
    closed_loop, unit = found.provenance["closed loop"].split()
    assert 0 < int(closed_loop) < 240 / len(SMALL.exits) and unit == "steps", "a third of the other half each"
    for count, (levels, shares) in found.paths.items():
        assert shares.shape == (len(levels), count) and shares.sum(1) == pytest.approx(1.0)


def test_too_few_steps_are_refused_with_the_time_that_would_do(measured):
    with pytest.raises(
        UserError, match="100 steps were measured in half of 3.33333 minutes, and 200 are .* 7 min"
    ):
        measured(200.0)
