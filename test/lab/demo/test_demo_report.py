"""Tests that the report of a demo follows from its steps."""

import json
import math

import numpy as np
import pytest
from builtin_interfaces.msg import Time
from deer_vla_ros.msg import PolicyStep
from PIL import Image
from sensor_msgs.msg import Image as ImageMessage

from deer_vla_ros.files import whole_file
from deer_vla_ros.lab.demo import demo_report as report
from deer_vla_ros.lab.demo.demo_picture import draw, whole_bands

EXITS = [1, 3, 5]
PERIOD_NS = 100_000_000


def step(number, exit_index=0, **fields):
    """A `~/step` message of a network with three exits and six layers of 0.5 GMAC; one every 100 ms."""
    nanoseconds = 1_700_000_000 * 10**9 + number * PERIOD_NS
    layers = EXITS[exit_index] + 1
    message = PolicyStep(
        step=number,
        exit_index=exit_index,
        layers_run=layers,
        exit_layers=EXITS,
        instruction="lift the red block",
    )
    message.header.stamp = Time(sec=nanoseconds // 10**9, nanosec=nanoseconds % 10**9)
    message.deltas = [0.01 if index <= exit_index else math.nan for index in range(3)]
    message.thresholds = [0.02, 0.02, math.inf]
    message.language_gmac, message.language_gmac_full = layers * 0.5, 3.0
    message.total_ms = float(number)
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def rows(*messages):
    return [report.row_of(message) for message in messages]


def summary_of(*messages, before=None, after=None, told=None):
    return report.summarise(rows(*messages), before or {}, after or {}, told or [])


def test_a_row_has_every_field_of_the_message_and_is_valid_json():
    message = step(3)
    row = json.loads(json.dumps(report.row_of(message), allow_nan=False))
    assert row.keys() == PolicyStep.get_fields_and_field_types().keys()
    assert row["header"]["stamp"] == {"sec": 1_700_000_000, "nanosec": 300_000_000}
    assert row["deltas"] == [pytest.approx(0.01), None, None]
    assert row["thresholds"][-1] is None
    assert row["action"] == [0.0] * 6


def test_exits_are_counted_by_layer_and_cost_is_a_share_of_full_depth():
    summary = summary_of(step(0, 2), step(1, 0), step(2, 0), step(3, 1))
    assert summary["exits"] == {"1": 2, "3": 1, "5": 1}
    assert sum(summary["exits"].values()) == summary["steps"] == 4
    assert "50.0%" in summary["exits_readable"]["exit 1 of 3, after layer 1 (2 of 6 layers run)"]
    assert summary["macs_fraction"] == pytest.approx((6 + 2 + 2 + 4) / 24, abs=1e-4)
    assert summary["mean_layers_run"] == 3.5


def test_the_rate_comes_from_the_stamps():
    assert summary_of(*(step(number) for number in range(11)))["rate_hz"] == pytest.approx(10)
    assert summary_of(*(step(2 * number) for number in range(11)))["rate_hz"] == pytest.approx(5)
    assert summary_of(step(0))["rate_hz"] == 0


def test_a_lost_step_is_noticed_in_the_middle_and_at_the_beginning():
    assert summary_of(step(0), step(1), step(2))["lost_steps"] == 0
    assert summary_of(step(0), step(1), step(4))["lost_steps"] == 2
    assert summary_of(step(2), step(3))["lost_steps"] == 2


def test_every_stage_has_its_median_and_95th_percentile():
    latency = summary_of(*(step(number) for number in range(101)))["latency_ms"]
    assert latency.keys() == {"preprocess", "vision", "language", "head", "total", "stamp_to_publish"}
    assert latency["total"] == {"p50": 50, "p95": 95}


def test_holds_and_drops_of_the_start_up_do_not_count():
    before = {"holds.NO_INSTRUCTION": "1", "holds.NO_POSE": "1", "dropped": "7"}
    after = {
        "holds.NO_INSTRUCTION": "1",
        "holds.NO_POSE": "1",
        "holds.STATIC_STALE": "2",
        "dropped": "9",
        "steps": "40",
    }
    summary = summary_of(step(0), before=before, after=after)
    assert summary["holds"] == {"STATIC_STALE": 2}
    assert summary["dropped"] == 2


def test_verdicts_and_stops_have_names():
    summary = summary_of(
        step(0, stop_reason=PolicyStep.STOP_DEEPEST, verdict=PolicyStep.VERDICT_LIMITED, reasons=["LEASH"]),
        step(1, stop_reason=PolicyStep.STOP_AGREED, verdict=PolicyStep.VERDICT_ACCEPTED),
        step(2, stop_reason=PolicyStep.STOP_STAGE, verdict=PolicyStep.VERDICT_HELD, reasons=["NOT_FINITE"]),
    )
    assert summary["stops"] == {"agreed": 1, "deepest": 1, "stage": 1}
    assert summary["verdicts"] == {"accepted": 1, "limited": 1, "held": 1}
    assert summary["limits"] == {"LEASH": 1, "NOT_FINITE": 1}


def test_too_few_steps_are_a_failure_with_its_reason():
    enough = rows(*(step(number) for number in range(36)))
    assert report.verdict_on(enough, seconds=4) == ""
    assert "35 steps in 4 s, at least 36" in report.verdict_on(enough[:35], seconds=4)


def test_a_result_that_cannot_be_written_whole_leaves_what_was_there(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON compliant"):
        report.write_summary({"steps": 3, "rate_hz": math.nan}, path)
    with pytest.raises(RuntimeError), whole_file(path) as scratch:
        scratch.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["summary.json"]


def test_steps_are_one_json_object_a_line(tmp_path):
    report.write_steps(rows(step(0), step(1)), tmp_path / "steps.jsonl")
    lines = (tmp_path / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]


def test_an_image_message_with_padded_rows_is_read_without_the_padding():
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    padded = np.concatenate([pixels.reshape(2, 9), np.full((2, 3), 255, np.uint8)], axis=1)
    message = ImageMessage(height=2, width=3, encoding="rgb8", step=12, data=padded.tobytes())
    assert (report.image_array(message) == pixels).all()
    message.encoding = "mono8"
    with pytest.raises(ValueError, match="mono8"):
        report.image_array(message)


@pytest.mark.parametrize("count", [0, 1, 6, 8])
def test_the_picture_is_drawn_for_any_number_of_moments(count, tmp_path):
    recorded = rows(*(step(number, number % 3) for number in range(20)))
    red, blue = np.full((200, 200, 3), (255, 0, 0), np.uint8), np.full((84, 84, 3), (0, 0, 255), np.uint8)
    moments = [report.PictureMoment(row, red, blue) for row in recorded[:count]]
    draw(recorded, moments, {"weights": "none"}, tmp_path / "cameras.png")
    picture = np.asarray(Image.open(tmp_path / "cameras.png").convert("RGB"))
    for colour in ((255, 0, 0), (0, 0, 255)):
        seen = (picture == colour).all(axis=2).sum()
        assert (seen > 10_000 * count) if count else seen == 0


@pytest.mark.parametrize(
    ("moments", "shown"), [(0, 0), (1, 1), (5, 5), (6, 6), (7, 6), (11, 6), (12, 12), (13, 12)]
)
def test_no_band_of_the_picture_is_left_half_empty(moments, shown):
    found = whole_bands(list(range(moments)))
    assert len(set(found)) == shown and found == sorted(found)
    assert not found or (found[0], found[-1]) == (0, moments - 1)
