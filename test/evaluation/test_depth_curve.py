"""Which points of the curve are as long as the static network, and what does the plot show of them?"""

import pytest
from PIL import Image

from deer_vla_ros.evaluation.depth_curve import draw, headline


def row(kind, label, length, mmac, half=0.1):
    return {
        "kind": kind,
        "label": label,
        "average_length": length,
        "average_length_ci": [length - half, length + half],
        "llm_gmac_mean": mmac / 1e3,
    }


STATIC = row("static network", "24", 4.5, 9.0)


def test_without_the_static_network_there_is_no_headline():
    assert headline([row("dynamic", "own thresholds", 4.5, 1.0), row("static network", "12", 4.5, 4.5)]) is None


@pytest.mark.parametrize(
    ("length", "is_as_long"),
    [(4.6, True), (4.5, True), (4.37, True), (4.35, False), (4.31, False)],  # 0.1414 is the interval of the difference
)
def test_as_long_is_shorter_by_no_more_than_the_interval_of_the_difference(length, is_as_long):
    found = headline([STATIC, row("dynamic", "own thresholds", length, 1.0)])
    assert (found["dynamic"] is not None) == is_as_long
    assert found["saved"] == (pytest.approx(9.0) if is_as_long else None)


def test_the_cheapest_points_of_equal_length_are_compared():
    rows = [
        STATIC,
        row("dynamic", "0.2", 4.0, 0.8),
        row("dynamic", "0.3", 4.45, 1.2),
        row("dynamic", "0.5", 4.6, 2.0),
        row("fixed exit", "2", 4.1, 0.9),
        row("fixed exit", "6", 4.55, 2.3),
        row("fixed exit", "4", 4.5, 1.6),
    ]
    found = headline(rows)
    assert found["dynamic"]["label"] == "0.3" and found["fixed_exit"]["label"] == "4"
    assert found["saved"] == pytest.approx(7.5)


def test_the_plot_is_written_where_it_was_asked_for(tmp_path):
    path = tmp_path / "made" / "curve.png"
    draw([STATIC, row("dynamic", "own thresholds", 4.45, 1.2)], "title", path)
    with Image.open(path) as picture:
        assert picture.width > 500
