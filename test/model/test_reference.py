"""Tests of the reference's weight names: every tensor has a place, and a missing tensor is named."""

import pytest
import torch
from paths import GOLDEN_COMPACT
from small_model import SMALL

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.parity.reference_tensors import model_config, read_arrays, read_json, read_model
from deer_vla_ros.model.action_space import CALVIN
from deer_vla_ros.model.checkpoint import Checkpoint, CheckpointInfo, load, save
from deer_vla_ros.model.network import state_shapes
from deer_vla_ros.model.reference import from_reference, reference_names

RECORDING = GOLDEN_COMPACT


@pytest.fixture(scope="module")
def keys() -> dict:
    return read_json(RECORDING / "9b_keys.json")


@pytest.fixture(scope="module")
def tensors(keys) -> dict[str, torch.Tensor]:
    stored = {
        name: torch.from_numpy(array).float()
        for name, array in read_arrays(RECORDING / "9b_weights.npz").items()
    }
    return {entry["key"]: stored[entry["stored_as"]] for entry in keys["keys"]}


ONE_OF_EACH_PART = [
    "vision_encoder.visual.class_embedding",
    "vision_encoder.visual.transformer.resblocks.1.attn.in_proj_weight",
    "vision_encoder.visual.transformer.resblocks.0.mlp.c_fc.bias",
    "perceiver.latents",
    "perceiver.layers.5.0.to_kv.weight",
    "lang_encoder.transformer.wte.weight",
    "lang_encoder.transformer.norm_f.weight",
    "lang_encoder.transformer.blocks.3.gated_cross_attn_layer.attn_gate",
    "lang_encoder.transformer.blocks.7.gated_cross_attn_layer.attn.to_q.weight",
    "lang_encoder.transformer.blocks.7.decoder_layer.ffn.down_proj.weight",
    "lm_head.rnn.layers.0.weight_ih_l0",
    "extra_exit.gripper.mlp.1.weight",
    "lm_exit_modules.2.actions.mlp.5.bias",
]


@pytest.mark.parametrize("key", ONE_OF_EACH_PART)
def test_a_missing_reference_tensor_is_named(keys, tensors, key):
    config = model_config(keys, tensors)
    incomplete = {name: tensor for name, tensor in tensors.items() if name != key}
    with pytest.raises(UserError) as refusal:
        from_reference(incomplete, config)
    assert f"'{key}' is missing" in str(refusal.value)


@pytest.mark.parametrize("key", ["perceiver.latents", "extra_exit.gripper.mlp.1.weight"])
def test_a_reference_tensor_of_the_wrong_shape_is_refused_in_one_line(keys, tensors, key):
    config = model_config(keys, tensors)
    with pytest.raises(UserError) as refusal:
        from_reference({**tensors, key: tensors[key][:-1]}, config)
    assert "has shape" in str(refusal.value) and "\n" not in str(refusal.value)


def test_every_tensor_of_the_reference_has_its_place_or_is_known_to_have_none(keys, tensors):
    """What is not taken does not change the outputs: CLIP's output side, and second names of a tensor."""
    taken = set()

    class Watched(dict):
        def __getitem__(self, name):
            taken.add(name)
            return super().__getitem__(name)

    from_reference(Watched(tensors), model_config(keys, tensors))
    pointers = {tensors[name].data_ptr() for name in taken}
    left = {name for name in tensors if tensors[name].data_ptr() not in pointers}
    assert left == {
        "vision_encoder.visual.proj",
        "vision_encoder.visual.ln_post.weight",
        "vision_encoder.visual.ln_post.bias",
    }


def test_the_names_of_a_network_with_mosaic_gpt():
    """The compact recording has MPT, whose decoder blocks have other names."""
    names = reference_names(SMALL, is_mpt=False)
    expected = {
        "vision.clip.encoder.layers.0.self_attn.k_proj.bias": (
            "vision_encoder.visual.transformer.resblocks.0.attn.in_proj_bias#k"
        ),
        "layers.4.block.norm_attention.weight": "lang_encoder.transformer.blocks.4.decoder_layer.ln_1.weight",
        "layers.4.block.norm_query.weight": (
            "lang_encoder.transformer.blocks.4.decoder_layer.attn.q_ln.weight"
        ),
        "layers.4.block.norm_key.weight": "lang_encoder.transformer.blocks.4.decoder_layer.attn.k_ln.weight",
        "layers.4.block.norm_mlp.weight": "lang_encoder.transformer.blocks.4.decoder_layer.ln_2.weight",
        "layers.4.block.up.weight": "lang_encoder.transformer.blocks.4.decoder_layer.mlp.mlp_up.weight",
        "layers.4.block.down.weight": "lang_encoder.transformer.blocks.4.decoder_layer.mlp.mlp_down.weight",
        "auxiliary_heads.3.norms.1.bias": "lm_exit_modules.1.rnn.layers.4.bias",
        "auxiliary_heads.3.pose.out.bias": "lm_exit_modules.1.actions.mlp.5.bias",
    }
    assert {name: names[name] for name in expected} == expected
    assert names.keys() == state_shapes(SMALL).keys()


def test_a_converted_reference_gives_the_same_outputs_after_it_was_saved_and_loaded(tmp_path):
    recording = read_model(RECORDING, "9b")
    model = recording.model
    info = CheckpointInfo(model.config, CALVIN, "recording", False, "l2", (1.0,) * len(model.config.exits))
    save(tmp_path, Checkpoint(info, model, recording.tokenizer), "")
    loaded = load(tmp_path)
    images = torch.from_numpy(recording.rollout["vision_x"][:2, 0, 0]).transpose(0, 1)
    results = []
    for checkpoint in (Checkpoint(info, model, recording.tokenizer), loaded):
        text = checkpoint.model.encode_text(
            *checkpoint.tokenizer.encode([recording.info["instruction"]]), recording.tokenizer.image_token
        )
        hidden = list(checkpoint.model.hidden_states(checkpoint.model.encode_images(images), text))
        head = checkpoint.model.shared_head
        results.append((*hidden, head(hidden[-1].amax(-2)[None], head.initial_state()).pose))
    for before, after in zip(*results):
        torch.testing.assert_close(
            after, before, rtol=0, atol=1e-6
        )  # alignment in the file changes the last bit
    assert loaded.info == info
