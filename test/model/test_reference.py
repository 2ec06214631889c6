"""Do weights under the reference's names find their places, and is one that is missing named?"""

import pytest
import torch
from paths import GOLDEN_COMPACT

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.parity.reference_tensors import model_config, read_arrays, read_json, read_model
from deer_vla_ros.model.action_space import CALVIN
from deer_vla_ros.model.checkpoint import Checkpoint, CheckpointInfo, load, save
from deer_vla_ros.model.reference import from_reference

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
    """Each counts in the outputs: what is not taken is CLIP's output side, and names that repeat a tensor already taken."""
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
