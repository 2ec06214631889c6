"""Tests of replays: the messages that they use, equal decisions in every run, and complete results."""

import csv
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from bags import GRIPPER, INPUTS, INSTRUCTION, POSE, SECOND, STATIC, TABLE, record, records, said, write
from PIL import Image as Picture
from rcl_interfaces.msg import Parameter, ParameterEvent, ParameterType, ParameterValue
from rosbags.rosbag2 import CompressionMode, StoragePlugin
from sensor_msgs.msg import CompressedImage
from shared import made_once
from std_msgs.msg import String

from deer_vla_ros.__main__ import main
from deer_vla_ros.bag import assert_replays, decisions, report
from deer_vla_ros.bag.cdr import to_cdr
from deer_vla_ros.bag.input_topics import Stamps, Tally, find_topics, node_of
from deer_vla_ros.bag.recording import Record, Recording, decode
from deer_vla_ros.bag.request import request
from deer_vla_ros.bag.rows import DECIDED, FIELDS, STEP_TYPE, TIMINGS, row_of, text_of
from deer_vla_ros.bag.run import run
from deer_vla_ros.budget import budgeted_policy
from deer_vla_ros.errors import UserError
from deer_vla_ros.model.checkpoint import EMBEDDED
from deer_vla_ros.ros.messages import nanoseconds

MS = 1_000_000
SHORT = 3.0
"""The seconds of the table's recording that most tests use."""


@pytest.fixture(scope="module", autouse=True)
def short_warm_up():
    """Replays begin with one step per exit, not with several. The decisions are the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budgeted_policy, "WARM_UP_RUNS", 1)
        yield


def replayed(path: Path, **how):
    """Runs a replay. Returns its result and its decisions."""
    rows = []
    result = run(request(path, **how), "test", on_row=rows.append)
    return result, rows


def cells(rows: list[dict]) -> list[list[str]]:
    """Every decision as the cells of its line. They are equal if the decisions are equal, also with NaN."""
    return [[text_of(row[name]) for name in DECIDED] for row in rows]


def decided(path: Path, **how) -> list[list[str]]:
    """The cells of every decision on a recording."""
    return cells(decisions(path, **how))


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("short") / "bag", records(INPUTS, seconds=SHORT))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The first ten frames of the recording, for the tests that replay many times."""
    return write(tmp_path_factory.mktemp("tiny") / "bag", records(INPUTS, seconds=1.0))


@pytest.fixture(scope="module")
def plain(short) -> list[dict]:
    """The decisions on the short recording. It is replayed once for all tests that compare with them."""
    return decisions(short)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder that `replay --out` writes for the table's recording under two budgets."""

    def make(folder: Path) -> None:
        arguments = ["--budget", "average_fraction=0.25", "--budget", "average_fraction=0.6,peak_gmac=1"]
        assert main(["replay", str(TABLE), "--out", str(folder / "out"), *arguments]) == 0

    return made_once(tmp_path_factory, "replay", make) / "out"


# The results that a replay writes.


def test_every_static_frame_is_stepped_on_and_told_with_every_field_of_policy_step(whole):
    frames = [each for each in records([STATIC])]
    for folder in ("average_fraction=0.25", "average_fraction=0.6_peak_gmac=1"):
        with open(whole / folder / "steps.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(frames)
        assert set(rows[0]) | set(TIMINGS) == set(FIELDS)
        assert [int(row["static_stamp"]) for row in rows] == [decoded_stamp(each) for each in frames]
        with open(whole / folder / "timings.csv", newline="") as file:
            timings = list(csv.DictReader(file))
        assert len(timings) == len(rows) and all(
            float(row["total_ms"]) > 0 and float(row["wall_ms"]) > 0 for row in timings
        )
    words = [decode(each).data for each in records([INSTRUCTION])]
    assert list(dict.fromkeys(row["instruction"] for row in rows)) == words, (
        "the recorded instructions, in their order"
    )


def decoded_stamp(each: Record) -> int:
    return nanoseconds(decode(each).header.stamp)


def test_the_recording_it_leaves_has_the_inputs_as_they_were_and_the_decisions_beside_them(whole):
    path = whole / "average_fraction=0.25" / "bag"
    with Recording(path) as recording, Recording(TABLE) as source:
        assert {*source.topics} - {"/target_pose", "/gripper_command"} <= {*recording.topics}
        assert recording.topics["/deer_vla/step"] == STEP_TYPE
    for topic in INPUTS:
        assert records([topic], path) == records([topic])
    recorded = [(each.time_ns, each.data) for each in records(["/target_pose"])]
    assert [(each.time_ns, each.data) for each in records(["/recorded/target_pose"], path)] == recorded
    steps, frames = records(["/deer_vla/step"], path), records([STATIC])
    assert [step.time_ns for step in steps] == [frame.time_ns for frame in frames], "at the input's stamps"
    with open(whole / "average_fraction=0.25" / "steps.csv", newline="") as file:
        for step, line in zip(steps, csv.DictReader(file), strict=True):
            assert str(row_of(decode(step))["exit_index"]) == line["exit_index"]
    targets = {decoded_stamp(each) for each in records(["/target_pose"], path)}
    assert {decoded_stamp(each) for each in frames} <= targets


def test_the_report_compares_the_budgets_and_needs_nothing_from_elsewhere(whole):
    page, figures = (whole / "report.html").read_text(), json.loads((whole / "report.json").read_text())
    assert page.count('src="data:image/jpeg;base64,') == page.count("src=") == 16, "8 frames for each budget"
    assert not any(word in page for word in ("href", "http", "url(", "@import", "fetch("))
    cheap, dear = figures["runs"]
    assert cheap["language_gmac_mean"] < dear["language_gmac_mean"] <= dear["language_gmac_full"]
    assert cheap["deviation_from_full_depth"]["mean"] >= dear["deviation_from_full_depth"]["mean"] > 0
    assert cheap["position_from_recorded_m"]["mean"] < 0.06, "the arm was told things like that"
    assert sum(cheap["exit_shares"].values()) == pytest.approx(1)
    assert figures["runs"][0]["label"] in page


class Parts(HTMLParser):
    """The elements of a page with their attributes, and the text in them by the class of the element."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.texts, self._open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else "", data))

    def data(self) -> list[dict]:
        """What is embedded for the script, by run."""
        return [json.loads(text) for tag, text in self.texts if tag == "script" and text.startswith("{")]

    def bands(self) -> list[str]:
        return [text for tag, text in self.texts if tag == "span"]


def test_the_report_tells_the_instructions_and_the_values_of_every_step(whole):
    parts = Parts((whole / "report.html").read_text())
    said_here = [decode(each).data for each in records([INSTRUCTION])]
    assert parts.bands() == 2 * [f"{number}. {text}" for number, text in enumerate(said_here, start=1)]
    assert ("meta", {"name": "viewport", "content": "width=device-width,initial-scale=1"}) in parts.tags
    assert len(parts.data()) == 2
    for name, data in zip(("average_fraction=0.25", "average_fraction=0.6_peak_gmac=1"), parts.data()):
        with open(whole / name / "steps.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [data["texts"][index] for index in data["text"]] == [row["instruction"] for row in rows]
        assert data["layers"] == [int(row["layers_run"]) for row in rows]
        assert data["gmac"] == pytest.approx([float(row["language_gmac"]) for row in rows], rel=1e-3)
        assert len(data["s"]) == len(data["ms"]) == len(data["away"]) == len(data["held"]) == len(rows)
        assert data["s"] == sorted(data["s"]) and min(data["ms"]) > 0 and min(data["away"]) >= 0


def test_an_instruction_cannot_leave_its_place_in_the_report(short, tmp_path):
    found = [each for each in records(INPUTS, short) if each.topic != INSTRUCTION]
    hostile = "</script><img src=x onerror=alert(1)>&amp;\u2028\"'<!--"
    start = found[0].time_ns
    gap = [each for each in found if not start + 1.05 * SECOND < each.time_ns < start + 2.05 * SECOND]
    result, _ = replayed(write(tmp_path / "bag", [said(hostile, start), *gap]))
    pages = [report.page(hostile, [result], [report.summary(result, None)], None) for _ in range(2)]
    assert pages[0] == pages[1]
    parts = Parts(pages[0])
    assert parts.bands() == [f"1. {hostile}"] and parts.data()[0]["texts"] == [hostile]
    images = [attributes["src"] for tag, attributes in parts.tags if tag == "img"]
    assert images and all(source.startswith("data:image/jpeg;base64,") for source in images)
    (data,) = parts.data()
    assert data["away"] == [None] * len(data["s"])
    begin, end, why = data["holds"][-1]
    assert "STATIC_STALE" in data["reasons"][why] and 1.0 < begin < end < 2.3


def test_two_runs_decide_the_same_to_the_byte_and_so_does_one_after_a_kill(short, tmp_path):
    def command(out: Path) -> list[str]:
        return [sys.executable, "-m", "deer_vla_ros", *arguments(out)]

    def arguments(out: Path) -> list[str]:
        return ["replay", str(short), "--out", str(out), "--budget", "average_fraction=0.4"]

    once, again = tmp_path / "once", tmp_path / "again"
    assert main(arguments(once)) == 0
    killed = subprocess.Popen(command(again), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = None
    while killed.poll() is None and partial is None:
        partial = next(tmp_path.glob(f".{again.name}.partial-*/**/steps.csv"), None)
        time.sleep(0.01)
    time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert partial is not None and not again.exists(), "nothing half-made under the final name"
    assert main(arguments(again)) == 0
    name = "average_fraction=0.4/steps.csv"
    assert (once / name).read_bytes() == (again / name).read_bytes() and len(
        (once / name).read_bytes()
    ) > 1000
    assert not list(tmp_path.glob(".*.partial-*")), "what the killed one left is gone"


def test_a_folder_that_is_not_a_replays_is_not_touched(short, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["replay", str(short), "--out", str(tmp_path)]) == 1
    assert (
        "which exists and was not written by replay" in capsys.readouterr().err
        and (tmp_path / "notes.txt").read_text() == "mine"
    )


def test_a_golden_file_in_the_folder_that_is_replaced_is_refused_and_stays(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["replay", str(tiny), "--out", str(out)]) == 0
    assert main(["replay", str(tiny), "--golden", str(tmp_path / "golden.csv")]) == 0
    (tmp_path / "golden.csv").rename(out / "golden.csv")
    for asked in ("--check", "--golden"):
        assert main(["replay", str(tiny), "--out", str(out), asked, str(out / "golden.csv")]) == 1
        assert (
            "inside --out, and the whole folder is replaced" in capsys.readouterr().err
            and (out / "golden.csv").is_file()
        )
    assert main(["replay", str(tiny), "--check", str(tmp_path / "nothing.csv")]) == 1
    printed = capsys.readouterr()
    assert "nothing.csv cannot be read" in printed.err and "x real time" not in printed.out, (
        "said before the replay"
    )


def test_a_place_that_cannot_be_written_is_named_in_one_line(short, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["replay", str(short), "--out", str(tmp_path / "file" / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "give another place" in error


def test_what_a_replay_left_can_be_replayed(whole, tmp_path):
    bag = next(whole.glob("*/bag"))
    first = tmp_path / "first"
    run(request(bag, duration_s=1.0), "test", first)
    with Recording(first / "bag") as recording:
        assert {
            "/deer_vla/step",
            "/recorded/deer_vla/step",
            "/recorded/target_pose",
            "/recorded/recorded/target_pose",
        } <= set(recording.topics)
    assert decided(first / "bag") == decided(TABLE, duration_s=1.0)


# The messages that a replay uses.


@pytest.mark.parametrize(
    "compression", [CompressionMode.FILE, CompressionMode.MESSAGE], ids=lambda value: value.name.lower()
)
def test_how_it_was_recorded_makes_no_difference(short, plain, tmp_path, compression):
    other = write(tmp_path / "bag", records(INPUTS, short), StoragePlugin.SQLITE3, compression)
    assert decided(other) == cells(plain)


def test_renamed_topics_and_a_given_instruction(short, plain, tmp_path):
    renamed = [dataclasses.replace(each, topic=f"/cam0{each.topic}") for each in records(INPUTS, short)]
    other = write(tmp_path / "bag", renamed)
    assert decided(other) == cells(plain), "a namespace is found by itself"
    only = write(tmp_path / "only", [each for each in renamed if not each.topic.endswith(INSTRUCTION)])
    with pytest.raises(UserError, match="say what to do with --instruction"):
        decisions(only)
    words = decode(records([INSTRUCTION], short)[0]).data
    assert decided(only, instruction=words) == decided(short, instruction=words)
    odd = [
        dataclasses.replace(each, topic="/eye") if each.topic == STATIC else each
        for each in records(INPUTS, short)
    ]
    odd = write(tmp_path / "odd", odd)
    with pytest.raises(
        UserError, match="no topic camera/static/image_raw.*--topic camera/static/image_raw:=TOPIC.*/eye"
    ):
        decisions(odd)
    assert decided(odd, topics={"camera/static/image_raw": "/eye"}) == cells(plain)


def test_compressed_images_are_decoded_as_the_node_decodes_them(short, plain, tmp_path):
    def as_png(each: Record) -> Record:
        raw = decode(each)
        message = CompressedImage(format="png")
        message.header.stamp.sec, message.header.stamp.nanosec = (
            raw.header.stamp.sec,
            raw.header.stamp.nanosec,
        )
        import io

        buffer = io.BytesIO()
        Picture.fromarray(raw.data.reshape(raw.height, raw.width, 3)).save(buffer, "png")
        message.data = buffer.getvalue()
        return record(f"{each.topic}/compressed", message, each.time_ns)

    found = [as_png(each) if each.topic in (STATIC, GRIPPER) else each for each in records(INPUTS, short)]
    assert decided(write(tmp_path / "bag", found)) == cells(plain)


def test_a_part_of_it(short, plain):
    later = decisions(short, start_s=1.0, duration_s=0.95)
    assert [row["stamp"] for row in later] == [row["stamp"] for row in plain[10:20]]
    told = [[row["instruction"] for row in rows] for rows in (later, plain[10:20])]
    assert told[0] == told[1] and told[0][0] == plain[0]["instruction"], (
        "what was said before the part still holds in it"
    )
    with pytest.raises(UserError, match="--start is 99 s, but .* 2.9 s long"):
        decisions(short, start_s=99.0)


def parameter_event(time_ns: int, node: str = "/deer_vla", **values: float) -> Record:
    event = ParameterEvent(node=node)
    for name, value in values.items():
        event.changed_parameters.append(
            Parameter(
                name=f"budget.{name}",
                value=ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=value),
            )
        )
    return Record("/parameter_events", "rcl_interfaces/msg/ParameterEvent", time_ns, to_cdr(event))


def test_a_budget_that_was_changed_while_it_was_recorded_changes_at_its_place(short, plain, tmp_path):
    found = records(INPUTS, short)
    middle = found[0].time_ns + round(1.45 * SECOND)
    with_event = [
        *found,
        parameter_event(middle, average_fraction=1.0),
        parameter_event(middle, node="/other", peak_gmac=1e-9),
    ]
    path = write(tmp_path / "bag", sorted(with_event, key=lambda each: each.time_ns))
    result, changed = replayed(path)
    before = [index for index, row in enumerate(plain) if row["stamp"] < middle]
    assert [row["action"] for row in plain[: len(before)]] == [
        row["action"] for row in changed[: len(before)]
    ]
    assert result.parameter_events == 1
    assert all(row["exit_index"] == 5 for row in changed[len(before) :]) and len(changed) > len(before)
    assert any(row["exit_index"] < 5 for row in plain[len(before) :])
    assert decided(path, budget="average_fraction=0.3") == decided(short, budget="average_fraction=0.3"), (
        "asked for otherwise"
    )
    assert all(row["exit_index"] == 5 for row in decisions(path, start_s=2.0)), (
        "asked for before the part that is replayed"
    )


def test_a_budget_in_ms_needs_latencies_that_stay_and_then_repeats_itself(tiny, tmp_path, capsys):
    with pytest.raises(UserError, match="budget.average_ms is 9: .*--latency-table FILE"):
        decisions(tiny, budget="average_ms=9")
    table = tmp_path / "latency.json"
    table.write_text(json.dumps({"about": "made up", "parts": [[5.0, 1.0, 0.5]] * 10}))
    assert decided(tiny, budget="average_ms=9", latency_table=table) == decided(
        tiny, budget="average_ms=9", latency_table=table
    )
    cheap = decisions(tiny, budget="average_ms=9", latency_table=table)
    dear = decisions(tiny, budget="average_ms=16", latency_table=table)
    assert np.mean([row["layers_run"] for row in cheap]) < np.mean([row["layers_run"] for row in dear])
    assert all(
        row["layers_run"] <= 2 for row in decisions(tiny, budget="deadline_ms=8.1", latency_table=table)
    )
    for text in ("{}", '{"about": "x", "parts": [[1, 2]]}', '{"about": "x", "parts": []}', "no"):
        table.write_text(text)
        with pytest.raises(UserError, match="latency.json: (not JSON|no latency table)"):
            decisions(tiny, budget="average_ms=9", latency_table=table)


def test_an_inference_that_takes_time_misses_frames_as_the_node_would(short, plain, tmp_path):
    table = tmp_path / "latency.json"
    table.write_text(json.dumps({"about": "slow", "parts": [[150.0, 0.0, 0.0]]}))
    result, rows = replayed(short, latency_table=table)
    assert 0.6 * len(plain) < len(rows) < 0.8 * len(plain), (
        "two of three frames, 100 ms apart, where each takes 150 ms"
    )
    table.write_text(json.dumps({"about": "far too slow", "parts": [[450.0, 0.0, 0.0]]}))
    result, _ = replayed(short, latency_table=table)
    assert result.hold_reasons["TOO_SLOW"], "its frames are older than inputs.max_age_s by then"


# Unusual recordings.


def test_a_gap_is_a_hold_and_what_follows_goes_on(short, plain, tmp_path):
    found = records(INPUTS, short)
    begin = found[0].time_ns
    gap = [
        each
        for each in found
        if not (begin + 1.05 * SECOND < each.time_ns < begin + 2.05 * SECOND) or each.topic == POSE
    ]
    result, rows = replayed(write(tmp_path / "bag", gap))
    assert result.hold_reasons["STATIC_STALE"] == 1
    assert len(plain) - len(rows) == 10


@pytest.mark.parametrize("topic,reason", [(GRIPPER, "NO_GRIPPER_FRAME"), (POSE, "NO_POSE")])
def test_without_one_of_the_inputs_there_is_nothing_to_replay(short, tmp_path, topic, reason):
    left = [each for each in records(INPUTS, short) if each.topic != topic]
    with pytest.raises(UserError, match=f"has no topic {topic[1:]}"):
        decisions(write(tmp_path / "bag", left))
    kinds = {each.topic: each.type for each in records(INPUTS, short)}
    with pytest.raises(UserError, match=f"no step was taken: .*{reason}"):
        decisions(write(tmp_path / "silent", left, topics=kinds))


def test_a_topic_of_another_type_is_refused(short, tmp_path):
    words = [dataclasses.replace(said("x", each.time_ns), topic=STATIC) for each in records([STATIC], short)]
    path = write(
        tmp_path / "bag", [*words, *(each for each in records(INPUTS, short) if each.topic != STATIC)]
    )
    with pytest.raises(
        UserError, match=f"{STATIC} is of type std_msgs/msg/String, camera/static/image_raw takes sensor_msgs"
    ):
        decisions(path)
    with Recording(path) as recording, pytest.raises(UserError, match="the policy has no such topic"):
        find_topics(recording, {"camera": STATIC}, (), Tally())


def test_a_topic_that_is_not_read_may_be_of_any_type(short, plain, tmp_path):
    found = records(INPUTS, short)
    grip = [record("/gripper_command", String(data="shut"), found[0].time_ns)]
    path = write(tmp_path / "bag", [*found, *grip])
    result, rows = replayed(path)
    assert len(rows) == len(plain)
    assert result.tally.lines() == [
        "/gripper_command: 1 left out: of type std_msgs/msg/String, "
        "gripper_command takes std_msgs/msg/Float64MultiArray"
    ]
    with pytest.raises(UserError, match="/gripper_command is of type std_msgs/msg/String"):
        decisions(path, topics={"gripper_command": "/gripper_command"})


def test_of_two_robots_instructions_one_has_to_be_chosen(short, plain, tmp_path):
    found = [each for each in records(INPUTS, short) if each.topic != INSTRUCTION]
    both = [
        dataclasses.replace(said("lift the red block", found[0].time_ns), topic=f"/{arm}/instruction")
        for arm in ("left", "right")
    ]
    path = write(tmp_path / "bag", [*both, *found])
    with pytest.raises(
        UserError, match="/left/instruction, /right/instruction could all be instruction: choose with --topic"
    ):
        decisions(path)
    assert len(decisions(path, topics={"instruction": "/left/instruction"})) == len(plain)
    assert len(decisions(path, instruction="lift the red block")) == len(plain)


# Recordings of several robots.


def in_namespace(found: list[Record], namespace: str) -> list[Record]:
    return [dataclasses.replace(each, topic=f"{namespace}{each.topic}") for each in found]


def test_parameter_events_are_those_of_the_node_in_the_namespace_of_the_topics(tiny, tmp_path):
    found = in_namespace(records(INPUTS, tiny), "/left")
    start = found[0].time_ns
    nodes = ["/right/deer_vla", "/right/deer_vla", "/left/arm_policy", "/deer_vla"]
    others = [parameter_event(start, node, average_fraction=1.0) for node in nodes]
    rest = [*others, parameter_event(start, "/left/camera")]
    path = write(tmp_path / "bag", [*rest, *found])
    result, rows = replayed(path)
    assert result.parameter_events == 0 and cells(rows) == decided(tiny)
    assert result.notes == [
        "parameter events of other nodes than /left/deer_vla have no effect: /deer_vla (1), "
        "/left/arm_policy (1), /right/deer_vla (2); if one of them is the policy node, name it with --node"
    ]
    renamed, rows = replayed(path, node="/left/arm_policy")
    assert renamed.parameter_events == 1 and all(row["exit_index"] == 5 for row in rows)
    own = write(tmp_path / "own", [parameter_event(start, "/left/deer_vla", average_fraction=1.0), *found])
    obeyed, rows = replayed(own)
    assert obeyed.parameter_events == 1 and obeyed.notes == []
    assert all(row["exit_index"] == 5 for row in rows)


def found_in(path: Path, tally: Tally | None = None, **how) -> dict[str, str]:
    with Recording(path) as recording:
        return find_topics(recording, how.pop("renames", {}), ("instruction",), tally or Tally(), **how)


def test_of_two_robots_one_topic_chooses_the_robot_and_outputs_of_the_other_are_left_out(tiny, tmp_path):
    target = dataclasses.replace(records([POSE], tiny)[0], topic="/target_pose")
    right = in_namespace([*records(INPUTS, tiny), target], "/right")
    left = in_namespace(records(INPUTS, tiny), "/left")
    path = write(tmp_path / "both", [*left, *right])
    with pytest.raises(UserError, match="/left/camera/static/image_raw, /right/.* choose with --topic"):
        found_in(path)
    tally = Tally()
    chosen = found_in(path, tally, renames={"ee_pose": "/left/ee_pose"})
    assert set(chosen.values()) == {f"/left{topic}" for topic in INPUTS}
    assert tally.lines() == [
        "/right/target_pose: 1 left out: not in the namespace /left of this robot: name it with --topic "
        "target_pose:=/right/target_pose if it belongs to it"
    ]
    assert found_in(path, renames={"ee_pose": "/right/ee_pose"})["target_pose"] == "/right/target_pose"
    mixed = [each for each in left if not each.topic.endswith("ee_pose")]
    mixed += [each for each in right if each.topic.endswith("ee_pose")]
    mixed = write(tmp_path / "mixed", mixed)
    with pytest.raises(UserError, match=r"several namespaces .*--topic ee_pose:=/right/ee_pose --topic"):
        found_in(mixed)
    named = {topic[1:]: f"/left{topic}" for topic in INPUTS} | {"ee_pose": "/right/ee_pose"}
    assert found_in(mixed, renames=named) == named
    for name in ("camera/static/image_raw", "camera/gripper/image_raw", "instruction"):
        del named[name]
        with pytest.raises(UserError, match=f"several namespaces .*--topic {name}:=/left/{name}"):
            found_in(mixed, renames=named)


def test_a_named_node_chooses_the_topics_in_its_namespace_and_a_named_topic_comes_first(tiny, tmp_path):
    def all_in(namespace: str) -> dict[str, str]:
        return {topic[1:]: f"{namespace}{topic}" for topic in (*INPUTS, "/target_pose")}

    target = dataclasses.replace(records([POSE], tiny)[0], topic="/target_pose")
    found = [*records(INPUTS, tiny), target]
    two = write(tmp_path / "two", [*in_namespace(found, "/cell/left"), *in_namespace(found, "/cell/right")])
    with pytest.raises(UserError, match="could all be .* choose with --topic .* or --node NAME"):
        found_in(two)
    assert found_in(two, node="/cell/left/deer_vla") == all_in("/cell/left")
    assert found_in(two, node="cell/right/arm_policy") == all_in("/cell/right")
    shared = write(tmp_path / "shared", [*found, *in_namespace(found, "/left")])
    assert found_in(shared) == found_in(shared, node="/deer_vla") == all_in("")
    assert found_in(shared, node="/left/deer_vla") == all_in("/left")
    scene = {"camera/static/image_raw": STATIC}
    assert found_in(shared, node="/left/deer_vla", renames=scene) == all_in("/left") | scene
    only_pose = write(tmp_path / "pose", [*found, *in_namespace(records([POSE], tiny), "/left")])
    assert found_in(only_pose, node="/left/deer_vla") == all_in("") | {"ee_pose": "/left/ee_pose"}
    tally = Tally()
    assert found_in(only_pose, tally, node="/right/deer_vla") == all_in("")
    assert tally.lines() == ["no input is in the namespace of /right/deer_vla: inputs are taken from /"]


def test_the_policy_node_follows_from_the_topics():
    pose, static = "ee_pose", "camera/static/image_raw"
    assert node_of({pose: "/left/ee_pose", static: "/scene/camera/static/image_raw"}) == "/left/deer_vla"
    assert node_of({pose: "/franka/current_pose", static: "/a/b/camera/static/image_raw/compressed"}) == (
        "/a/b/deer_vla"
    )
    assert node_of({pose: "/ee_pose", "deer_vla/step": "/left/arm_policy/step"}) == "/left/arm_policy"
    assert node_of({pose: "/franka/current_pose"}) == "/deer_vla"


def sections(**leashes: float) -> str:
    """A parameter file with a section of one value for each name."""
    return "".join(
        f"{name}:\n  ros__parameters:\n    guard.leash_m: {leash}\n" for name, leash in leashes.items()
    )


@pytest.mark.parametrize("namespace", ["", "/left", "/right", "/cell/left"])
@pytest.mark.parametrize(
    "names,meant",
    [
        (["/left/*"], {"/left"}),
        (["/left/**"], {"/left"}),
        (["/left/**/deer_vla"], {"/left"}),
        (["/left/deer_vla"], {"/left"}),
        (["/*/deer_vla"], {"/left", "/right"}),
        (["/**"], {"", "/left", "/right", "/cell/left"}),
        (["deer_vla"], {""}),
        (["/left/deer_vla", "/right/deer_vla"], {"/left", "/right"}),
    ],
    ids=lambda value: " ".join(sorted(value)),
)
def test_a_parameter_file_counts_for_the_node_of_the_recording_and_is_refused_for_others(
    tiny, tmp_path, namespace, names, meant
):
    """As in ROS 2. Two sections may have different values: the node's one counts."""
    path = write(tmp_path / "bag", in_namespace(records(INPUTS, tiny), namespace))
    file = tmp_path / "cell.yaml"
    leashes = {name: number / 10 for number, name in enumerate(names, start=2)}
    file.write_text(sections(**leashes))
    if namespace in meant:
        expected = leashes.get(f"{namespace}/deer_vla", 0.2)
        assert request(path, file).given["guard.leash_m"] == expected
    else:
        with pytest.raises(UserError) as caught:
            request(path, file)
        assert f"the node {namespace}/deer_vla of {path}, only for /" in str(caught.value)
        assert str(caught.value).endswith(", or name the policy node with --node")


def test_a_parameter_file_for_another_robot_is_obeyed_when_its_node_is_named(tiny, tmp_path):
    path = write(tmp_path / "bag", in_namespace(records(INPUTS, tiny), "/left"))
    file = tmp_path / "right.yaml"
    file.write_text(sections(**{"/right/deer_vla": 0.2}))
    assert decided(path, params=file, node="/right/deer_vla") == decided(tiny)


@pytest.mark.parametrize("command", ["convert-bag", "calibrate"])
def test_convert_bag_and_calibrate_match_a_parameter_file_with_the_node_as_replay_does(
    tiny, tmp_path, capsys, command
):
    left = write(tmp_path / "left", in_namespace(records(INPUTS, tiny), "/left"))
    right = write(tmp_path / "right", in_namespace(records(INPUTS, tiny), "/right"))
    shutil.copytree(EMBEDDED, tmp_path / "own")
    options = {"convert-bag": ["--out", str(tmp_path / "set")]}
    options["calibrate"] = ["--checkpoint", str(tmp_path / "own")]
    file = tmp_path / "cell.yaml"
    asked = [command, *options[command], "--params", str(file)]
    file.write_text(sections(**{"/right/deer_vla": 0.2}))
    assert main([*asked, str(left)]) == 1
    told = capsys.readouterr().err
    assert f"for the node /left/deer_vla of {left}, only for /right/deer_vla" in told
    file.write_text(sections(**{"/left/deer_vla": 0.2, "/right/deer_vla": 0.3}))
    assert main([*asked, str(left), str(right)]) == 1
    assert f"different parameters for /right/deer_vla of {right}" in capsys.readouterr().err


def restamped(found: list[Record], shift) -> list[Record]:
    """The messages with other header stamps. shift: new stamp [ns] from the index and the stamp [ns]."""
    from deer_vla_ros.bag.cdr import types

    result = []
    for index, each in enumerate(found):
        message = decode(each)
        if hasattr(message, "header"):
            now = shift(index, message.header.stamp.sec * SECOND + message.header.stamp.nanosec)
            message.header.stamp.sec, message.header.stamp.nanosec = divmod(now, SECOND)
            each = dataclasses.replace(each, data=bytes(types().serialize_cdr(message, each.type)))
        result.append(each)
    return result


def test_stamps_of_zero_are_a_hold_with_its_reason(short, tmp_path):
    path = write(tmp_path / "bag", restamped(records(INPUTS, short), lambda index, now: 0))
    with pytest.raises(UserError, match="STATIC_UNSTAMPED.*have the camera driver stamp its images"):
        decisions(path)


def test_stamps_of_another_clock_say_what_to_do_and_then_it_works(short, plain, tmp_path):
    found = records(INPUTS, short)
    path = write(tmp_path / "bag", restamped(found, lambda index, now: now - 1_700_000_000 * SECOND))
    with pytest.raises(UserError, match="by another clock: replay with --clock header"):
        decisions(path)
    moved = [row["action"] for row in decisions(path, clock="header")]
    assert moved == [row["action"] for row in plain]


def test_a_clock_that_jumps_back_is_a_hold_and_a_new_episode(short, plain, tmp_path):
    found = records(INPUTS, short)
    length = found[-1].time_ns - found[0].time_ns + 100 * MS
    late = [dataclasses.replace(each, time_ns=each.time_ns + length) for each in found]
    path = write(tmp_path / "bag", [*found, *late])  # Stamps begin again; times of receipt go on.
    result, rows = replayed(path, clock="receive")
    assert result.hold_reasons["STATIC_STALE"] >= 1 and len(rows) == len(plain)
    again, _ = replayed(path, clock="header")
    assert len(again.steps) >= 2 * len(rows) - 5, "the controller hears of the jump and goes on"


def test_by_header_stamps_one_wild_stamp_is_left_alone_and_a_clock_that_was_set_is_followed(
    short, plain, tmp_path
):
    times = Stamps("header")
    assert [times.time(0, stamp) for stamp in (5, 3, None, 7)] == [5, 5, 5, 7]
    hour = 3600 * SECOND
    assert [times.time(0, stamp) for stamp in (8, hour, 9, hour, 10)] == [8, 8, 9, 9, 10]
    assert [times.time(0, hour + n) for n in range(6)] == [10, 10, 10, 10, hour + 4, hour + 5]
    assert [times.time(0, 20 + n) for n in range(5)][-1] == 24
    found = records(INPUTS, short)
    grippers = [index for index, each in enumerate(found) if each.topic == GRIPPER]
    wild = write(tmp_path / "wild", restamped(found, lambda index, now: now + hour * (index == grippers[5])))
    assert len(decisions(wild, clock="header")) >= len(plain) - 1


def test_two_instructions_at_once_the_newest_wins(short, tmp_path):
    found = records(INPUTS, short)
    start = found[0].time_ns
    both = [
        said("open the drawer", start),
        said("lift the red block", start),
        *(each for each in found if each.topic != INSTRUCTION),
    ]
    rows = decisions(write(tmp_path / "bag", both))
    assert {row["instruction"] for row in rows} == {"lift the red block"}


def test_a_message_that_cannot_be_decoded_is_counted_and_the_others_are_used(short, tmp_path):
    found = records(INPUTS, short)
    frames = [index for index, each in enumerate(found) if each.topic == STATIC]
    found[frames[4]] = dataclasses.replace(found[frames[4]], data=found[frames[4]].data[:50])
    broken = decode(found[frames[9]])
    broken.encoding = "yuv17"
    from deer_vla_ros.bag.cdr import types

    found[frames[9]] = dataclasses.replace(
        found[frames[9]], data=bytes(types().serialize_cdr(broken, "sensor_msgs/msg/Image"))
    )
    result, rows = replayed(write(tmp_path / "bag", found))
    assert len(rows) == len(frames) - 2
    told = result.tally.lines()
    assert len(told) == 2 and all(line.startswith(f"{STATIC}: 1 left out: ") for line in told)
    assert "yuv17" in told[0] + told[1] and "are no sensor_msgs/msg/Image" in told[0] + told[1]


def test_a_topic_whose_type_nobody_knows_is_left_out_of_the_copy_and_said(short, plain, tmp_path):
    import sqlite3

    strangers = [
        dataclasses.replace(said("?", each.time_ns), topic="/odd") for each in records([POSE], short)
    ]
    path = write(tmp_path / "bag", [*records(INPUTS, short), *strangers], StoragePlugin.SQLITE3)
    with sqlite3.connect(path / "bag.db3") as database:
        database.execute("UPDATE topics SET type = 'odd_msgs/msg/Odd' WHERE name = '/odd'")
        database.execute("DELETE FROM message_definitions")
    metadata = path / "metadata.yaml"
    text = metadata.read_text()
    at = text.index("name: /odd")
    metadata.write_text(text[:at] + text[at:].replace("std_msgs/msg/String", "odd_msgs/msg/Odd", 1))
    rows = []
    result = run(request(path), "test", tmp_path / "out", on_row=rows.append)
    assert result.tally.lines() == [
        "/odd: 1 left out: not copied: odd_msgs/msg/Odd is not defined in the recording, nor installed here"
    ]
    assert records(INPUTS, tmp_path / "out" / "bag") == records(INPUTS, short) and len(rows) == len(plain)


def test_a_type_that_only_the_recording_knows_is_copied_from_its_file_alone(short, tmp_path):
    """An MCAP file without its folder, or from an older recorder, has no hash of the type."""
    from rosbags.rosbag2 import Writer
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore

    store = get_typestore(Stores.ROS2_JAZZY)
    store.register(get_types_from_msg("float64 torque", "my_msgs/msg/Torque"))
    with Writer(tmp_path / "bag", version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        kinds = {each.topic: each.type for each in records(INPUTS, short)} | {"/torque": "my_msgs/msg/Torque"}
        topics = {topic: writer.add_connection(topic, kind, typestore=store) for topic, kind in kinds.items()}
        for each in records(INPUTS, short):
            writer.write(topics[each.topic], each.time_ns, each.data)
        data = store.serialize_cdr(store.types["my_msgs/msg/Torque"](torque=2.5), "my_msgs/msg/Torque")
        writer.write(topics["/torque"], each.time_ns, data)
    (file,) = (tmp_path / "bag").glob("*.mcap")
    result = run(request(file), "test", tmp_path / "out")
    assert result.tally.lines() == []
    assert [bytes(each.data) for each in records(["/torque"], tmp_path / "out" / "bag")] == [bytes(data)]


# Replays that follow recorded steps.


@pytest.fixture(scope="module")
def live(whole) -> Path:
    """A recording with `~/step` messages: the output of the first budget."""
    return next(whole.glob("*0.25*/bag"))


def test_following_recorded_steps_decides_the_same(live):
    result, rows = replayed(live, follow=True, budget="average_fraction=0.25")
    assert (
        len(rows) == len(records(["/deer_vla/step"], live))
        and result.differences == []
        and result.tally.lines() == []
    )


def test_a_recorded_step_that_is_decided_otherwise_is_named_and_fails(live, tmp_path, capsys):
    arguments = ["replay", str(live), "--duration", "2", "--follow", "--json", str(tmp_path / "figures.json")]
    assert main([*arguments, "--budget", "average_fraction=0.25"]) == 0
    assert main([*arguments, "--budget", "average_fraction=0.9"]) == 1
    assert "decided differently in " in capsys.readouterr().out
    (figures,) = json.loads((tmp_path / "figures.json").read_text())["runs"]
    assert figures["followed_differently"][0].startswith("step 0 (stamp ")


def test_a_followed_step_whose_frame_is_missing_ends_what_can_be_compared_until_an_episode_begins(
    live, tmp_path
):
    found = records([*INPUTS, "/deer_vla/step"], live)
    steps = [decode(each) for each in found if each.topic == "/deer_vla/step"]
    gone = 5
    (frame,) = [
        index
        for index, each in enumerate(found)
        if each.topic == STATIC and decoded_stamp(each) == nanoseconds(steps[gone].static_stamp)
    ]
    result, rows = replayed(
        write(tmp_path / "bag", found[:frame] + found[frame + 1 :]),
        follow=True,
        budget="average_fraction=0.25",
    )
    begins = next(index for index, step in enumerate(steps) if index > gone and step.episode_step == 0)
    assert [row["stamp"] for row in rows] == [
        nanoseconds(step.header.stamp) for index, step in enumerate(steps) if index < gone or index >= begins
    ]
    told = "".join(result.tally.lines())
    assert (
        f"camera/static/image_raw of step {gone} is not in the recording" in told
        and "its memory is not known" in told
    )


def without_steps(live: Path, lost: set[int], out: Path, change=None) -> Path:
    """A copy of the recording without the `~/step` messages of these numbers. change: changes the others."""
    from deer_vla_ros.bag.cdr import types

    kept = []
    for each in records([*INPUTS, "/deer_vla/step"], live):
        if each.topic == "/deer_vla/step":
            step = decode(each)
            if step.step in lost:
                continue
            if change is not None:
                change(step)
                each = dataclasses.replace(each, data=bytes(types().serialize_cdr(step, STEP_TYPE)))
        kept.append(each)
    return write(out, kept)


@pytest.mark.parametrize(
    "lost,how",
    [
        ({15}, "parameters"),
        ({15}, "budget"),
        ({5, 6, 9}, "parameters"),
        ({0}, "parameters"),
        (set(range(15, 20)), "parameters"),
    ],
    ids=["one", "one, budget given", "two gaps", "the first", "with a beginning"],
)
def test_what_follows_lost_steps_is_unknown_and_not_different(live, tmp_path, lost, how):
    steps = [decode(each) for each in records(["/deer_vla/step"], live)][:50]
    kept = without_steps(live, lost, tmp_path / "bag")
    file = tmp_path / "cell.yaml"
    file.write_text("/**:\n  ros__parameters:\n    budget.average_fraction: 0.25\n")
    asked = {"params": file} if how == "parameters" else {"budget": "average_fraction=0.25"}
    result, rows = replayed(kept, follow=True, duration_s=4.95, **asked)
    known, expected = True, []
    for step in steps:
        known = step.step not in lost and (known or step.episode_step == 0)
        expected += [nanoseconds(step.header.stamp)] if known else []
    assert [row["stamp"] for row in rows] == expected and len(expected) < len(steps) - len(lost)
    assert result.differences == []
    later = sum(stamp > nanoseconds(steps[max(lost)].header.stamp) for stamp in expected)
    assert later > 10, "episodes after the gap are repeated"
    followed = result.followed
    assert followed.not_repeated == len(steps) - len(lost) - len(expected)
    if how == "parameters":
        assert followed.unknown == followed.not_repeated
        assert later <= followed.recorded_rule <= later + 5
    else:
        assert followed.own_rule >= later, "whether it was the live node's budget is not known"
    said = "; ".join(result.notes)
    gaps = {5: "steps 5 to 6, step 9 are missing", 0: "1 steps before the recording are not known"}
    gaps[15] = "step 15 is missing" if len(lost) == 1 else "steps 15 to 19 are missing"
    assert gaps[min(lost)] in said


def test_after_lost_steps_a_decision_that_differs_is_found_in_a_later_episode(live, tmp_path, capsys):
    steps = [decode(each) for each in records(["/deer_vla/step"], live)]
    begins = [step.step for step in steps if step.episode_step == 0]
    file = tmp_path / "cell.yaml"
    file.write_text("/**:\n  ros__parameters:\n    budget.average_fraction: 0.25\n")

    def change(step):
        if step.step == begins[2] + 3:
            step.action = step.action + np.float32(0.125)

    changed = without_steps(live, {begins[1] + 1}, tmp_path / "changed", change)
    arguments = [
        "--follow",
        "--params",
        str(file),
        "--golden",
        str(tmp_path / "golden.csv"),
        "--duration",
        "5",
    ]
    assert main(["replay", str(changed), *arguments]) == 1
    told = capsys.readouterr().out
    assert "decided differently in 1 steps, first: step " in told and "action is" in told
    assert f"unknown in {begins[2] - begins[1] - 2}\n" in told


def test_the_steps_of_a_node_with_another_name_are_followed_when_it_is_named(live, tmp_path):
    found = in_namespace(records([*INPUTS, "/deer_vla/step"], live, 1.0), "/left")
    renamed = [
        dataclasses.replace(each, topic=each.topic.replace("/deer_vla/", "/arm_policy/")) for each in found
    ]
    path = write(tmp_path / "bag", renamed)
    asked = {"follow": True, "budget": "average_fraction=0.25"}
    result, rows = replayed(path, node="/left/arm_policy", **asked)
    assert len(rows) == 10 and result.differences == [] and result.followed.unknown == 0
    for node in ("", "/left/deer_vla"):
        with pytest.raises(UserError, match="no topic deer_vla/step to follow: .* --topic deer_vla/step:="):
            decisions(path, node=node, **asked)


def test_a_step_that_was_recorded_twice_is_repeated_once(live, tmp_path):
    found = records([*INPUTS, "/deer_vla/step"], live)
    place = [index for index, each in enumerate(found) if each.topic == "/deer_vla/step"][3]
    path = write(tmp_path / "bag", [*found[: place + 1], found[place], *found[place + 1 :]])
    result, rows = replayed(path, follow=True, budget="average_fraction=0.25", duration_s=2.0)
    assert result.differences == [] and [row["step"] for row in rows] == list(range(20))
    assert result.tally.lines() == ["/deer_vla/step: 1 left out: recorded twice"]


@pytest.mark.parametrize(
    "moves", [{10: 11}, {0: 1}, {3: 7, 12: 13}, {18: 19}], ids=["one", "the first", "two", "the last"]
)
def test_steps_that_were_recorded_out_of_order_are_repeated_in_their_order(live, tmp_path, moves):
    """moves: each of these steps is recorded just after the other one."""
    found = records([*INPUTS, "/deer_vla/step"], live, 2.0)
    times = {decode(each).step: each.time_ns for each in found if each.topic == "/deer_vla/step"}
    moved = [
        dataclasses.replace(each, time_ns=times[moves[step]] + 1)
        if each.topic == "/deer_vla/step" and (step := decode(each).step) in moves
        else each
        for each in found
    ]
    path = write(tmp_path / "bag", sorted(moved, key=lambda each: each.time_ns))
    result, rows = replayed(path, follow=True, budget="average_fraction=0.25")
    assert [row["step"] for row in rows] == sorted(times)
    assert result.differences == [] and result.notes == [] and result.tally.lines() == []


def test_a_node_that_was_started_again_is_followed_in_the_order_of_its_steps(live, tmp_path):
    found = records([*INPUTS, "/deer_vla/step"], live, 1.0)
    length = found[-1].time_ns - found[0].time_ns + SECOND // 10
    from deer_vla_ros.bag.cdr import types

    again = []
    for each in restamped(found, lambda index, now: now + length):
        if each.topic == "/deer_vla/step":
            step = decode(each)
            for stamp in (step.gripper_stamp, step.static_stamp, step.pose_stamp):
                stamp.sec, stamp.nanosec = divmod(nanoseconds(stamp) + length, SECOND)
            each = dataclasses.replace(each, data=bytes(types().serialize_cdr(step, STEP_TYPE)))
        again.append(dataclasses.replace(each, time_ns=each.time_ns + length))
    path = write(tmp_path / "bag", [*found, *again])
    result, rows = replayed(path, follow=True, budget="average_fraction=0.25")
    assert [row["stamp"] for row in rows] == sorted(row["stamp"] for row in rows) and len(rows) == 20
    assert result.followed.not_repeated == 0 and result.followed.gaps == []


def test_a_recording_that_begins_while_the_node_was_running_says_what_cannot_be_known(live):
    steps = [decode(each) for each in records(["/deer_vla/step"], live)]
    begins = next(step for step in steps[1:] if step.episode_step == 0)
    start_s = (nanoseconds(begins.static_stamp) - nanoseconds(steps[0].static_stamp)) / SECOND - 0.01
    result, rows = replayed(live, follow=True, start_s=start_s, duration_s=1.0)
    assert rows and rows[0]["episode_step"] == 0
    assert f"{begins.step} steps before the recording" in "".join(result.notes)


def test_a_damaged_recording_leaves_nothing_under_the_final_name(short, tmp_path, capsys):
    path = write(tmp_path / "bag", records(INPUTS, short), compression=CompressionMode.STORAGE)
    file = path / "bag.mcap"
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = bytes(4000)
    file.write_bytes(data)
    assert main(["replay", str(path), "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "damaged" in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


# Golden files.


def test_a_golden_file_is_kept_and_the_first_difference_named(tiny, tmp_path, capsys):
    golden = tmp_path / "golden.csv"
    assert main(["replay", str(tiny), "--golden", str(golden)]) == 0
    assert main(["replay", str(tiny), "--check", str(golden)]) == 0
    assert assert_replays(tiny, golden) == 10
    lines = golden.read_text().splitlines()
    fields = lines[7].split(",")
    at = DECIDED.index("gripper_probability")
    fields[at] = repr(float(fields[at]) - 0.01)
    golden.write_text("\n".join([*lines[:7], ",".join(fields), *lines[8:]]) + "\n")
    capsys.readouterr()
    assert main(["replay", str(tiny), "--check", str(golden), "--tolerance", "0.001"]) == 1
    assert (
        "step 6 " in (told := capsys.readouterr().out)
        and "gripper_probability" in told
        and "0.01 apart" in told
    )
    assert main(["replay", str(tiny), "--check", str(golden), "--tolerance", "0.02"]) == 0
    with pytest.raises(AssertionError, match="step 6 .*gripper_probability"):
        assert_replays(tiny, golden)
    golden.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(AssertionError, match="the golden file ends before"):
        assert_replays(tiny, golden)
    golden.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not the decisions of a replay"):
        assert_replays(tiny, golden)
    with pytest.raises(UserError, match="cannot be read"):
        assert_replays(tiny, tmp_path / "none.csv")


@pytest.mark.parametrize(
    "arguments,words",
    [
        ([], "no output is asked for"),
        (["--golden", "a", "--check", "b"], "give one of them"),
        (
            ["--golden", "a", "--budget", "average_gmac=1", "--budget", "average_gmac=2"],
            "give --budget once, or not at all",
        ),
        (["--golden", "a", "--budget", "average_gmac"], "NAME=VALUE with a positive number"),
        (["--golden", "a", "--budget", "cheap=1"], "as NAME one of average_gmac"),
        (["--golden", "a", "--duration", "0"], "--duration is 0"),
        (["--golden", "a", "--topic", "x"], "give NAME:=TOPIC"),
        (["--golden", "a", "--params", "none.yaml"], "cannot be read"),
        (["--golden", "a", "--latency-table", "none.json"], "cannot be read"),
        (["--golden", "a", "--budget", "average_fraction=0.001"], "not at least the"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_in_one_line(short, arguments, words, capsys):
    assert main(["replay", str(short), *arguments]) == 1
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1
