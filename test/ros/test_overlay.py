"""Tests of the overlay and the Foxglove layout.

The overlay draws any step and says why the arm holds. The layout names only topics that exist.
"""

import json
import math
import re
import time

import numpy as np
import PIL.Image
import pytest
from diagnostic_msgs.msg import DiagnosticArray
from paths import ROOT
from sensor_msgs.msg import Image
from std_msgs.msg import String

from deer_vla_ros import msg
from deer_vla_ros.budget.types import StepCost
from deer_vla_ros.control.types import Decision, HoldReason, Limit
from deer_vla_ros.inference.types import Action, PolicyStep, StageTimes, StopReason
from deer_vla_ros.ros import overlay
from deer_vla_ros.ros.messages import image_message

LAYOUT = json.loads((ROOT / "config" / "foxglove_layout.json").read_text())
TOPICS = {
    "/camera/static/image_raw": Image,
    "/camera/gripper/image_raw": Image,
    "/instruction": String,
    "/deer_vla/overlay": Image,
    "/deer_vla/step": msg.PolicyStep,
    "/deer_vla/budget": msg.BudgetStatus,
    "/diagnostics": DiagnosticArray,
}
"""The topics in design.md, for a node without a namespace."""
FRAME = np.full((200, 200, 3), 128, np.uint8)


def decision(deltas, thresholds, exit_index=0, stop=StopReason.AGREED, limits=()):
    exits = tuple(range(1, 2 * len(deltas), 2))
    action = Action(np.zeros(6, np.float32), 0.7)
    policy = PolicyStep(
        action, exits, exit_index, stop, deltas, thresholds, 2, 9, StageTimes(1.0, 12.0, 20.0, 0.5)
    )
    return Decision(7, 0, 7, "lift", policy, StepCost(1.8, 7.3, 9.9), 1, 0, 0, 0, 0, 0, limits, ())


USUAL = decision((0.05, 0.01, math.nan), (0.02, 0.02, 1e8), 1)


def drawn(static=FRAME, gripper=FRAME, instruction="lift the red block", decision=USUAL, holds=()):
    image = overlay.draw(static, gripper, instruction, decision, holds)
    assert image.shape == (480, 640, 3) and image.dtype == np.uint8
    return image


def share_of(image, colour):
    """The share of the image that has exactly this colour, given as #rrggbb."""
    return (image == np.frombuffer(bytes.fromhex(colour[1:]), np.uint8)).all(axis=-1).mean()


@pytest.mark.parametrize("size", [(0, 0), (1, 1), (84, 84), (480, 640), (1080, 1920), (1, 3000), (3000, 1)])
def test_frames_of_any_size_are_drawn(size):
    frame = np.zeros((*size, 3), np.uint8)
    drawn(static=frame, gripper=frame)


def test_a_frame_that_is_not_contiguous_is_drawn_the_same():
    frame = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    assert (drawn(static=np.asfortranarray(frame)[..., ::-1][..., ::-1]) == drawn(static=frame)).all()


@pytest.mark.parametrize(
    "text", ["", "  \n", "x" * 100_000, "赤いブロック", "Würfel\x00\ud800\n", "\u202eabc", "🤖" * 99]
)
def test_every_instruction_is_drawn_within_one_line(text):
    below = overlay.HEADER
    assert (drawn(instruction=text)[below:] == drawn()[below:]).all()


def test_a_long_instruction_is_cut_with_an_ellipsis_that_still_fits():
    cut = overlay._fit("lift the blue block " * 50, 22)
    assert cut.endswith("…") and 40 < len(cut) < 80
    assert overlay._font(22).getlength(cut) <= overlay.WIDTH - 2 * overlay.PAD


@pytest.mark.parametrize("count", [1, 2, 6, 16])
@pytest.mark.parametrize("delta", [math.nan, math.inf, 0.0, 1e-12, 0.5, 1e30])
@pytest.mark.parametrize("threshold", [math.nan, math.inf, -math.inf, 1e8, -1e8, 0.0, 1e-320, 0.5])
def test_every_ladder_is_drawn(count, delta, threshold):
    drawn(decision=decision((delta,) * count, (threshold,) * count, count - 1, StopReason.DEEPEST))


def test_a_delta_above_its_threshold_has_another_colour_than_one_that_is_not():
    above, agreed = drawn(decision=decision((0.3,), (0.2,))), drawn(decision=decision((0.1,), (0.2,)))
    assert share_of(above, overlay.ABOVE) > 0 == share_of(agreed, overlay.ABOVE)


def test_an_exit_that_was_not_probed_has_no_bar():
    unprobed = drawn(decision=decision((math.nan, math.nan), (0.2, 0.2), 1, StopReason.STAGE))
    assert share_of(unprobed, overlay.ABOVE) == 0
    assert share_of(unprobed, overlay.TAKEN) > 0, "the exit taken is still marked"


@pytest.mark.parametrize("reason", HoldReason)
def test_a_hold_is_seen_from_afar_and_its_reason_fits(reason):
    image = drawn(holds=(reason,))
    assert share_of(image, overlay.HOLDING) > 0.07
    assert overlay._fit(reason.value, 15) == reason.value
    assert share_of(drawn(), overlay.HOLDING) == 0


def test_further_reasons_are_counted():
    one, three = (HoldReason.SKEW,), (HoldReason.SKEW, HoldReason.NO_POSE, HoldReason.POSE_STALE)
    assert (drawn(holds=one) != drawn(holds=three)).any()


def test_a_hold_before_the_first_step_is_drawn():
    image = drawn(decision=None, holds=(HoldReason.NO_INSTRUCTION,))
    assert share_of(image, overlay.HOLDING) > 0.07


def test_a_motion_that_the_guard_shortened_is_told_apart():
    assert share_of(drawn(decision=decision((0.1,), (0.2,), limits=tuple(Limit))), overlay.LIMITED) > 0.07


def test_sixteen_exits_and_two_full_frames_cost_as_little_as_shrinking_the_frames():
    """The cost is a ratio, because machines differ.

    It was 1.7 to 1.9 times the cost of shrinking both frames for the network.
    """
    frame = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
    deep = decision((0.1,) * 16, (0.05,) * 16, 15, StopReason.DEEPEST)
    drawing, shrinking = [], []
    for _ in range(30):
        drawing.append(seconds(lambda: drawn(frame, frame, "lift the red block " * 9, deep)))
        shrinking.append(
            seconds(
                lambda: [PIL.Image.fromarray(frame).resize((224, 224), PIL.Image.BICUBIC) for _ in range(2)]
            )
        )
    assert min(drawing) < 4 * min(shrinking)


def seconds(act):
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def test_the_message_carries_the_picture():
    image = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
    message = image_message(image, "camera", 5_000_000_007)
    assert (message.height, message.width, message.step, message.encoding) == (480, 640, 1920, "rgb8")
    assert (message.header.stamp.sec, message.header.stamp.nanosec, message.header.frame_id) == (
        5,
        7,
        "camera",
    )
    assert bytes(message.data) == image.tobytes()


def panels(tree):
    if isinstance(tree, str):
        return [tree]
    assert set(tree) == {"first", "second", "direction", "splitPercentage"} and tree["direction"] in (
        "row",
        "column",
    )
    return panels(tree["first"]) + panels(tree["second"])


def strings(value):
    if isinstance(value, dict):
        return [text for part in value.values() for text in strings(part)]
    if isinstance(value, list):
        return [text for part in value for text in strings(part)]
    return [value] if isinstance(value, str) else []


def test_every_panel_has_a_place_and_every_place_a_panel():
    assert sorted(panels(LAYOUT["layout"])) == sorted(LAYOUT["configById"])


def test_every_topic_and_field_that_the_layout_names_exists():
    named = [
        text for text in strings(LAYOUT["configById"]) if text.startswith("/") and text != "/deer_vla/hold"
    ]
    assert {text.split(".")[0] for text in named} == set(TOPICS)
    for text in named:
        topic, *fields = text.split(".")
        assert set(fields) <= set(TOPICS[topic].get_fields_and_field_types()), text


def test_every_plotted_field_is_a_number():
    for identifier, config in LAYOUT["configById"].items():
        for path in config.get("paths", ()):
            topic, field = path["value"].split(".")
            kind = TOPICS[topic].get_fields_and_field_types()[field]
            assert re.fullmatch(r"u?int\d+|float|double|boolean", kind), (
                f"{identifier}: {path['value']} is {kind}"
            )
            assert path["enabled"]


def test_what_the_layout_sends_is_what_the_node_hears():
    publish = LAYOUT["configById"]["Publish!instruction"]
    assert publish["topicName"] == "/instruction" and publish["datatype"] == "std_msgs/msg/String"
    String(**json.loads(publish["value"]))
    for name, held in (("CallService!hold", True), ("CallService!engage", False)):
        service = LAYOUT["configById"][name]
        assert service["serviceName"] == "/deer_vla/hold" and json.loads(service["requestPayload"]) == {
            "data": held
        }
