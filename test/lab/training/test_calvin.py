"""Tests of CALVIN's format: writing and reading, windows, and damaged or malicious files."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deer_vla_ros.bag.calvin_files import (
    ANNOTATIONS,
    EPISODES,
    Annotation,
    CalvinStep,
    read_annotations,
    read_step,
    write_annotations,
    write_step,
)
from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.preprocess import resize_and_crop
from deer_vla_ros.lab.training.calvin import CalvinWindows

SIZE = 16
FIRST = 358_482
OPEN = Annotation(FIRST, FIRST + 6, "open_drawer", "pull the drawer")
LIFT = Annotation(FIRST + 4, FIRST + 10, "lift_red_block", "grasp the red block")
"""An interval that overlaps with the one before, as in CALVIN."""


def some_step(number: int) -> CalvinStep:
    random = np.random.default_rng(number)
    return CalvinStep(
        rgb_static=random.integers(256, size=(200, 200, 3), dtype=np.uint8),
        rgb_gripper=random.integers(256, size=(84, 84, 3), dtype=np.uint8),
        rel_actions=np.append(random.uniform(-1, 1, 6), random.choice([-1.0, 1.0])),
        actions=random.normal(size=7),
        robot_obs=random.normal(size=15),
        scene_obs=random.normal(size=24),
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(FIRST, FIRST + 10):
        write_step(tmp_path, number, some_step(number))
    write_annotations(tmp_path, [OPEN, LIFT])
    return tmp_path


def draw(windows: CalvinWindows, indices: list[int], window: int):
    return windows.batch(np.array(indices), window, SIZE, np.random.default_rng(0))


def test_files_have_the_names_keys_and_kinds_that_calvin_s_loaders_ask_for(folder):
    with np.load(folder / "episode_0358482.npz") as step:
        kinds = {name: (step[name].shape, str(step[name].dtype)) for name in step}
    assert kinds == {
        "rgb_static": ((200, 200, 3), "uint8"),
        "rgb_gripper": ((84, 84, 3), "uint8"),
        "rel_actions": ((7,), "float64"),
        "actions": ((7,), "float64"),
        "robot_obs": ((15,), "float64"),
        "scene_obs": ((24,), "float64"),
    }
    annotations = np.load(folder / ANNOTATIONS, allow_pickle=True).item()
    assert annotations["language"]["ann"] == [OPEN.text, LIFT.text]
    assert annotations["language"]["task"] == ["open_drawer", "lift_red_block"]
    assert annotations["info"]["indx"] == [(FIRST, FIRST + 6), (FIRST + 4, FIRST + 10)]
    assert len(annotations["language"]["emb"]) == 2
    assert np.load(folder / EPISODES).tolist() == [[FIRST, FIRST + 5], [FIRST + 4, FIRST + 9]]


def test_what_is_written_is_read_again(folder):
    assert read_annotations(folder) == [OPEN, LIFT]
    step = some_step(FIRST)
    found = read_step(folder, FIRST, vars(step))
    assert all(np.array_equal(found[name], value) for name, value in vars(step).items())


def test_a_window_is_consecutive_steps_of_one_interval_in_its_own_words(folder):
    windows = CalvinWindows([folder])
    assert len(windows) == 12, "a window begins at every step of both intervals"
    assert windows.texts == [OPEN.text, LIFT.text]
    batch = draw(windows, [1, 7], 3)
    assert batch.instructions == [OPEN.text, LIFT.text]
    assert batch.valid.all()
    for row, first in enumerate((FIRST + 1, FIRST + 5)):
        for column in range(3):
            step = some_step(first + column)
            assert np.array_equal(batch.actions[row, column], step.rel_actions.astype(np.float32))
            assert np.array_equal(batch.images[row, column, 0], resize_and_crop(step.rgb_static, SIZE))
            assert np.array_equal(batch.images[row, column, 1], resize_and_crop(step.rgb_gripper, SIZE))
            assert np.allclose(batch.tcp[row, column, :3], step.robot_obs[:3])


def test_past_the_end_of_its_interval_a_window_repeats_the_last_step_and_says_so(folder):
    windows = CalvinWindows([folder])
    batch = draw(windows, [4, 11], 4)
    assert batch.valid.tolist() == [[True, True, False, False], [True, False, False, False]]
    assert windows.valid_steps(np.array([4, 11]), 4) == 3
    assert (batch.actions[0, 1:] == batch.actions[0, 1]).all() and (
        batch.images[1] == batch.images[1, 0]
    ).all()


def test_angles_become_the_rotation_that_calvin_means(tmp_path):
    """Roll, pitch and yaw as in Bullet: about fixed axes, x first."""
    robot_obs = np.zeros(15)
    robot_obs[3:6] = [np.pi, 0.0, np.pi / 2]
    write_step(tmp_path, 0, replace(some_step(0), robot_obs=robot_obs))
    write_annotations(tmp_path, [Annotation(0, 1, "a", "b")])
    quaternion = draw(CalvinWindows([tmp_path]), [0], 1).tcp[0, 0, 3:]
    half = np.sqrt(
        0.5
    )  # half a turn about x, then a quarter about z: half a turn about the line between x and y
    assert np.allclose(np.abs(quaternion @ [half, half, 0, 0]), 1, atol=1e-6)


def test_several_folders_are_one_data_set_and_their_equal_numbers_are_not_mixed_up(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_step(other, FIRST, some_step(7))
    write_annotations(other, [Annotation(FIRST, FIRST + 1, "other", "something else")])
    windows = CalvinWindows([folder, other])
    batch = draw(windows, [0, 12], 1)
    assert batch.instructions == [OPEN.text, "something else"]
    assert np.array_equal(batch.actions[1, 0], some_step(7).rel_actions.astype(np.float32))
    assert not np.array_equal(batch.images[0], batch.images[1])


@pytest.mark.parametrize("cache_bytes", [0, 5000, 1 << 30])
@pytest.mark.parametrize("threads", [1, 3])
def test_neither_memory_nor_threads_change_what_is_read(folder, cache_bytes, threads):
    expected = draw(CalvinWindows([folder], threads=1), [0, 5, 9], 4)
    windows = CalvinWindows([folder], threads, cache_bytes)
    for _ in range(3):
        batch = draw(windows, [0, 5, 9], 4)
        assert np.array_equal(batch.images, expected.images) and np.array_equal(batch.tcp, expected.tcp)


def test_a_remembered_step_is_not_decoded_again(folder):
    windows = CalvinWindows([folder])
    first = draw(windows, [0], 3)
    for path in folder.glob("episode_*.npz"):
        path.unlink()
    assert np.array_equal(draw(windows, [0], 3).images, first.images)


def refusal(folder: Path, index: int = 0) -> str:
    with pytest.raises(UserError) as error:
        draw(CalvinWindows([folder]), [index], 2)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_without_annotations_is_refused_with_what_to_give(tmp_path):
    assert "auto_lang_ann.npy is missing: give a folder in CALVIN's format" in refusal(tmp_path)


def test_a_missing_step_is_named(folder):
    (folder / f"episode_{FIRST + 1:07d}.npz").unlink()
    assert "episode_0358483.npz is missing" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_a_step_cut_short_is_named(folder, keep):
    path = folder / f"episode_{FIRST:07d}.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep if keep >= 1 else keep * len(whole))])
    assert "episode_0358482.npz: not a step of CALVIN's format" in refusal(folder)


def test_no_changed_byte_of_a_step_raises_anything_but_a_user_error(folder):
    path, random = folder / f"episode_{FIRST:07d}.npz", np.random.default_rng(0)
    whole = path.read_bytes()
    for place in (*random.integers(len(whole), size=60), *range(40), *range(len(whole) - 60, len(whole))):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            read_step(folder, FIRST, ("rgb_static", "rel_actions"))
        except UserError as error:
            assert "episode_0358482.npz" in str(error)


def test_a_step_of_other_shapes_is_refused(folder):
    np.savez(folder / f"episode_{FIRST:07d}.npz", **{**vars(some_step(0)), "rel_actions": np.zeros(8)})
    assert "rel_actions has shape (8,)" in refusal(folder)


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        ({"language": {"ann": ["a"], "task": ["b"]}, "info": {}}, "'indx'"),
        ({"language": {"ann": ["a"], "task": ["b"]}, "info": {"indx": [(0, 1), (2, 3)]}}, "zip"),
        (
            {"language": {"ann": ["a"], "task": ["b"]}, "info": {"indx": [(5, 5)]}},
            "steps 5 to 5 are no interval",
        ),
        ({"language": {"ann": [], "task": []}, "info": {"indx": []}}, "annotates nothing"),
        ([1, 2], "not a file of one pickled object"),
    ],
)
def test_annotations_that_say_something_else_are_refused(folder, found, complaint):
    np.save(folder / ANNOTATIONS, np.array(found, dtype=object), allow_pickle=True)
    assert complaint in refusal(folder)


def test_numpy_s_own_numbers_and_text_are_read(folder):
    language = {"ann": [np.str_("a")], "task": np.array(["b"]), "emb": np.zeros((1, 1, 384), np.float32)}
    found = {"language": language, "info": {"indx": [(np.int64(3), np.int64(9))], "episodes": []}}
    np.save(folder / ANNOTATIONS, np.array(found, dtype=object), allow_pickle=True)
    assert read_annotations(folder) == [Annotation(3, 9, "b", "a")]
    old = (
        (folder / ANNOTATIONS)
        .read_bytes()
        .replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
    )
    at = old.index(b"\x80\x04\x95")  # the frame's length, eight bytes, is one less
    length = int.from_bytes(old[at + 3 : at + 11], "little") - 1
    (folder / ANNOTATIONS).write_bytes(old[: at + 3] + length.to_bytes(8, "little") + old[at + 11 :])
    assert read_annotations(folder) == [Annotation(3, 9, "b", "a")], "as numpy 1 wrote it"


class Hostile:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("inside", [False, True])
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(folder, inside):
    harm = folder / "harm"
    content = {"language": Hostile(harm)} if inside else Hostile(harm)
    array = np.empty((), object)
    array[()] = content
    np.save(folder / ANNOTATIONS, array, allow_pickle=True)
    assert "it names posix.mkdir, which is neither array nor number nor text" in refusal(folder)
    assert not harm.exists()
    with open(folder / ANNOTATIONS, "rb") as file:  # the same file does its harm where numpy may load it
        np.lib.format.read_array(file, allow_pickle=True)
    assert harm.exists()


@pytest.mark.parametrize(
    "name",
    ["builtins.eval", "os.system", "numpy.load", "numpy._core.multiarray.fromfile", "builtins.getattr"],
)
def test_only_numpy_s_constructors_can_be_named(folder, name):
    module, _, function = name.rpartition(".")
    program = (
        b"\x80\x04\x8c"
        + bytes([len(module)])
        + module.encode()
        + b"\x8c"
        + bytes([len(function)])
        + function.encode()
        + b"\x93."
    )
    with open(folder / ANNOTATIONS, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.write(program)
    assert f"it names {name}" in refusal(folder)
    pickle.loads(program)  # it is a pickle that would load
