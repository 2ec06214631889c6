"""Tests of the LeRobotDataset that convert-bag writes: it comes back unchanged, and lerobot reads it."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from bags import TABLE

from deer_vla_ros.__main__ import main
from deer_vla_ros.bag.calvin_files import IMAGES, read_annotations, read_step
from deer_vla_ros.lab.lerobot import lerobot_writing
from deer_vla_ros.lab.lerobot.lerobot_folder import LerobotFolder

COLUMNS = ["--static", "observation.images.static", "--gripper", "observation.images.gripper"]
STATE = ["--state", "observation.state", "--gripper-range", "-1", "1"]
MEAN_LOSS = 5.0
"""Of 255: mean difference that H.264 may make in an image; 3.2 was measured for the gripper camera."""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The table's recording in every format that convert-bag writes."""
    folder = tmp_path_factory.mktemp("written")
    for name in ("calvin", "lerobot", "lerobot-png"):
        assert main(["convert-bag", str(TABLE), "--out", str(folder / name), "--format", name]) == 0
    return folder


def compare(one, other, image_loss: float) -> int:
    """Compares two folders in CALVIN's format, of which the other lacks the last step of each episode."""
    compared = 0
    one, other = one / "training", other / "training"
    for first, second in zip(read_annotations(one), read_annotations(other), strict=True):
        assert (first.text, first.end - first.first - 1) == (second.text, second.end - second.first)
        for k in range(second.end - second.first):
            a, b = (
                read_step(folder, number + k, (*IMAGES, "rel_actions", "robot_obs"))
                for folder, number in ((one, first.first), (other, second.first))
            )
            assert b["rel_actions"] == pytest.approx(a["rel_actions"], abs=1e-5), "state is float32"
            assert b["robot_obs"][:3] == pytest.approx(a["robot_obs"][:3], abs=1e-6)
            assert b["robot_obs"][14] == a["robot_obs"][14], "the gripper before the step"
            for name in IMAGES:
                assert np.abs(a[name].astype(float) - b[name]).mean() <= image_loss
            compared += 1
    return compared


@pytest.mark.parametrize("name, image_loss", [("lerobot", MEAN_LOSS), ("lerobot-png", 0.0)])
def test_what_was_written_comes_back(written, tmp_path, name, image_loss):
    assert (
        main(["convert-lerobot", str(written / name), "--out", str(tmp_path / "back"), *COLUMNS, *STATE]) == 0
    )
    assert compare(written / "calvin", tmp_path / "back", image_loss) == 85


def test_large_files_get_no_further_episode(written, tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot_writing, "DATA_MB", 0)
    monkeypatch.setattr(lerobot_writing, "VIDEO_MB", 0.05)
    monkeypatch.setattr(lerobot_writing, "FILES_PER_CHUNK", 4)
    assert main(["convert-bag", str(TABLE), "--out", str(tmp_path / "set"), "--format", "lerobot"]) == 0
    assert (tmp_path / "set/data/chunk-001/file-001.parquet").is_file(), "six files of one episode each"
    assert len(list((tmp_path / "set/videos").rglob("*.mp4"))) > 2
    assert (
        main(["convert-lerobot", str(tmp_path / "set"), "--out", str(tmp_path / "back"), *COLUMNS, *STATE])
        == 0
    )
    assert compare(written / "calvin", tmp_path / "back", MEAN_LOSS) == 85


def test_the_statistics_are_those_of_the_data(written):
    folder = written / "lerobot-png"
    stats = json.loads((folder / "meta/stats.json").read_text())
    steps = [
        read_step(written / "calvin/training", number, ["actions", "rgb_static"])
        for each in read_annotations(written / "calvin/training")
        for number in range(each.first, each.end)
    ]
    actions = np.array([step["actions"] for step in steps])
    for name, values in (("min", actions.min(0)), ("mean", actions.mean(0)), ("std", actions.std(0))):
        assert stats["action"][name] == pytest.approx(values, abs=1e-4)
    pixels = np.mean([step["rgb_static"].mean((0, 1)) / 255 for step in steps], 0)
    assert np.ravel(stats["observation.images.static"]["mean"]) == pytest.approx(pixels, abs=0.01)
    assert LerobotFolder(folder).total == 6


READ = """
import json, sys
import lerobot
from lerobot.datasets.lerobot_dataset import LeRobotDataset
whole = LeRobotDataset("local/table", root=sys.argv[1], video_backend="pyav")
third = LeRobotDataset("local/table", root=sys.argv[1], video_backend="pyav", episodes=[2])
row = third[len(third) - 1]
print(json.dumps({
    "version": lerobot.__version__, "frames": len(whole), "episodes": whole.num_episodes, "fps": whole.fps,
    "task": row["task"], "state": row["observation.state"].tolist(),
    "static": (row["observation.images.static"].permute(1, 2, 0) * 255).mean((0, 1)).tolist(),
    "stats": sorted(whole.meta.stats)}))
"""
OWN = sys.executable if importlib.util.find_spec("lerobot") else None
LEROBOT = os.environ.get("LEROBOT_PYTHON", OWN)


@pytest.mark.skipif(LEROBOT is None, reason="LEROBOT_PYTHON names no Python with the package lerobot")
@pytest.mark.parametrize("name", ["lerobot", "lerobot-png"])
def test_lerobots_own_reader_opens_it(written, name):
    environment = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "LD_LIBRARY_PATH")
    }
    done = subprocess.run(
        [LEROBOT, "-c", READ, str(written / name)],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    third = read_annotations(written / "calvin/training")[2]
    last = read_step(written / "calvin/training", third.end - 1, ["rgb_static", "robot_obs"])
    assert (found["frames"], found["episodes"], found["fps"]) == (91, 6, 10)
    assert found["task"] == third.text
    assert found["state"][:6] == pytest.approx(last["robot_obs"][:6], abs=1e-5)
    assert found["static"] == pytest.approx(last["rgb_static"].mean((0, 1)), abs=MEAN_LOSS)
    assert {"action", "observation.state", "observation.images.static"} <= set(found["stats"])
