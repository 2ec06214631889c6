"""Tests of the depth curve: which points are as long as the static network, and what the plot shows."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from deer_vla_ros.lab.benchmarks import depth_curve
from deer_vla_ros.lab.benchmarks.depth_curve import EQUAL_WITHIN, Point, draw, headline, measure
from deer_vla_ros.lab.scoring import table_benchmark
from deer_vla_ros.lab.scoring.chain_report import mean_interval
from deer_vla_ros.lab.scoring.network_driver import ExitChoice
from deer_vla_ros.model.checkpoint import folder_of


def row(kind, label, lengths, mmac):
    return {
        "kind": kind,
        "label": label,
        "average_length": float(np.mean(lengths)),
        "average_length_ci": list(mean_interval(lengths)),
        "lengths": list(lengths),
        "llm_gmac_mean": mmac / 1e3,
    }


def longer(count, by):
    """The lengths of the static network's chains, with `count` of them longer by `by`."""
    return [length + by if i < count else length for i, length in enumerate(LENGTHS)]


LENGTHS = [1, 2, 3, 4] * 125
STATIC = row("static network", "24", LENGTHS, 9.0)


def test_without_the_static_network_there_is_no_headline():
    assert not headline(
        [row("dynamic", "own thresholds", LENGTHS, 1.0), row("static network", "12", LENGTHS, 4.5)]
    )


@pytest.mark.parametrize(
    ("lengths", "is_as_long"),
    [
        (longer(50, 1), True),
        (LENGTHS, True),
        (longer(3, -1), True),
        (longer(6, -1), False),
        (longer(50, -1), False),
    ],
)
def test_as_long_is_told_chain_by_chain(lengths, is_as_long):
    """Six of 500 chains lose one task and none wins one: this is no chance, for any spread of lengths."""
    (found,) = headline([STATIC, row("dynamic", "own thresholds", lengths, 1.0)])
    assert (found.dynamic is not None) == is_as_long
    assert found.saved == (pytest.approx(9.0) if is_as_long else pytest.approx(math.nan, nan_ok=True))


def test_too_few_chains_to_tell_do_not_make_two_networks_equal():
    lengths = np.random.default_rng(0).permutation(LENGTHS)[:40]
    few, others = row("static network", "24", lengths, 9.0), row("dynamic", "0.3", np.roll(lengths, 1), 1.0)
    low, high = mean_interval(np.subtract(others["lengths"], few["lengths"]))
    assert low < -EQUAL_WITHIN < 0 < high
    assert headline([few, others])[0].dynamic is None


def test_each_is_compared_with_the_cheapest_dynamic_point_of_its_own_length():
    """The best fixed exit is longer than the static network, so that one point cannot be as long as both."""
    rows = [
        STATIC,
        row("dynamic", "0.2", longer(100, -1), 0.8),
        row("dynamic", "0.3", longer(2, -1), 1.2),
        row("dynamic", "0.5", longer(50, 1), 2.0),
        row("fixed exit", "2", longer(80, -1), 0.9),
        row("fixed exit", "6", longer(60, 1), 2.3),
        row("fixed exit", "4", longer(40, 1), 1.6),
    ]
    static, fixed = headline(rows)
    low, high = static.difference_ci
    assert static.difference == -0.004 and low < -0.004 < high
    assert (static.name, static.dynamic["label"], static.saved) == (
        "static network 24",
        "0.3",
        pytest.approx(7.5),
    )
    assert (fixed.name, fixed.dynamic["label"], fixed.saved) == ("fixed exit 4", "0.5", pytest.approx(0.8))


def test_the_plot_is_written_where_it_was_asked_for(tmp_path):
    path = tmp_path / "made" / "curve.png"
    draw([STATIC, row("dynamic", "own thresholds", LENGTHS, 1.2)], "title", path)
    with Image.open(path) as picture:
        assert picture.width > 500


def test_a_point_is_measured_again_when_anything_that_it_depends_on_has_changed(tmp_path, monkeypatch):
    """A point takes minutes, so that the reports of `evaluate` are made up here.

    The test checks when they are asked for.
    """
    measured = []

    def report_of(asked, path):
        measured.append(asked.choice.exit_layer)
        figures = {
            name: 1.0
            for name in ("llm_gmac_mean", "llm_gmac_full", "llm_gmac_static", "average_length", "saved")
        }
        lists = {
            name: [1]
            for name in (
                "average_length_ci",
                "lengths",
                "success_by_position",
                "exit_shares",
                "steps_by_time",
            )
        }
        path.write_text(json.dumps({**figures, **lists, **asked.identity()}))

    def at(layer):
        point = Point("fixed exit", "deep", folder_of(""), ExitChoice(exit_layer=layer))
        return measure([point], 8, 0, None, tmp_path, lambda line: None)

    monkeypatch.setattr(depth_curve, "report_text", lambda report: "")
    monkeypatch.setattr(depth_curve, "report_of", report_of)
    assert at(3) == at(3) and measured == [3]
    at(5)
    assert measured == [3, 5]
    monkeypatch.setattr(table_benchmark, "tasks_sha256", lambda: "of other tasks")
    at(5)
    assert measured == [3, 5, 5]
