"""Tests that the network computes the reference's values, and that the command notices differences."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import ROOT

from deer_vla_ros.__main__ import main
from deer_vla_ros.budget.calibration import columns, window_deltas
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.inference.preprocess import ImagePreprocessor, resize_and_crop
from deer_vla_ros.inference.types import Observation
from deer_vla_ros.lab.parity.comparison import compare
from deer_vla_ros.lab.parity.parity_training import reference_losses, step_loss
from deer_vla_ros.lab.parity.reference_tensors import read_arrays, read_json, read_model

REPOSITORY = ROOT
COMPACT = REPOSITORY / "test" / "golden_compact"
COMPACT_LIMIT = 8_500_000

LIGHT_RUNS = ("fixed_exit_7", "dyn_A", "dyn_ensemble")
LIGHT_STEPS, LIGHT_WINDOW, LIGHT_HIDDEN_STEPS = 3, 3, 2


def golden_folder(environment: Mapping[str, str]) -> Path:
    """The folder of the whole recording. Without it the test is skipped, with the reason."""
    folder = Path(environment.get("DEER_VLA_GOLDEN") or REPOSITORY.parent / "shared" / "golden")
    if folder.is_dir():
        return folder
    pytest.skip(
        f"the reference's whole recording is not at {folder}: set DEER_VLA_GOLDEN "
        "(test/golden_compact is checked in any case)"
    )


# The network computes the reference's values.


def test_the_whole_recording_is_within_tolerance():
    folder = golden_folder(os.environ)
    command = (sys.executable, "-m", "deer_vla_ros", "parity", str(folder), "--train64")
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAIL" not in result.stdout
    for name in (
        "3b",
        "9b",
        "text",
        "preproc",
        "shift",
        "budget",
        "3b_train",
        "9b_train",
        "3b_fp64",
        "9b_fp64",
    ):
        assert f"ok   {name} " in result.stdout


def test_the_compact_recording_is_within_tolerance(capsys):
    assert main(["parity", str(COMPACT)]) == 0
    verdicts = capsys.readouterr().out
    assert "FAIL" not in verdicts
    assert all(f"ok   {name} " in verdicts for name in ("3b", "9b", "3b_train", "9b_train"))


def test_the_compact_recording_is_small_enough_to_carry():
    assert sum(path.stat().st_size for path in COMPACT.rglob("*") if path.is_file()) <= COMPACT_LIMIT


def test_the_compact_recording_is_an_unchanged_part_of_the_whole():
    whole = golden_folder(os.environ)
    assert (COMPACT / "tolerances.json").read_bytes() == (whole / "tolerances.json").read_bytes()
    for path in COMPACT.glob("*.npz"):
        original = read_arrays(whole / path.name)
        for name, array in read_arrays(path).items():
            expected = original[name][: len(array)] if name.endswith("/hidden_states") else original[name]
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected, err_msg=name)


def test_a_missing_recording_is_a_skip_with_its_reason(tmp_path):
    with pytest.raises(pytest.skip.Exception, match="nowhere: set DEER_VLA_GOLDEN"):
        golden_folder({"DEER_VLA_GOLDEN": str(tmp_path / "nowhere")})


# The check takes all lengths from the arrays. The tests below damage this cut recording; its check is fast.


def state_after(recording, tag: str, steps: int) -> dict[str, np.ndarray]:
    """The head's state after the first steps of a run, computed by our network.

    The reference recorded the state after the last step only.
    """
    settings = recording.info["dynamic"].get(tag) or {"thresholds": {tag.removeprefix("fixed_exit_"): 1e8}}
    thresholds = {int(layer): threshold for layer, threshold in settings["thresholds"].items()}
    policy = DeerPolicy(
        recording.model, recording.tokenizer, ExitRule(tuple(thresholds), tuple(thresholds.values()))
    )
    policy.reset(recording.info["instruction"])
    for static, gripper in zip(recording.rollout["raw_static"][:steps], recording.rollout["raw_gripper"]):
        policy.step(Observation(static, gripper))
    return {f"{tag}/h_final": policy.state.hidden.numpy(), f"{tag}/c_final": policy.state.cell.numpy()}


def cut_rollout(name: str, array: np.ndarray) -> np.ndarray:
    if name.startswith("t0/") or name in ("input_ids", "attention_mask"):
        return array
    return array[: LIGHT_HIDDEN_STEPS if name.endswith("/hidden_states") else LIGHT_STEPS]


def cut_window(name: str, array: np.ndarray) -> np.ndarray:
    if name.endswith("/pooled"):
        return array[:, :, :LIGHT_WINDOW]
    if array.ndim < 2 or name.endswith(("input_ids", "attention_mask", "hidden_states_t0", "strategy2_idx")):
        return array
    return array[:, :LIGHT_WINDOW]


def values_of(recording, window: dict[str, np.ndarray]) -> np.ndarray:
    """Calibration values of a shorter window, computed by our network, in the place of batch 1.

    The reference did not record them.
    """
    model, features = recording.model, torch.from_numpy(window["fwd1/pooled"]).permute(1, 2, 0, 3)
    drawn = torch.from_numpy(window["values/strategy1_idx_batch1"])[:, :LIGHT_WINDOW]
    values = window_deltas(model.shared_head, columns(features, model.config.exits), drawn).T
    return np.concatenate((np.zeros_like(values), values), axis=1)


def training_of(recording) -> dict:
    """A record of one training step on a shorter window.

    The losses are computed by our network: the reference has none.
    """
    record = read_json(COMPACT / "9b_train.json")
    joint = record["stages"][0]
    step = joint["steps"][1]
    step["strategy1_idx"] = [drawn[:LIGHT_WINDOW] for drawn in step["strategy1_idx"]]
    step["losses"] = reference_losses(step_loss(recording, step))
    # This is the first step now, where the warm-up begins with rate 0.
    step["lr_used_per_group"] = [0.0] * len(record["joint_groups"])
    joint["steps"] = [step]
    return record


@pytest.fixture(scope="module")
def light(tmp_path_factory) -> Path:
    """The compact recording with fewer runs and every length cut."""
    folder = tmp_path_factory.mktemp("light")
    shutil.copytree(COMPACT, folder, ignore=shutil.ignore_patterns("3b_*"), dirs_exist_ok=True)
    recording = read_model(COMPACT, "9b")
    rollout = {
        name: cut_rollout(name, array)
        for name, array in recording.rollout.items()
        if "/" not in name or name.startswith("t0/")
    }
    for tag in LIGHT_RUNS:
        rollout |= {
            name: cut_rollout(name, array)
            for name, array in recording.rollout.items()
            if name.startswith(f"{tag}/")
        }
        rollout |= state_after(recording, tag, LIGHT_STEPS)
    np.savez(folder / "9b_rollout.npz", **rollout)
    for packed in ("9b_weights.npz", "preproc.npz"):  # which every test reads: faster if it is not packed
        np.savez(folder / packed, **read_arrays(COMPACT / packed))
    window = {name: cut_window(name, array) for name, array in recording.window.items()}
    np.savez(folder / "9b_window.npz", **window | {"values/values": values_of(recording, window)})
    (folder / "9b_train.json").write_text(
        json.dumps(training_of(dataclasses.replace(recording, window=window)))
    )
    return folder


@pytest.fixture
def folder(light, tmp_path) -> Path:
    """A copy of the light recording, which a test may damage."""
    shutil.copytree(light, tmp_path, dirs_exist_ok=True)
    return tmp_path


def failed(folder: Path, capsys) -> set[str]:
    """Runs the command.

    Returns the kinds whose line says FAIL; the exit status must be 1 exactly if there are any.
    """
    status = main(["parity", str(folder)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    kinds = {line[2] for line in lines if line[0] == "FAIL"}
    assert status == (1 if kinds else 0)
    return kinds


def refusal(folder: Path, capsys) -> str:
    """Runs the command, which must end with status 1. Returns the single line of its error."""
    assert main(["parity", str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n")
    return error


def test_a_recording_of_other_lengths_passes(folder, capsys):
    arrays = read_arrays(folder / "9b_rollout.npz")
    assert len(arrays["raw_static"]) == LIGHT_STEPS
    assert len(arrays["fixed_exit_7/hidden_states"]) == LIGHT_HIDDEN_STEPS
    assert failed(folder, capsys) == set()


def test_a_single_recorded_step_passes(folder, capsys):
    recording = read_model(folder, "9b")
    cut = {
        name: array if name.startswith("t0/") or "_final" in name else array[:1]
        for name, array in recording.rollout.items()
    }
    np.savez(
        folder / "9b_rollout.npz",
        **cut | {k: v for tag in LIGHT_RUNS for k, v in state_after(recording, tag, 1).items()},
    )
    assert failed(folder, capsys) == set()


def test_a_recording_of_another_image_size_passes(folder, capsys):
    """40 pixels are not a multiple of 16, the step in which the normalised image is sampled."""
    arrays = read_arrays(folder / "preproc.npz")
    raw = arrays["gripper/raw_hwc_uint8"]
    arrays |= {
        "gripper/resized_cropped_chw_uint8": resize_and_crop(raw, 40).transpose(2, 0, 1),
        "gripper/out_sub16": ImagePreprocessor(40, torch.device("cpu"), torch.float32)([raw])[
            0, 0, :, ::16, ::16
        ].numpy(),
    }
    np.savez(folder / "preproc.npz", **arrays)
    assert failed(folder, capsys) == set()


# The command reports a difference, in the line of its kind.


def change(path: Path, name: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    arrays = read_arrays(path)
    arrays[name] = edit(arrays[name].copy())
    np.savez(path, **arrays)


def off_by(amount: float) -> Callable[[np.ndarray], np.ndarray]:
    """A function that adds `amount` to the last value of an array."""

    def edit(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[-1] += np.array(amount, array.dtype)
        return array

    return edit


@pytest.mark.parametrize(
    ("kind", "file", "name", "amount"),
    [
        ("images", "9b_rollout.npz", "vision_x", 1e-6),
        ("input_ids", "9b_rollout.npz", "input_ids", 1),
        pytest.param("input_ids", "9b_rollout.npz", "attention_mask", -1, marks=pytest.mark.long),
        ("vit_tokens", "9b_rollout.npz", "t0/vit_tokens_gripper", 2e-4),
        ("resampler", "9b_rollout.npz", "t0/perceiver_static", 1e-3),
        ("token_embedding", "9b_rollout.npz", "t0/token_embedding", 1e-5),
        ("hidden_states", "9b_rollout.npz", "fixed_exit_7/hidden_states", 2e-3),
        pytest.param("hidden_states", "9b_window.npz", "fwd1/hidden_states_t0", 2e-3, marks=pytest.mark.long),
        pytest.param("pooled", "9b_rollout.npz", "dyn_A/pooled", 2e-3, marks=pytest.mark.long),
        ("pooled", "9b_window.npz", "fwd1/pooled", 2e-3),
        pytest.param("pose", "9b_rollout.npz", "dyn_ensemble/pose", 2e-3, marks=pytest.mark.long),
        ("pose", "9b_window.npz", "fwd1/extra_strategy2/pose", 2e-3),
        ("gripper_logit", "9b_window.npz", "fwd1/aux_exit_3/gripper_logit", 2e-3),
        ("gripper_prob", "9b_rollout.npz", "fixed_exit_7/gripper_prob", 5e-4),
        ("deltas", "9b_rollout.npz", "dyn_A/deltas", 1e-3),
        ("exits", "9b_rollout.npz", "dyn_A/exit_layer", 2),
        ("action_fp16", "9b_rollout.npz", "dyn_ensemble/action_fp16", -2),
        ("lstm_h", "9b_rollout.npz", "dyn_A/h_final", 2e-3),
        pytest.param("lstm_c", "9b_rollout.npz", "dyn_ensemble/c_final", 5e-3, marks=pytest.mark.long),
        ("values", "9b_window.npz", "values/values", 1e-3),
        ("preprocess_uint8_levels", "preproc.npz", "gripper/resized_cropped_chw_uint8", 1),
        ("preprocess_float", "preproc.npz", "gripper/out_sub16", 1e-6),
        pytest.param("random_shift", "preproc.npz", "shift4/traj_out", 0.01, marks=pytest.mark.long),
        ("random_shift", "preproc.npz", "shift4/single_shift_int", -1),
    ],
)
def test_one_value_beyond_its_tolerance_fails_its_own_kind_only(folder, capsys, kind, file, name, amount):
    if name.endswith("/deltas"):  # The last value may be NaN, for an exit that was not read.
        change(folder / file, name, lambda array: array + np.float32(amount))
    else:
        change(folder / file, name, off_by(amount))
    assert failed(folder, capsys) == {kind}


def test_another_recorded_threshold_fails_the_thresholds(folder, capsys):
    recorded = read_json(folder / "thresholds.json")
    recorded[100]["thresholds"]["1"] *= 1.00001
    (folder / "thresholds.json").write_text(json.dumps(recorded))
    assert failed(folder, capsys) == {"thresholds_relative"}


def another_loss(record: dict) -> None:
    record["stages"][0]["steps"][0]["losses"]["extra_exit_loss2_bin"] += 1e-4


def another_draw(record: dict) -> None:
    record["stages"][0]["steps"][0]["strategy2_idx"] = [[0, 0], [0, 0]]


def another_group_member(record: dict) -> None:
    del record["joint_groups"][3]["params"][-1]


def another_decay(record: dict) -> None:
    record["exit_groups"][1]["weight_decay"] = 0.01


def another_rate(record: dict) -> None:
    record["stages"][1]["steps"][1]["lr_used_per_group"][1] *= 1.000001


@pytest.mark.parametrize(
    ("edit", "kinds"),
    [
        (another_loss, {"loss_steps_0_1"}),
        (another_draw, {"loss_steps_0_1"}),
        (another_group_member, {"parameter_groups"}),
        (another_decay, {"parameter_groups"}),
        (another_rate, {"learning_rates"}),
    ],
)
def test_another_training_fails_its_own_kind_only(folder, capsys, edit, kinds):
    record = read_json(folder / "9b_train.json")
    edit(record)
    (folder / "9b_train.json").write_text(json.dumps(record))
    assert failed(folder, capsys) == kinds


@pytest.mark.parametrize("edit", [lambda text: text.strip(), lambda text: text.replace("the", "a", 1)])
def test_another_prompt_fails_the_template(folder, capsys, edit):
    recorded = read_json(folder / "text.json")
    recorded["strings"] = [edit(text) + ("" if edit(text) != text else "!") for text in recorded["strings"]]
    (folder / "text.json").write_text(json.dumps(recorded))
    assert failed(folder, capsys) == {"template"}


def test_another_weight_fails_what_depends_on_it_and_nothing_before_it(folder, capsys):
    change(
        folder / "9b_weights.npz",
        "perceiver.latents",
        lambda array: array * np.linspace(1, 2, array.shape[1], dtype=array.dtype),
    )
    kinds = failed(folder, capsys)
    assert {"resampler", "hidden_states", "pose", "deltas", "lstm_h"} <= kinds
    assert not kinds & {
        "images",
        "input_ids",
        "vit_tokens",
        "token_embedding",
        "template",
        "preprocess_float",
    }


def test_another_threshold_fails_the_exits(folder, capsys):
    info = read_json(folder / "9b_info.json")
    info["dynamic"]["dyn_A"]["thresholds"]["1"] = 1e8
    (folder / "9b_info.json").write_text(json.dumps(info))
    assert {"exits", "deltas"} <= failed(folder, capsys)


@pytest.mark.parametrize("pattern", ["one more", "one less"])
def test_another_pattern_of_missing_values_fails(folder, capsys, pattern):
    def edit(deltas: np.ndarray) -> np.ndarray:
        step, column = np.argwhere(~np.isnan(deltas) if pattern == "one more" else np.isnan(deltas))[0]
        deltas[step, column] = np.nan if pattern == "one more" else 0.0
        return deltas

    change(folder / "9b_rollout.npz", "dyn_A/deltas", edit)
    assert failed(folder, capsys) == {"deltas"}


def test_a_recording_of_another_shape_fails(folder, capsys):
    change(folder / "9b_rollout.npz", "dyn_A/pose", lambda poses: poses[:-1])
    assert failed(folder, capsys) == {"pose"}


def test_a_kind_that_nothing_recorded_fails(folder, capsys):
    arrays = read_arrays(folder / "9b_rollout.npz")
    np.savez(
        folder / "9b_rollout.npz",
        **{name: array for name, array in arrays.items() if not name.endswith("/deltas")},
    )
    main(["parity", str(folder)])
    assert "FAIL 9b       deltas" in (out := capsys.readouterr().out)
    assert "nothing recorded" in out


def test_a_kind_without_a_tolerance_must_be_equal(folder, capsys):
    tolerances = read_json(folder / "tolerances.json")
    del tolerances["hidden_states"]
    (folder / "tolerances.json").write_text(json.dumps(tolerances))
    assert failed(folder, capsys) == {"hidden_states"}


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1.0])
def test_a_value_that_ours_does_not_have_is_no_agreement(value):
    recorded = np.array([value], np.float32)
    assert compare("pose", "here", recorded, np.zeros(1, np.float32)).value == (
        1.0 if value == 1.0 else np.inf
    )
    assert compare("pose", "here", recorded, recorded).value == 0


def test_the_failing_line_names_the_worst_array_and_the_tolerance(folder, capsys):
    change(folder / "9b_rollout.npz", "dyn_A/h_final", off_by(0.5))
    assert main(["parity", str(folder)]) == 1
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("FAIL"))
    assert "lstm_h" in line and "dyn_A/h_final" in line and "5.00e-01" in line and "5.00e-04" in line
    assert out.splitlines()[-1] == "24 of 25 kinds within tolerance"


def test_the_verdicts_can_be_written_as_json(folder, capsys, tmp_path_factory):
    file = tmp_path_factory.mktemp("json") / "parity.json"
    change(folder / "9b_rollout.npz", "dyn_A/h_final", off_by(0.5))
    assert main(["parity", str(folder), "--json", str(file)]) == 1
    rows = {(row["recording"], row["kind"]): row for row in json.loads(file.read_text())}
    assert len(rows) == 25
    assert [key for key, row in rows.items() if not row["passed"]] == [("9b", "lstm_h")]
    assert rows["9b", "exits"]["tolerance"] == 0


# The command refuses a recording that it cannot read in one line.


@pytest.mark.parametrize(
    "name",
    [
        "9b_weights.npz",
        "9b_rollout.npz",
        "9b_window.npz",
        "9b_info.json",
        "9b_train.json",
        "text.json",
        "preproc.npz",
        "tolerances.json",
    ],
)
def test_a_missing_file_is_named(folder, capsys, name):
    (folder / name).unlink()
    assert f"{name} is missing" in refusal(folder, capsys)


def test_a_folder_without_recordings_is_refused(folder, capsys):
    (folder / "9b_keys.json").unlink()
    assert "no *_keys.json" in refusal(folder, capsys)
    assert "is no folder" in refusal(folder / "nowhere", capsys)


def as_npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def with_objects() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, raw_static=np.array([{}], dtype=object))
    return buffer.getvalue()


def scrambled(content: bytes) -> bytes:
    """A damaged file whose list of members is intact, but not their content."""
    return content[:80] + bytes(byte ^ 0xFF for byte in content[80:4000]) + content[4000:]


@pytest.mark.parametrize("name", ["9b_weights.npz", "preproc.npz"])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[: len(content) // 2], id="truncated"),
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(scrambled, id="scrambled"),
        pytest.param(lambda content: as_npy(), id="npy"),
        pytest.param(lambda content: with_objects(), id="objects"),
        pytest.param(lambda content: b"no arrays at all", id="text"),
    ],
)
def test_a_damaged_array_file_is_refused_with_its_path(folder, capsys, name, damage):
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    assert str(path) in refusal(folder, capsys)


@pytest.mark.parametrize(
    "name", ["9b_keys.json", "9b_info.json", "9b_train.json", "text.json", "tolerances.json"]
)
@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00"])
def test_a_damaged_json_file_is_refused_with_its_path(folder, capsys, name, content):
    (folder / name).write_bytes(content)
    assert str(folder / name) in refusal(folder, capsys)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("9b_rollout.npz", "raw_gripper"),
        ("9b_rollout.npz", "dyn_A/h_final"),
        ("9b_window.npz", "fwd1/strategy2_idx"),
        ("9b_weights.npz", "perceiver.latents"),
        ("preproc.npz", "gripper/out_sub16"),
        ("preproc.npz", "shift4/single_out"),
    ],
)
def test_a_missing_array_is_named(folder, capsys, file, name):
    arrays = read_arrays(folder / file)
    del arrays[name]
    np.savez(folder / file, **arrays)
    assert name in refusal(folder, capsys)


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("text.json", "truncation_case"),
        ("9b_info.json", "instruction"),
        ("9b_keys.json", "config"),
        ("9b_train.json", "exit_groups"),
    ],
)
def test_a_missing_entry_is_named(folder, capsys, file, key):
    values = read_json(folder / file)
    del values[key]
    (folder / file).write_text(json.dumps(values))
    assert f"'{key}'" in refusal(folder, capsys)


def test_a_weight_of_another_shape_is_refused_by_name(folder, capsys):
    change(folder / "9b_weights.npz", "lang_encoder.transformer.norm_f.weight", lambda array: array[:-1])
    assert "final_norm.weight has shape" in refusal(folder, capsys)
