"""Tests that LeRobotDatasets become right training data, and that what cannot is named or counted."""

import json
import re
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lerobot_sets import FPS, GRIPPER, STATIC, DatasetPlan, gripper, make, number_in, pose
from scipy.spatial.transform import Rotation

from deer_vla_ros.__main__ import main
from deer_vla_ros.bag.calvin_files import read_action_space, read_annotations, read_step
from deer_vla_ros.bag.conversion import convert
from deer_vla_ros.bag.observed import ObservedStep
from deer_vla_ros.control.motion import motion_of, moved
from deer_vla_ros.control.types import Pose
from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.types import Observation
from deer_vla_ros.lab.lerobot.lerobot_columns import LerobotColumns
from deer_vla_ros.lab.lerobot.lerobot_reading import spacing
from deer_vla_ros.lab.lerobot.video_frames import VideoFrames
from deer_vla_ros.lab.training.calvin import CalvinWindows
from deer_vla_ros.model.action_space import ActionSpace

ARRAYS = ("rgb_static", "rgb_gripper", "rel_actions", "actions", "robot_obs")


def run(folder, out, *changes: str) -> int:
    """Runs the command. changes: options in place of the usual ones, or in addition."""
    options = {
        "--static": STATIC,
        "--gripper": GRIPPER,
        "--state": "observation.state",
        "--gripper-range": "1 0",
    }
    given_options = [
        text for name, value in options.items() if name not in changes for text in (name, *value.split())
    ]
    return main(["convert-lerobot", str(folder), "--out", str(out), *given_options, *changes])


def converted(folder, out, *changes: str) -> dict:
    """The figures that the command reports."""
    assert run(folder, out, "--json", str(out.with_suffix(".json")), *changes) == 0
    return json.loads(out.with_suffix(".json").read_text())


def steps_of(out) -> list[tuple[str, list[dict]]]:
    """The instruction and the steps of each episode."""
    folder = out / "training"
    return [
        (each.text, [read_step(folder, number, ARRAYS) for number in range(each.first, each.end)])
        for each in read_annotations(folder)
    ]


@pytest.mark.parametrize(
    "version, codec",
    [
        ("v2.1", "h264"),
        ("v2.1", "av1"),
        ("v2.1", "image"),
        ("v3.0", "h264"),
        ("v3.0", "av1"),
        ("v3.0", "image"),
    ],
)
def test_every_format_gives_the_frame_pose_and_gripper_of_each_moment(tmp_path, version, codec):
    folder = make(tmp_path / "lerobot", DatasetPlan(version, codec=codec))
    told = converted(folder, tmp_path / "set", "--rate-hz", "10")
    found = steps_of(tmp_path / "set")
    assert [(text, len(steps)) for text, steps in found] == [("lift the block", 9), ("open the drawer", 7)]
    for first, (_, steps) in zip((0, 30), found):
        for k, step in enumerate(steps):
            row = first + 3 * k
            assert number_in(step["rgb_static"]) == number_in(step["rgb_gripper"]) == row
            assert step["robot_obs"][:3] == pytest.approx(pose(row)[:3], abs=1e-6)
            assert step["actions"][:3] == pytest.approx(pose(row + 3)[:3], abs=1e-6)
            assert step["rel_actions"][6] == (-1.0 if gripper(row + 2) else 1.0), "told before the next step"
    assert told["steps"] == 16 and "36 rows between the steps" in told["left_out"]
    assert read_action_space(tmp_path / "set" / "training").rate_hz == 10
    assert set(CalvinWindows([tmp_path / "set" / "training"]).texts) == {"lift the block", "open the drawer"}


def xyz_quaternion(i: int, order: str) -> list[float]:
    quaternion = Rotation.from_euler("xyz", pose(i)[3:]).as_quat()
    return [*pose(i)[:3], *(np.roll(quaternion, 1) if order == "wxyz" else quaternion)]


@pytest.mark.parametrize(
    "state, options",
    [
        (lambda i: xyz_quaternion(i, "xyzw"), ["--pose-format", "xyz_quat_xyzw"]),
        (lambda i: xyz_quaternion(i, "wxyz"), ["--pose-format", "xyz_quat_wxyz"]),
        (
            lambda i: [*pose(i)[:3], *Rotation.from_euler("xyz", pose(i)[3:]).as_rotvec()],
            ["--pose-format", "xyz_rotvec"],
        ),
        (
            lambda i: [1000 * each for each in pose(i)[:3]] + list(np.degrees(pose(i)[3:])),
            ["--position-unit", "mm", "--angle-unit", "deg"],
        ),
        (lambda i: [9.0, *pose(i)[3:], 9.0, *pose(i)[:3]], ["--pose-at", "5", "1"]),
    ],
)
def test_every_way_to_write_a_pose_gives_the_same_actions(tmp_path, state, options):
    plan = DatasetPlan(codec="image", lengths=(12,), tasks=("go",), names=None)
    converted(make(tmp_path / "plain", plan), tmp_path / "first")
    plan.state = state
    converted(make(tmp_path / "other", plan), tmp_path / "second", *options)
    for one, other in zip(steps_of(tmp_path / "first"), steps_of(tmp_path / "second"), strict=True):
        for step, same in zip(one[1], other[1], strict=True):
            assert same["rel_actions"] == pytest.approx(step["rel_actions"], abs=2e-5)


class Collected:
    """An episode writer that keeps the steps."""

    steps: list = []

    def __init__(self, folder, space, **about):
        folder.mkdir()
        Collected.steps = []

    def add(self, step):
        Collected.steps.append(step)

    def end_episode(self, text):
        pass

    def close(self):
        pass


number = st.floats(-0.5, 0.5)
poses = st.lists(
    st.tuples(number, number, number, st.floats(-3.1, 3.1), st.floats(-1.5, 1.5), st.floats(-3.1, 3.1)),
    min_size=4,
    max_size=8,
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(poses)
def test_actions_lead_from_the_first_pose_through_all_others(tmp_path, given_poses):
    # Given: an action space in which every motion between two poses is below 1
    space = ActionSpace("base", 2.0, np.pi, 1.0, 0.0, 10.0)
    columns = LerobotColumns("a", "b", ("state",), 1.0, 0.0)
    wanted = [columns.pose([np.array(each)]) for each in given_poses]
    image = np.zeros((2, 2, 3), np.uint8)
    moments = [
        ObservedStep(
            "go",
            Observation(image, image, tcp),
            k * 10**8,
            Pose(tcp[:3], tcp[3:]),
            1.0,
            None,
        )
        for k, tcp in enumerate(wanted)
    ]
    # When
    convert([(tmp_path, moments)], tmp_path / "out", space, 10.0, "measured", writer=Collected)
    shutil.rmtree(tmp_path / "out")
    # Then
    arm = Pose(wanted[0][:3], wanted[0][3:])
    for step, there in zip(Collected.steps, wanted[1:], strict=True):
        arm = moved(arm, *motion_of(step.rel_actions[:6], space))
        assert arm.position == pytest.approx(there[:3], abs=1e-9)
        turn = Rotation.from_quat(arm.quaternion) * Rotation.from_quat(there[3:]).inv()
        assert turn.magnitude() < 1e-7


def test_rates_that_rows_can_give():
    assert spacing(30, 10) == 3 and spacing(30, 30) == 1 and spacing(29.97, 10) == 3
    assert spacing(50, 15) == pytest.approx(50 / 15), "steps of 3 and 4 rows"
    with pytest.raises(UserError, match="cannot be made up: give 10 or less"):
        spacing(10, 30)
    with pytest.raises(UserError, match="too uneven: give 30 or 15"):
        spacing(30, 20)


def test_what_is_left_out_is_counted_and_nothing_is_bridged(tmp_path):
    plan = DatasetPlan(
        version="v3.0",
        lengths=(60, 30, 30, 6),
        tasks=("lift", None, "open", "short"),
        lost=(33,),
        lost_rows=(105,),
    )
    told = converted(make(tmp_path / "lerobot", plan), tmp_path / "set")
    rows = [[number_in(step["rgb_static"]) for step in steps] for _, steps in steps_of(tmp_path / "set")]
    assert rows == [
        list(range(0, 30, 3)),
        list(range(36, 57, 3)),
        list(range(90, 102, 3)),
        list(range(108, 117, 3)),
    ]
    assert told["gaps"] == 2 and told["short"] == 1
    for line in (
        f"1 frames that the video of {STATIC} lacks",
        "1 rows that the dataset lacks",
        "1 episodes without a task",
        "1 episodes of fewer than 3 steps",
    ):
        assert line in told["left_out"]


def test_an_instruction_in_place_of_the_tasks(tmp_path):
    folder = make(tmp_path / "lerobot", DatasetPlan(codec="image", tasks=(None, None)))
    converted(folder, tmp_path / "set", "--instruction", "push the block")
    assert [text for text, _ in steps_of(tmp_path / "set")] == ["push the block"] * 2


@pytest.mark.parametrize(
    "before, names, is_open",
    [
        (1.0, ("gripper", "gripper"), False),  # the state repeats the last command
        (0.08, ("gripper", "gripper"), True),  # the state is a width: the row's own command is taken
        (1.0, ("gripper", "hand"), True),
        (1.0, None, True),
    ],
)
def test_what_the_gripper_was_told_before_the_first_row(tmp_path, before, names, is_open):
    plan = DatasetPlan(codec="image", lengths=(12,), tasks=("go",), state=lambda i: [*pose(i), before])
    folder = make(tmp_path / "lerobot", plan)
    info = json.loads((folder / "meta/info.json").read_text())
    axes = ["x", "y", "z", "roll", "pitch", "yaw"]
    for key, name in zip(("observation.state", "action"), names or (None, None), strict=True):
        info["features"][key]["names"] = name and [*axes, name]
    (folder / "meta/info.json").write_text(json.dumps(info))
    converted(folder, tmp_path / "set")
    ((_, steps),) = steps_of(tmp_path / "set")
    assert steps[0]["robot_obs"][14] == (1.0 if is_open else -1.0), "row 0 tells it to open"


def test_a_measured_gripper_is_that_of_the_next_step(tmp_path, capsys):
    folder = make(tmp_path / "lerobot", DatasetPlan(codec="image"))
    converted(folder, tmp_path / "set", "--gripper-from", "observation.state:6", "--rate-hz", "10")
    for k, step in enumerate(steps_of(tmp_path / "set")[0][1]):
        assert step["rel_actions"][6] == (-1.0 if gripper(3 * k + 3) else 1.0)
    converted(folder, tmp_path / "all_open", "--gripper-range", "100", "0")
    assert "the gripper is open after 16 of 16 steps" in capsys.readouterr().out


JOINTS = DatasetPlan(
    codec="image", names=["shoulder_pan.pos", "shoulder_lift.pos", "elbow.pos", "a", "b", "c", "d"]
)


@pytest.mark.parametrize(
    "plan, options, words",
    [
        (DatasetPlan(), ["--static", "scene"], f"--static is scene: .*give one of {STATIC} .image 64x64x3.,"),
        (DatasetPlan(), ["--gripper", STATIC], "needs two cameras"),
        (DatasetPlan(cameras=(STATIC,)), [], f"has one camera, {STATIC}: the network needs two"),
        (
            DatasetPlan(),
            ["--state", "pose"],
            "observation.state .float32 7 .x y z roll pitch yaw gripper.., action",
        ),
        (DatasetPlan(), ["--state", STATIC], "no such column of numbers"),
        (JOINTS, [], "these are joints.*poses of the TCP are needed"),
        (DatasetPlan(), ["--pose-at", "8"], "position of --pose-format xyz_rpy would end at number 11"),
        (DatasetPlan(), ["--pose-at", "4"], "rotation of --pose-format xyz_rpy would end at number 10"),
        (DatasetPlan(), ["--pose-format", "xyz_quat_xyzw"], "has length .*give --pose-format"),
        (DatasetPlan(state=lambda i: [400.0] * 7), [], "further than 10 m: give --position-unit"),
        (
            DatasetPlan(state=lambda i: [0.4, 0, 0, 180.0, 0, 90, 0]),
            [],
            "more than a turn: give --angle-unit",
        ),
        (
            DatasetPlan(state=lambda i: [np.nan] * 7),
            [],
            "episode 0 at 0.000 s: the pose is .*has to be finite",
        ),
        (DatasetPlan(), ["--gripper-from", "action:9"], "action:9: action .float32 7. has no such number"),
        (DatasetPlan(), ["--gripper-from", "action"], "give KEY:N"),
        (DatasetPlan(), ["--gripper-range", "0", "0"], "give two values"),
        (DatasetPlan(tasks=(None, None)), [], "no episode of more than 2 steps"),
        (DatasetPlan(version="v2.0"), [], "format v2.0: v2.1 and v3.0 are read"),
    ],
)
def test_wrong_options_and_datasets_are_refused_in_one_line(tmp_path, capsys, plan, options, words):
    plan.codec = "image"
    assert run(make(tmp_path / "lerobot", plan), tmp_path / "set", *options) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert re.search(words, error), error
    assert [each.name for each in tmp_path.iterdir()] == ["lerobot"]


@pytest.mark.parametrize(
    "options",
    [
        ["--static", "x", "--gripper", "x", "--state", "x"],
        ["--gripper", "x"],
        ["--state", "observation.state", "x"],
        ["--gripper-from", "x:0"],
    ],
)
def test_a_key_that_is_not_there_lists_every_column(tmp_path, capsys, options):
    assert run(make(tmp_path / "lerobot", DatasetPlan(codec="image")), tmp_path / "set", *options) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{options[0]} is x: " in error
    for column in (STATIC, GRIPPER, "observation.state", "action"):
        assert f"{column} (" in error


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 99\n"


@pytest.fixture(scope="module")
def whole_sets(tmp_path_factory):
    """A dataset of each format, to be damaged in copies."""
    folder = tmp_path_factory.mktemp("whole")
    return {version: make(folder / version, DatasetPlan(version)) for version in ("v2.1", "v3.0")}


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def without_episode_column(path):
    pq.write_table(pq.read_table(path).drop(["episode_index"]), path)


def of_another_episode(path):
    table = pq.read_table(path)
    pq.write_table(table.set_column(3, "episode_index", pa.array([7] * len(table))), path)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize(
    "pattern, damage, words",
    [
        ("meta/info.json", lambda path: path.unlink(), "no LeRobotDataset"),
        ("meta/info.json", lambda path: path.write_bytes(b"[" * 100_000), "no JSON"),
        ("meta/info.json", lambda path: path.write_text('{"codebase_version": "v3.0"}'), "damaged"),
        ("meta/info.json", lambda path: path.write_bytes(POINTER), "pointer of Git LFS"),
        ("meta/tasks.*", lambda path: path.unlink(), "is missing"),
        ("meta/tasks.*", cut, "damaged|no JSON"),
        (
            "meta/episodes*",
            lambda path: shutil.rmtree(path) if path.is_dir() else path.unlink(),
            "missing|no parquet",
        ),
        ("data/*/*.parquet", lambda path: path.write_bytes(POINTER), "pointer of Git LFS.*git lfs pull"),
        ("data/*/*.parquet", cut, "damaged or cut off"),
        ("data/*/*.parquet", lambda path: path.unlink(), "is missing"),
        ("data/*/*.parquet", without_episode_column, "has no column episode_index"),
        ("data/*/*.parquet", of_another_episode, "has no rows of episode 0"),
        (f"videos/**/*{STATIC}*/**/*.mp4", lambda path: path.write_bytes(POINTER), "pointer of Git LFS"),
        (f"videos/**/*{STATIC}*/**/*.mp4", cut, "no whole video|was cut off"),
        (f"videos/**/*{STATIC}*/**/*.mp4", lambda path: path.write_bytes(b""), "is empty"),
        (f"videos/**/*{STATIC}*/**/*.mp4", lambda path: path.unlink(), "is missing"),
    ],
)
def test_damaged_files_are_named_in_one_line(tmp_path, capsys, whole_sets, version, pattern, damage, words):
    folder = shutil.copytree(whole_sets[version], tmp_path / "lerobot")
    damage(sorted(folder.glob(pattern))[0])
    assert run(folder, tmp_path / "set") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert re.search(words, error), error
    assert [each.name for each in tmp_path.iterdir()] == ["lerobot"]


def test_a_damaged_image_is_named_in_one_line(tmp_path, capsys):
    folder = make(tmp_path / "lerobot", DatasetPlan(codec="image"))
    path = next(folder.glob("data/*/*.parquet"))
    rows = pq.read_table(path).to_pylist()
    for damaged in (b"GIF89a", rows[3][STATIC]["bytes"][:80], b"", None):
        rows[3][STATIC]["bytes"] = damaged
        pq.write_table(pa.Table.from_pylist(rows), path)
        assert run(folder, tmp_path / "set") == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{STATIC} at 0.100 s is no image" in error


def test_paths_that_lead_out_of_the_folder_are_refused(tmp_path, capsys, whole_sets):
    folder = shutil.copytree(whole_sets["v2.1"], tmp_path / "lerobot")
    info = json.loads((folder / "meta/info.json").read_text())
    for template in (
        "../{episode_index}.parquet",
        "/etc/passwd",
        "{episode_index:0999999999d}",
        "{video_key.x}",
    ):
        (folder / "meta/info.json").write_text(json.dumps(info | {"data_path": template}))
        assert run(folder, tmp_path / "set") == 1
        assert "is no path in the folder" in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_remedy(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("deer_vla_ros.lab.lerobot.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run(tmp_path, tmp_path / "set") == 1
    assert "pip install pyarrow" in capsys.readouterr().err


@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_frames_are_found_in_any_order(tmp_path, codec):
    plan = DatasetPlan("v3.0", lengths=(240,), codec=codec, tasks=("go",))
    path = next(make(tmp_path / "lerobot", plan).glob(f"videos/{STATIC}/**/*.mp4"))
    frames = VideoFrames(0.5 / FPS)
    for row in (200, 3, 3, 4, 230, 100, 0, 239):
        assert number_in(frames.at(path, row / FPS + 0.01)) == row
    assert frames.at(path, 240.6 / FPS) is None and frames.at(path, -1.0) is None
    frames.close()
