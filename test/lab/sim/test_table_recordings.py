"""Tests of the table's recordings, live and of the expert, and of a calibration on them."""

import json
import shutil
import signal

import pytest
from bags import TABLE, records

from deer_vla_ros.__main__ import main
from deer_vla_ros.bag.recording import Recording, decode
from deer_vla_ros.budget.calibration import Calibration
from deer_vla_ros.model.checkpoint import EMBEDDED


def test_the_expert_is_recorded_alike_every_time_and_as_the_test_data_was(tmp_path):
    arguments = ["--seed", "5", "--show", "open the drawer"]
    for name in ("one", "other"):
        assert main(["sim", "--record", str(tmp_path / name), *arguments]) == 0
    one, other = (records(None, tmp_path / name) for name in ("one", "other"))
    assert one == other
    stored = [each for each in records() if each.time_ns <= one[-1].time_ns]
    ours, theirs = (
        [decode(each).pose.position for each in found if each.topic == "/target_pose"]
        for found in (one, stored)
    )
    for our, their in zip(ours, theirs, strict=True):
        assert (our.x, our.y, our.z) == pytest.approx((their.x, their.y, their.z), abs=1e-6)
    assert TABLE.is_dir() and sum(file.stat().st_size for file in TABLE.iterdir()) < 5e6


def test_words_that_name_no_task_and_a_taken_name_are_refused(tmp_path, capsys):
    assert main(["sim", "--record", str(tmp_path / "bag"), "--show", "make coffee"]) == 1
    assert "names no task of the table" in capsys.readouterr().err and not (tmp_path / "bag").exists()
    assert main(["sim", "--seed", "3", "--record", str(tmp_path / "bag"), "--show", "open the drawer"]) == 1
    assert "makes no sense by then" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert main(["sim", "--show", "open the drawer"]) == 1
    assert "--show without --record" in capsys.readouterr().err
    (tmp_path / "bag").mkdir()
    assert main(["sim", "--record", str(tmp_path / "bag"), "--show", "open the drawer"]) == 1
    assert "exists: give the recording another name" in capsys.readouterr().err


def test_a_recording_calibrates_a_checkpoint_and_says_how_it_differs(tmp_path, capsys):
    folder = tmp_path / "checkpoint"
    shutil.copytree(EMBEDDED, folder)
    told = tmp_path / "told.json"
    assert main(["calibrate", str(TABLE), str(TABLE), "--checkpoint", str(folder), "--json", str(told)]) == 0
    calibration = Calibration.load(folder)
    frames = len(records(["/camera/static/image_raw"]))
    assert len(calibration.deltas) == 2 * frames and "table" in calibration.provenance["source"]
    rows = json.loads(told.read_text())["exits"]
    assert (
        all(0 <= row["distance_from_stored"] <= 1 for row in rows)
        and "from the deltas that were stored" in capsys.readouterr().out
    )
    before = (folder / "calibration.safetensors").read_bytes()
    assert main(["calibrate", str(tmp_path / "none"), "--checkpoint", str(folder)]) == 1
    assert "no such recording" in capsys.readouterr().err
    assert (folder / "calibration.safetensors").read_bytes() == before
    assert main(["calibrate", "table", str(TABLE), "--checkpoint", str(folder)]) == 1


def test_a_live_table_leaves_a_recording_that_is_whole(tmp_path):
    import os
    import subprocess
    import sys
    import time

    command = [sys.executable, "-m", "deer_vla_ros", "sim", "--seed", "5", "--record", str(tmp_path / "bag")]
    process = subprocess.Popen(command, env={**os.environ, "MUJOCO_GL": "egl"})
    file = tmp_path / "bag" / "bag_0.mcap"
    deadline = time.monotonic() + 60
    while not (file.exists() and file.stat().st_size > 0) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    with Recording(tmp_path / "bag") as recording:
        found = list(recording.messages(set(recording.topics)))
    seen = {each.topic for each in found}
    assert {"/camera/static/image_raw", "/camera/gripper/image_raw", "/ee_pose", "/joint_states"} <= seen
    assert all(decode(each) is not None for each in found)
