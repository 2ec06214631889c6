"""Tests of record-demos: the same bytes for any number of processes, killed runs, runs that do not match."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deer_vla_ros.__main__ import main
from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.demonstrations.record_run import DemoRequest, record
from deer_vla_ros.lab.demonstrations.record_store import CalvinStore
from deer_vla_ros.lab.training.frames import FORMAT, Frames
from deer_vla_ros.model.checkpoint import EMBEDDED


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> DemoRequest:
    """Three demonstrations in two shards, recorded in this process."""
    recording = DemoRequest(
        tmp_path_factory.mktemp("demos") / "one", demos=3, seed=3, image_size=16, demos_per_shard=2
    )
    assert record(recording, jobs=1)[1] == 0
    return recording


@pytest.fixture
def copy(recording, tmp_path) -> DemoRequest:
    return replace(recording, folder=Path(shutil.copytree(recording.folder, tmp_path / "copy")))


def contents(folder: Path) -> dict[str, str]:
    """The SHA-256 sum of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_bytes_depend_on_the_seed_and_not_on_the_number_of_processes(recording, tmp_path):
    record(two := replace(recording, folder=tmp_path / "two"), jobs=2)
    assert contents(two.folder) == contents(recording.folder)
    assert Frames([two.folder]).episodes == 3
    record(other := replace(recording, folder=tmp_path / "other", demos=1, seed=4), jobs=1)
    first = other.folder / "shard-0000/images.npy"
    assert first.read_bytes() != (recording.folder / "shard-0000/images.npy").read_bytes()


def test_shard_k_of_run_s_is_made_from_seed_1000_s_plus_k(recording):
    metas = [json.loads((recording.folder / f"shard-000{k}/meta.json").read_text()) for k in range(2)]
    assert [meta["seed"] for meta in metas] == [3000, 3001]
    assert [meta["episodes"] for meta in metas] == [2, 1]
    assert all(len(metas[0]["phrasings"][task]) >= 5 for task in metas[0]["tasks"])


def test_a_shard_that_was_half_written_is_written_again_and_the_others_are_left_alone(recording, copy):
    shutil.rmtree(copy.folder / "shard-0001")
    half = copy.folder / ".shard-0001.partial-00004711" / "new" / "shard-0001"
    half.mkdir(parents=True)
    (half / "images.npy").write_bytes(b"half of a file")
    untouched = (copy.folder / "shard-0000/images.npy").stat().st_mtime_ns
    frames, kept = record(copy, jobs=1)
    assert kept == 2
    assert frames == len(np.load(copy.folder / "shard-0001/task.npy"))
    assert contents(copy.folder) == contents(recording.folder)
    assert (copy.folder / "shard-0000/images.npy").stat().st_mtime_ns == untouched


def test_what_kill_9_interrupts_in_the_middle_of_a_shard_is_finished_by_the_same_command(recording, tmp_path):
    program = f"""
import os
from pathlib import Path
from deer_vla_ros.lab.demonstrations.record_run import *
write = FrameStore.write
def write_first(self, number, *rest):
    return write(self, number, *rest) if number == 0 else os.kill(os.getpid(), 9)
FrameStore.write = write_first
record(DemoRequest(Path({str(tmp_path)!r}), 3, 3, 16, demos_per_shard=2), 1)
"""
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == -9
    assert record(replace(recording, folder=tmp_path), jobs=1)[1] == 2
    assert contents(tmp_path) == contents(recording.folder)


def test_more_demonstrations_are_added_to_those_that_are_there(copy):
    longer = replace(copy, demos=4)
    assert record(longer, jobs=1)[1] == 2
    assert Frames([copy.folder]).episodes == 4
    with pytest.raises(UserError, match=r"holds more than 3 demonstrations: give another --out"):
        record(copy, jobs=1)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"seed": 2}, "another seed: 3000, and now 2000"),
        ({"image_size": 24}, "another image_size: 16, and now 24"),
        ({"policy": EMBEDDED}, "another policy: null, and now"),
    ],
)
def test_what_was_recorded_with_other_settings_is_refused(recording, change, complaint):
    with pytest.raises(UserError, match=complaint):
        record(replace(recording, **change), jobs=1)


def test_what_an_older_version_recorded_is_refused_before_anything_is_added(copy):
    meta = copy.folder / "shard-0000/meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "format": FORMAT - 1}))
    with pytest.raises(UserError, match=f"another format: {FORMAT - 1}, and now {FORMAT}"):
        record(replace(copy, demos=6), jobs=1)
    assert not (copy.folder / "shard-0002").exists()


def test_what_is_called_almost_as_a_shard_is_left_alone(copy, tmp_path):
    shutil.copytree(copy.folder / "shard-0001", copy.folder / "shard-0001-old")
    assert record(copy, jobs=1)[1] == 3
    (tmp_path / "shard-0001 (copy).json").write_text("mine")
    assert CalvinStore(tmp_path).found() == {}


def test_a_shard_whose_description_is_damaged_is_named(copy):
    (copy.folder / "shard-0001/meta.json").write_text("{")
    with pytest.raises(UserError, match=r"shard-0001/meta.json: not JSON"):
        record(copy, jobs=1)


def test_a_policy_acts_first_and_the_expert_says_what_would_have_been_right(recording, tmp_path):
    dagger = replace(recording, folder=tmp_path / "dagger", demos=1, policy=EMBEDDED)
    record(dagger, jobs=1)
    assert json.loads((dagger.folder / "shard-0000/meta.json").read_text())["policy"]
    mine, experts = Frames([dagger.folder]), Frames([recording.folder])
    assert mine.task[0] == experts.task[0], "the same seed begins with the same task on the same table"
    assert (mine.gather("tcp", np.array([0])) == experts.gather("tcp", np.array([0]))).all()
    assert not np.allclose(mine.gather("tcp", np.array([1])), experts.gather("tcp", np.array([1]))), (
        "but another hand moved the arm"
    )
    assert (mine.gather("actions", np.array([0])) == experts.gather("actions", np.array([0]))).all()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--demos", "0"], "--demos is 0: give 1 or more"),
        (["--demos", "1", "--jobs", "0"], "--jobs is 0"),
        (["--demos", "1", "--seed", "1000"], "needs seeds 1000000 to 1000000"),
        (["--demos", "1", "--seed", "-1"], "give --seed 0 to 999"),
        (["--demos", "100001"], "at most 100000 --demos"),
        (["--demos", "1", "--image-size", "4"], "--image-size is 4: give 8 to 512"),
        (["--demos", "1", "--format", "calvin", "--image-size", "64"], "--image-size is for --format frames"),
        (["--demos", "100001", "--format", "calvin"], "seven digits number 100000 at most"),
        (["--demos", "1", "--policy", "/nowhere"], "/nowhere/config.json cannot be read"),
        (["--demos", "1", "--out", "/proc/demos"], "/proc/demos cannot be made"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments, complaint, tmp_path, capsys):
    assert main(["record-demos", "--out", str(tmp_path), *arguments]) == 1
    message = capsys.readouterr().err
    assert complaint in message and message.count("\n") == 1


def test_the_command_says_what_it_made_and_that_nothing_is_missing(tmp_path, capsys):
    command = ["record-demos", "--demos", "1", "--out", str(tmp_path), "--image-size", "8", "--jobs", "1"]
    assert main(command) == 0
    assert "1 new ones" in capsys.readouterr().out
    assert main(command) == 0
    assert "1 of them from before" in capsys.readouterr().out
