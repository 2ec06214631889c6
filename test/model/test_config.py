"""Tests of ModelConfig: its sizes, and messages for wrong values."""

import json
import re

import pytest
import torch
from small_model import SMALL, with_decoder

from deer_vla_ros.errors import UserError
from deer_vla_ros.model.config import PRESETS, ModelConfig, openflamingo_3b, openflamingo_9b, tabletop
from deer_vla_ros.model.network import MultiExitVLA


def millions(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def on_meta(config: ModelConfig) -> MultiExitVLA:
    """The network at its real size without its memory."""
    with torch.device("meta"):
        return MultiExitVLA(config)


@pytest.mark.parametrize(
    ("config", "exits"),
    [
        (openflamingo_3b(), (1, 3, 5, 7, 9, 11)),
        (openflamingo_9b(), (1, 3, 5, 7, 9, 11, 13, 15)),
        (tabletop(), (1, 3, 5, 7, 9, 11)),
        (openflamingo_3b(layers=4), (1, 3)),
        (openflamingo_3b(layers=5), (1, 3, 4)),
        (openflamingo_3b(layers=2), (1,)),
    ],
)
def test_exits_lie_every_second_layer_and_at_the_last(config, exits):
    assert config.exits == exits


def test_a_wider_interval_spaces_the_exits_out():
    config = ModelConfig.from_dict({**SMALL.to_dict(), "exit_interval": 3})
    assert config.exits == (2, 5)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_survives_json(preset):
    config = PRESETS[preset]()
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def changed(path: str, value: object = None, drop: bool = False) -> dict:
    """SMALL as a dict, with the value at `path` replaced or taken out."""
    values = json.loads(json.dumps(SMALL.to_dict()))
    *parents, name = path.split(".")
    part = values
    for parent in parents:
        part = part[parent]
    if drop:
        del part[name]
    else:
        part[name] = value
    return values


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (changed("decoder.width", drop=True), r"model\.decoder .*lacks \['width'\]"),
        (changed("decoder.depth", 3), r"model\.decoder has unknown keys \['depth'\]"),
        (changed("colour", "red"), r"model has unknown keys \['colour'\]"),
        (changed("vision", drop=True), r"model .*lacks \['vision'\]"),
        (changed("exit_interval", 1), "exit_interval is 1"),
        (changed("decoder.heads", 3), r"decoder\.width 16 is not a multiple of decoder\.heads 3"),
        (changed("vision.heads", 5), r"vision\.width 16 is not a multiple of vision\.heads 5"),
        (changed("decoder.heads", 0), r"decoder\.heads"),
        (changed("decoder.layers", 0), r"decoder\.layers is 0"),
        (changed("decoder.layers", 1), r"decoder\.layers is 1"),
        (changed("vision.patch_size", 17), r"vision\.patch_size 17 is larger"),
        (changed("head.mlp_widths", [32, 0]), r"head\.mlp_widths"),
        (changed("decoder.width", -16), r"decoder\.width is -16"),
        (changed("max_tokens", 0), r"max_tokens is 0"),
        (changed("decoder.layers", "six"), r"decoder\.layers is 'six'"),
        (changed("decoder.layers", 6.5), r"decoder\.layers is 6\.5"),
        (changed("decoder.qk_norm", "yes"), r"decoder\.qk_norm is 'yes'"),
        (changed("head.mlp_widths", 32), r"head\.mlp_widths is 32"),
        (changed("head.mlp_widths", [32, "a"]), r"head\.mlp_widths"),
        (changed("vision", None), r"model\.vision"),
        ([], "model"),
    ],
)
def test_a_config_that_makes_no_network_is_refused_by_name(values, complaint):
    with pytest.raises(UserError) as refusal:
        ModelConfig.from_dict(values)
    assert re.search(complaint, str(refusal.value))
    assert "\n" not in str(refusal.value)


def test_openflamingo_3b_has_the_parameter_counts_of_the_paper():
    model = on_meta(openflamingo_3b())
    # The figure counts CLIP's projection and the norm before it, which the policy never runs.
    assert millions(model.vision) + (1024 * 768 + 2 * 1024) / 1e6 == pytest.approx(304.0, abs=0.05)
    assert millions(model.resampler) == pytest.approx(63.0, abs=0.05)
    assert len(model.layers) == 12
    for layer in model.layers:
        assert millions(layer.block) == pytest.approx(50.3, abs=0.05)
        assert millions(layer.cross_attention) == pytest.approx(36.7, abs=0.05)
    assert millions(model.shared_head) == pytest.approx(40.9, abs=0.06)
    assert model.token_embedding.weight.shape == (50280, 2048)
    assert model.final_norm is None
    assert sorted(model.auxiliary_heads, key=int) == ["1", "3", "5", "7", "9"]


def test_openflamingo_9b_has_the_parameter_counts_of_the_paper():
    model = on_meta(openflamingo_9b())
    assert [i for i, layer in enumerate(model.layers) if layer.cross_attention is not None] == [3, 7, 11, 15]
    for layer in model.layers:
        assert millions(layer.block) == pytest.approx(201.3, abs=0.05)
        if layer.cross_attention is not None:
            assert millions(layer.cross_attention) == pytest.approx(139.5, abs=0.05)
    assert millions(model.shared_head) == pytest.approx(49.3, abs=0.05)
    assert model.final_norm is not None


def test_a_visual_token_is_a_patch():
    assert openflamingo_3b().vision.tokens == 256


def test_cross_attention_sits_on_every_nth_layer():
    decoder = with_decoder(SMALL, cross_attention_every=4, layers=9).decoder
    assert [layer for layer in range(9) if decoder.has_cross_attention(layer)] == [3, 7]
