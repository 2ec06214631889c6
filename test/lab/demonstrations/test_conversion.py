"""Tests that the conversion of a recording gives correct training data."""

import json
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from bags import GRIPPER, INPUTS, INSTRUCTION, SECOND, STATIC, TABLE, records, write

from deer_vla_ros.__main__ import main
from deer_vla_ros.bag.calvin_files import read_action_space, read_annotations, read_step
from deer_vla_ros.bag.cdr import types
from deer_vla_ros.bag.recording import decode
from deer_vla_ros.control.motion import motion_of, moved
from deer_vla_ros.control.types import Pose
from deer_vla_ros.lab.training.calvin import CalvinWindows
from deer_vla_ros.model.action_space import TABLETOP
from deer_vla_ros.ros.messages import nanoseconds, stamp

COMMANDS = ("/target_pose", "/gripper_command")


def converted(path, out, *arguments) -> dict:
    """Runs the command and returns the figures that it reports."""
    assert (
        main(
            ["convert-bag", str(path), "--out", str(out), "--json", str(out.with_suffix(".json")), *arguments]
        )
        == 0
    )
    return json.loads(out.with_suffix(".json").read_text())


def test_every_instruction_becomes_an_episode_of_what_the_cameras_saw(tmp_path):
    told = converted(TABLE, tmp_path / "set")
    words = [decode(each).data for each in records([INSTRUCTION])]
    annotations = read_annotations(tmp_path / "set" / "training")
    assert [each.text for each in annotations] == words and told["episodes"] == len(words)
    frames = {each.time_ns: decode(each) for each in records([STATIC])}
    assert told["steps"] == sum(each.end - each.first for each in annotations) == len(frames) - len(words)
    first = read_step(
        tmp_path / "set" / "training", annotations[0].first, ["rgb_static", "robot_obs", "rel_actions"]
    )
    image = next(iter(frames.values()))
    assert np.array_equal(first["rgb_static"], image.data.reshape(image.height, image.width, 3))
    assert f"{len(words)} last steps of episodes, which have no next pose" in told["left_out"]
    windows = CalvinWindows([tmp_path / "set" / "training"])
    assert set(windows.texts) == set(words), "training reads it"
    assert read_action_space(tmp_path / "set" / "training") == TABLETOP


def test_an_action_leads_from_one_measured_pose_to_the_next(tmp_path):
    converted(TABLE, tmp_path / "set")
    folder = tmp_path / "set" / "training"
    poses = [decode(each).pose for each in records(["/ee_pose"])]
    for annotation in read_annotations(folder)[:2]:
        for number in range(annotation.first, annotation.end - 1):
            now, following = (
                read_step(folder, each, ["rel_actions", "robot_obs"]) for each in (number, number + 1)
            )
            action = now["rel_actions"]
            if np.abs(action[:6]).max() == 1:
                continue  # The action was cut to its range.
            start = Pose(now["robot_obs"][:3], np.array([1.0, 0, 0, 0]))
            there = moved(start, *motion_of(action[:6], TABLETOP))
            assert there.position == pytest.approx(following["robot_obs"][:3], abs=1e-9)
    assert poses[0].position.x == pytest.approx(read_step(folder, 0, ["robot_obs"])["robot_obs"][0])


def test_the_gripper_closes_when_it_was_told_to(tmp_path):
    converted(TABLE, tmp_path / "set")
    folder = tmp_path / "set" / "training"
    lifting = next(each for each in read_annotations(folder) if each.text == "lift the pink block")
    told = [
        read_step(folder, number, ["rel_actions"])["rel_actions"][6]
        for number in range(lifting.first, lifting.end)
    ]
    assert told[0] == 1.0 and told[-1] == -1.0 and set(told) == {1.0, -1.0}


def test_targets_in_place_of_measured_poses(tmp_path):
    converted(TABLE, tmp_path / "target", "--actions", "target")
    step = read_step(tmp_path / "target" / "training", 0, ["actions"])["actions"]
    target = decode(records(["/target_pose"])[0]).pose.position
    assert step[:3] == pytest.approx([target.x, target.y, target.z])


def test_breaks_and_short_pieces_are_counted_and_nothing_is_bridged(tmp_path):
    found = records((*INPUTS, *COMMANDS), seconds=4)
    begin = found[0].time_ns
    hole = [
        each
        for each in found
        if each.topic == INSTRUCTION or not begin + 1.0 * SECOND < each.time_ns < begin + 1.62 * SECOND
    ]
    told = converted(write(tmp_path / "bag", hole), tmp_path / "set")
    assert told["episodes"] == 3, "before the hole, and the next two instructions"
    assert "1 episodes of fewer than 3 steps" in told["left_out"], (
        "what the first instruction had left after the hole"
    )
    frames = sum(each.topic == STATIC for each in hole)
    assert frames - 3 - 3 <= told["steps"] < frames - 3, (
        "every frame but the last of each piece, and the short piece"
    )
    pieces = read_annotations(tmp_path / "set" / "training")
    assert all(one.end + 1 == other.first for one, other in zip(pieces, pieces[1:])), (
        "a number is missing between episodes"
    )


SECONDS = 4.0
FRAMES = (STATIC, GRIPPER)


def recording() -> list:
    """The first seconds of the table's recording, which has frames and poses at 10 Hz."""
    return records((*INPUTS, *COMMANDS), seconds=SECONDS)


JOINTS = "/joint_states"
STATE = ["--topic", f"gripper_state:={JOINTS}", "--gripper-joint", "panda_finger_joint1"]
STATE += ["--gripper-range", "0", "0.04"]


def grippers(out) -> list[float]:
    """The gripper's label of each step."""
    return [np.load(each)["rel_actions"][6] for each in sorted((out / "training").glob("episode_*.npz"))]


def labels(out) -> list[tuple]:
    """Position and motion of each step."""
    steps = (np.load(each) for each in sorted((out / "training").glob("episode_*.npz")))
    return [tuple(np.round([*step["robot_obs"][:3], *step["rel_actions"]], 9)) for step in steps]


@dataclass
class Whole:
    """What the first seconds of the table's recording become: the report, the labels of the steps, and those
    of the gripper by the state of its fingers."""

    told: dict
    labels: list[tuple]
    states: list[float]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    bag = write(folder / "bag", records((*INPUTS, *COMMANDS, JOINTS), seconds=SECONDS))
    told = converted(bag, folder / "set")
    converted(bag, folder / "states", *STATE)
    return Whole(told, labels(folder / "set"), grippers(folder / "states"))


def fingers(found, change=lambda first, second: ([first, second], ["left", "right"])) -> list:
    """The recording with a topic of the gripper's own joints; change: of the positions of both fingers."""
    changed = []
    for each in found:
        if each.topic == JOINTS:
            message = decode(each)
            positions, names = change(*message.position[-2:])
            message = replace(
                message, position=np.array(positions), name=names, velocity=np.zeros(0), effort=np.zeros(0)
            )
            data = bytes(types().serialize_cdr(message, each.type))
            each = replace(each, topic="/gripper/gripper_state", data=data)
        changed.append(each)
    return changed


def test_an_arm_that_was_led_by_hand_is_labelled_by_the_motion_of_its_fingers(tmp_path):
    converted(write(tmp_path / "bag", records((*INPUTS, *COMMANDS), seconds=6)), tmp_path / "told")
    told = converted(
        write(tmp_path / "hand", records((*INPUTS, JOINTS), seconds=6)), tmp_path / "set", *STATE
    )
    labels, expected = grippers(tmp_path / "set"), grippers(tmp_path / "told")
    assert len(labels) == len(expected) and told["open"] == labels.count(1.0)
    late = [number for number, pair in enumerate(zip(labels, expected, strict=True)) if pair[0] != pair[1]]
    changes = [number for number, pair in enumerate(pairwise(expected)) if pair[0] != pair[1]]
    assert changes and all(any(number - change in (0, 1, 2, 3) for change in changes) for number in late), (
        "fingers move a little later than they are told to, and hold a block that is wider than half"
    )


@pytest.mark.parametrize(
    ("change", "arguments"),
    [
        (lambda *both: (both, ["left", "right"]), ["--gripper-range", "0", "0.08"]),
        (lambda *both: (both[:1], [""]), ["--gripper-range", "0", "0.04"]),
        (lambda *both: ([0.8 - 20 * both[0]], ["knuckle"]), ["--gripper-range", "0.8", "0"]),
        (lambda *both: ([7, both[0], 8], "abc"), ["--gripper-range", "0", "0.04", "--gripper-joint", "b"]),
    ],
    ids=["two fingers", "one finger", "an angle", "a joint of three"],
)
def test_grippers_of_other_kinds_give_the_same_labels(tmp_path, whole, change, arguments):
    found = fingers(records((*INPUTS, JOINTS), seconds=SECONDS), change)
    converted(write(tmp_path / "bag", found), tmp_path / "set", *arguments)
    assert grippers(tmp_path / "set") == whole.states and -1.0 in whole.states


def test_steps_before_the_first_position_of_the_gripper_are_left_out_and_counted(tmp_path):
    found = records((*INPUTS, JOINTS), seconds=3)
    begin = found[0].time_ns
    late = [each for each in found if each.topic != JOINTS or each.time_ns > begin + 0.35 * SECOND]
    told = converted(write(tmp_path / "bag", late), tmp_path / "set", *STATE)
    assert f"{JOINTS}: 4 left out: steps before the gripper's first position" in told["left_out"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (STATE[:2], "--gripper-range CLOSED OPEN is missing"),
        ([*STATE[:2], *STATE[4:]], "panda_finger_joint2: name one with --gripper-joint"),
        ([*STATE[:3], "finger", *STATE[4:]], "no position of finger, it has the joints panda_joint1"),
        ([*STATE[:5], "0", "0.01"], "but --gripper-range is 0 (closed) to 0.01 (open)"),
        ([*STATE[:5], "1", "1"], "--gripper-range is 1 1: give two positions that differ"),
        (STATE[4:], "has no topic gripper_state: name the gripper's joint states"),
    ],
)
def test_a_state_of_the_gripper_that_is_not_clear_is_refused(tmp_path, capsys, arguments, expected):
    bag = write(tmp_path / "bag", records((*INPUTS, JOINTS), seconds=1))
    assert main(["convert-bag", str(bag), "--out", str(tmp_path / "set"), *arguments]) == 1
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1
    assert not (tmp_path / "set").exists()


def without(topics, first: int, count: int = 1) -> list:
    """The recording without the messages number `first` and later of each of these topics."""
    left, seen = [], Counter()
    for each in recording():
        seen[each.topic] += 1
        if each.topic not in topics or not first < seen[each.topic] <= first + count:
            left.append(each)
    return left


def restamped(found, shift_ns, receive: bool = True, topics=(*INPUTS, *COMMANDS)) -> list:
    """The recording with other stamps, and times of receipt if `receive`. shift_ns: of the time [ns]."""
    begin, shifted = found[0].time_ns, []
    for each in found:
        message, shift = decode(each), shift_ns(each.time_ns - begin) * (each.topic in topics)
        if hasattr(message, "header"):
            now = stamp(nanoseconds(message.header.stamp) + shift)
            message.header.stamp.sec, message.header.stamp.nanosec = now.sec, now.nanosec
        data = bytes(types().serialize_cdr(message, each.type))
        shifted.append(replace(each, data=data, time_ns=each.time_ns + shift * receive))
    return sorted(shifted, key=lambda each: each.time_ns)


def jittered(found, topics=(*INPUTS, *COMMANDS), drifts: bool = False) -> list:
    """Periods of 0.08 to 0.12 s. drifts: each is independent of the ones before it."""
    random = np.random.default_rng(0)
    if drifts:
        shifts = np.cumsum(random.integers(-20_000_000, 20_000_001, 100))
    else:
        shifts = random.integers(-10_000_000, 10_000_001, 100)
    return restamped(found, lambda ns: int(shifts[ns * 10 // SECOND]), topics=topics)


@pytest.mark.parametrize(
    ("make", "gaps"),
    [
        (lambda: without(FRAMES, 6), 1),
        (lambda: without([GRIPPER], 6), 1),
        (lambda: without([STATIC], 6, 2), 1),
        (lambda: without(["/ee_pose"], 6), 1),
        (lambda: without(FRAMES, 6, 8), 1),
        (lambda: without([*FRAMES, "/ee_pose"], 6, 8), 1),
        (lambda: jittered(recording()), 0),
        (lambda: jittered(recording(), drifts=True), 0),
        (lambda: jittered(without(FRAMES, 6)), 1),
    ],
    ids=["pair", "gripper", "static", "pose", "pairs", "pause", "jitter", "drift", "pair-jitter"],
)
def test_no_step_has_the_motion_of_another_time_than_a_period(tmp_path, whole, make, gaps):
    told = converted(write(tmp_path / "bag", make()), tmp_path / "set")
    assert told["gaps"] == gaps and whole.told["gaps"] == 0
    assert set(labels(tmp_path / "set")) <= set(whole.labels)
    assert told["steps"] < len(whole.labels) if gaps else told["steps"] == len(whole.labels)
    assert any("gaps, where no next frame" in line for line in told["left_out"]) == bool(gaps)


@pytest.mark.parametrize("pose_hz", [10, 12, 15, 18])
def test_a_step_has_the_pose_at_the_time_of_its_frame(tmp_path, pose_hz):
    """The camera's stamps jitter, and poses have another rate. Neither frames nor motions are lost."""
    frames = jittered([each for each in recording() if each.topic != "/ee_pose"], FRAMES)
    begin = frames[0].time_ns
    template = next(each for each in recording() if each.topic == "/ee_pose")
    poses = []
    for number in range(round(SECONDS * pose_hz) + 1):
        message, time_ns = decode(template), begin + round((number - 0.5) * SECOND / pose_hz)
        message.header.stamp.sec, message.header.stamp.nanosec = (
            stamp(time_ns).sec,
            stamp(time_ns).nanosec,
        )
        message.pose.position.x = 0.4 + (time_ns - begin) / SECOND / 100
        data = bytes(types().serialize_cdr(message, template.type))
        poses.append(replace(template, time_ns=time_ns, data=data))
    bag = write(tmp_path / "bag", sorted([*frames, *poses], key=lambda each: each.time_ns))
    told = converted(bag, tmp_path / "set", "--instruction", "tidy up")
    stamps = [nanoseconds(decode(each).header.stamp) for each in frames if each.topic == STATIC]
    expected = [0.4 + (each - begin) / SECOND / 100 for each in stamps]
    found = [label[0] for label in labels(tmp_path / "set")]
    assert told["gaps"] == 0 and len(found) >= len(stamps) - 3
    first = int(np.abs(np.array(expected) - found[0]).argmin())
    assert found == pytest.approx(expected[first : first + len(found)], abs=1e-8)


def test_targets_that_are_old_or_in_another_frame_are_no_labels(tmp_path):
    def retargeted(change) -> list:
        """The recording with other targets."""
        found, begin = [], recording()[0].time_ns
        for each in recording():
            if each.topic == "/target_pose":
                message = decode(each)
                if not change(each.time_ns - begin, message):
                    continue
                each = replace(each, data=bytes(types().serialize_cdr(message, each.type)))
            found.append(each)
        return found

    silent = retargeted(lambda ns, message: not SECOND < ns < 2 * SECOND)
    told = converted(write(tmp_path / "silent", silent), tmp_path / "set", "--actions", "target")
    assert told["gaps"] >= 1 and 5 <= told["targetless"] <= 9

    def in_tool(ns, message) -> bool:
        message.header.frame_id = "tool0"
        return ns < 2 * SECOND

    bag = write(tmp_path / "tool", retargeted(in_tool))
    assert main(["convert-bag", str(bag), "--out", str(tmp_path / "none"), "--actions", "target"]) == 1


def test_a_clock_that_was_set_back_is_a_gap(tmp_path, whole):
    back = restamped(recording(), lambda ns: -5 * SECOND if ns > 1.2 * SECOND else 0, receive=False)
    told = converted(write(tmp_path / "bag", back), tmp_path / "set", "--clock", "header")
    assert told["gaps"] == 1 and len(whole.labels) - 12 < told["steps"] < len(whole.labels)
    assert set(labels(tmp_path / "set")) <= set(whole.labels)


def with_rate(folder, rate_hz: float) -> list[str]:
    """Arguments that set the control rate."""
    (folder / "rate.yaml").write_text(f"deer_vla:\n  ros__parameters:\n    control.rate_hz: {rate_hz}\n")
    return ["--params", str(folder / "rate.yaml")]


def test_a_lost_frame_of_a_camera_three_times_as_fast_shifts_the_steps(tmp_path):
    bag = write(tmp_path / "bag", without(FRAMES, 3))
    told = converted(bag, tmp_path / "set", *with_rate(tmp_path, 10 / 3))
    assert told["gaps"] == 0 and told["seconds"] / told["steps"] == pytest.approx(0.3, abs=0.02)


def test_steps_that_are_further_apart_than_a_period_throughout_are_said(tmp_path, capsys):
    bag = write(tmp_path / "bag", recording())
    converted(bag, tmp_path / "set", *with_rate(tmp_path, 13.0))
    assert "steps are 0.100 s apart, a control period is 0.077 s" in capsys.readouterr().out
    converted(bag, tmp_path / "other")
    assert "apart" not in capsys.readouterr().out


def test_cameras_slower_than_the_control_rate_are_refused_with_the_remedy(tmp_path, capsys):
    bag = write(tmp_path / "bag", recording())
    assert main(["convert-bag", str(bag), "--out", str(tmp_path / "set"), *with_rate(tmp_path, 20.0)]) == 1
    assert "set control.rate_hz to the rate of cameras and poses" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_a_recording_without_gripper_commands_or_episodes_is_refused_and_nothing_is_left(tmp_path, capsys):
    path = write(tmp_path / "bag", records(INPUTS, seconds=2))
    assert main(["convert-bag", str(path), "--out", str(tmp_path / "set")]) == 1
    said = capsys.readouterr().err
    assert "no gripper command" in said and "--gripper-range" in said
    path = write(tmp_path / "few", records((*INPUTS, *COMMANDS), seconds=0.15))
    assert main(["convert-bag", str(path), "--out", str(tmp_path / "set")]) == 1
    assert "no episode of more than 2 steps" in capsys.readouterr().err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bag", "few"]
    (tmp_path / "set").mkdir()
    assert main(["convert-bag", str(path), "--out", str(tmp_path / "set")]) == 1
    assert "which exists" in capsys.readouterr().err


def test_a_recording_without_instructions_asks_for_one(tmp_path, capsys):
    bag = write(tmp_path / "bag", [each for each in recording() if each.topic != INSTRUCTION])
    assert main(["convert-bag", str(bag), "--out", str(tmp_path / "set")]) == 1
    assert "has no topic instruction" in capsys.readouterr().err
    told = converted(bag, tmp_path / "set", "--instruction", "tidy up")
    assert told["texts"] == {"tidy up": told["episodes"]} and told["episodes"] == 1


def test_grey_cameras_are_said_once(tmp_path):
    def grey(each):
        message = decode(each)
        image = message.data.reshape(message.height, message.width, 3)[..., 0]
        message = replace(message, encoding="mono8", step=message.width, data=image.ravel())
        return replace(each, data=bytes(types().serialize_cdr(message, each.type)))

    found = [grey(each) if each.topic == GRIPPER else each for each in recording()]
    told = converted(write(tmp_path / "bag", found), tmp_path / "set")
    lines = [line for line in told["left_out"] if "grey" in line]
    assert lines == [f"{GRIPPER}: the camera is grey: its images have no colours"]


def test_unpaired_frames_are_no_episode(tmp_path, capsys):
    found = records((*INPUTS, *COMMANDS), seconds=3)
    one_eyed = [each for each in found if each.topic != GRIPPER]
    kinds = {each.topic: each.type for each in found}
    assert (
        main(
            [
                "convert-bag",
                str(write(tmp_path / "bag", one_eyed, topics=kinds)),
                "--out",
                str(tmp_path / "set"),
            ]
        )
        == 1
    )
    said = capsys.readouterr().err
    assert "no episode of more than 2 steps" in said
    assert "the controller would only have held: no frame of the gripper camera yet" in said
