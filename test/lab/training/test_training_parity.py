"""Tests that training does the steps of the reference, and that the comparison finds differences."""

import json
import shutil

import numpy as np
import pytest
import torch
from paths import GOLDEN_COMPACT

from deer_vla_ros.lab.parity.comparison import compare_relative, judge
from deer_vla_ros.lab.parity.parity_training import TRAINING64_KINDS, check_training64
from deer_vla_ros.lab.parity.reference_tensors import read_arrays, read_json, read_model
from deer_vla_ros.lab.training.augmentation import shift

COMPACT = GOLDEN_COMPACT
TOLERANCES = read_json(COMPACT / "tolerances.json")["train64"]


def test_every_step_of_both_stages_agrees_in_double():
    verdicts = list(judge("9b", check_training64(COMPACT, "9b"), TRAINING64_KINDS, TOLERANCES))
    assert [verdict.kind for verdict in verdicts] == list(TRAINING64_KINDS)
    assert not [verdict for verdict in verdicts if not verdict.passed]
    assert (
        max(verdict.worst.value for verdict in verdicts) < 1e-10
    )  # far below the tolerances: the same arithmetic


@pytest.mark.long
def test_each_number_beyond_its_tolerance_is_noticed_and_no_other(tmp_path):
    shutil.copytree(COMPACT, tmp_path, dirs_exist_ok=True)
    record = read_json(tmp_path / "9b_train_fp64.json")
    joint, exit_stage = record["stages"]
    joint["steps"][2]["losses"]["loss_calvin_num_1"] *= 1 + 3e-6
    joint["steps"][3]["grad_norm_per_param"]["perceiver.latents"] *= 1 + 3e-5
    exit_stage["steps"][0]["grad_norm_total"] *= 1 + 3e-5
    exit_stage["param_delta_l2"]["extra_exit.actions.mlp.5.bias"] *= 1 + 3e-4
    del joint["param_delta_l2"]["perceiver.norm.weight"]
    (tmp_path / "9b_train_fp64.json").write_text(json.dumps(record))
    values = read_arrays(tmp_path / "9b_train_fp64.npz")
    values["joint/perceiver.norm.bias"][3] += 1e-5
    np.savez(tmp_path / "9b_train_fp64.npz", **values)
    found = {
        difference.where
        for difference in check_training64(tmp_path, "9b")
        if difference.value > TOLERANCES.get(difference.kind, 0)
    }
    assert found == {
        "joint step 2 loss_calvin_num_1",
        "joint step 3 perceiver.latents",
        "exit step 0, all parameters",
        "exit extra_exit.actions.mlp.5.bias",
        "joint perceiver.norm.weight",
        "value of joint/perceiver.norm.bias",
    }


def test_the_recorded_shifts_move_whole_pixels():
    arrays = read_arrays(COMPACT / "preproc.npz")
    images = torch.from_numpy(arrays["shift4/in"]).flatten(0, 1)
    offsets = torch.from_numpy(arrays["shift4/traj_shift_int"]).long()[:, 0, 0]
    recorded = torch.from_numpy(arrays["shift4/traj_out"]).flatten(0, 1)
    torch.testing.assert_close(shift(images, offsets, 4), recorded, rtol=0, atol=5e-5)
    assert float((shift(images, offsets.flip(1), 4) - recorded).abs().max()) > 0.1


def test_the_names_of_trained_parameters_go_back_to_the_reference_s():
    names = read_model(COMPACT, "9b").reference_names
    assert names["layers.3.cross_attention.feed_forward_gate"] == (
        "lang_encoder.transformer.blocks.3.gated_cross_attn_layer.ff_gate"
    )
    assert names["shared_head.pose.out.bias"] == "extra_exit.actions.mlp.5.bias"
    assert names["auxiliary_heads.5.lstms.0.weight_hh_l0"] == "lm_exit_modules.2.rnn.layers.0.weight_hh_l0"
    assert not [
        name for name in names if ".self_attn." in name and "out_proj" not in name
    ]  # cut out of one matrix
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize(
    ("recorded", "ours", "expected"),
    [(2.0, 2.0, 0.0), (2.0, 2.002, 0.001), (0.0, 1e-9, np.inf), (np.nan, 1.0, np.inf), (1.0, np.nan, np.inf)],
)
def test_relative_differences(recorded, ours, expected):
    assert compare_relative("kind", "here", recorded, ours).value == pytest.approx(expected)
