"""Compares the closed forms of the costs with what the network really computes, and with the paper."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deer_vla_ros.budget.cost import (
    CAMERAS,
    GIB,
    cost_table,
    cumulated_gib,
    layer_macs,
    layers_within,
    resampler_macs,
    vision_macs,
)
from deer_vla_ros.model.config import HeadConfig, ModelConfig, openflamingo_3b, openflamingo_9b, tabletop
from deer_vla_ros.model.network import MultiExitVLA, layer_bytes, restore_buffers

VISUAL_TOKENS = 128
SIZES = [
    pytest.param(tabletop(), id="tabletop"),
    pytest.param(
        dataclasses.replace(tabletop(), head=HeadConfig(hidden=1, mlp_widths=(8,), lstm_layers=0)),
        id="no memory",
    ),
    pytest.param(openflamingo_3b(4), id="3b"),
    pytest.param(openflamingo_9b(8), id="9b"),
]


def on_meta(config: ModelConfig) -> MultiExitVLA:
    """The network at its real size on the meta device: operations are counted, but not computed."""
    with torch.device("meta"):
        model = MultiExitVLA(config).eval().requires_grad_(False)
    restore_buffers(model)
    return model


def counted_gmac(compute) -> tuple[float, object]:
    """GMAC of the matrix products that torch counts in `compute()`, and its result."""
    # Only the plain attention is made of products that the counter sees on every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = compute()
    return counter.get_total_flops() / 2 / 1e9, result


@pytest.mark.parametrize("config", SIZES)
@pytest.mark.parametrize("tokens", [3, 14, 32])
def test_every_layer_costs_what_torch_counts(config, tokens):
    model, table = on_meta(config), cost_table(config, tokens)
    ids = torch.ones(1, tokens, dtype=torch.int64, device="meta")
    text = model.encode_text(ids, ids, image_token=1)
    visual = torch.empty(1, config.visual_tokens, config.vision.width, device="meta")
    states = model.hidden_states(visual, text)
    counted = [counted_gmac(lambda: next(states))[0] for _ in range(config.decoder.layers)]
    assert table.layers == pytest.approx(counted, rel=0.01)
    assert table.language(config.decoder.layers) == pytest.approx(sum(counted), rel=0.01)


@pytest.mark.parametrize("config", SIZES)
def test_vision_costs_what_torch_counts(config):
    model, table = on_meta(config), cost_table(config, 14)
    size = config.vision.image_size
    images, tcp = torch.empty(1, CAMERAS, 3, size, size, device="meta"), torch.empty(1, 7, device="meta")
    counted, _ = counted_gmac(lambda: model.see(images, tcp))
    assert table.vision == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("config", SIZES)
def test_a_head_probe_costs_one_multiplication_per_weight(config):
    head = on_meta(config).shared_head
    weights = sum(parameter.numel() for parameter in head.parameters() if parameter.dim() == 2)
    assert cost_table(config, 14).head == pytest.approx(weights / 1e9)


def test_one_layer_of_the_3b_costs_what_the_paper_says():
    config = openflamingo_3b()
    assert layer_macs(config.decoder, 0, 32, VISUAL_TOKENS, 1024) / 1e9 == pytest.approx(2.89, abs=0.01)
    assert layer_macs(config.decoder, 0, 14, VISUAL_TOKENS, 1024) / 1e9 == pytest.approx(1.34, abs=0.01)


def test_one_layer_of_the_3b_is_split_between_decoder_and_cross_attention_as_the_paper_says():
    config = openflamingo_3b()
    every_other = ModelConfig.from_dict(
        {**config.to_dict(), "decoder": {**config.to_dict()["decoder"], "cross_attention_every": 2}}
    )
    decoder, both = (
        layer_macs(every_other.decoder, layer, 32, VISUAL_TOKENS, 1024) / 1e9 for layer in (0, 1)
    )
    assert decoder == pytest.approx(1.62, abs=0.01)
    assert both - decoder == pytest.approx(1.28, abs=0.01)


def test_twenty_four_layers_on_a_short_instruction_cost_the_papers_31_gigaflops():
    assert cost_table(openflamingo_3b(24), 14).language(24) == pytest.approx(31.2, rel=0.04)


def test_an_image_costs_what_the_paper_says():
    config = openflamingo_3b()
    assert 2 * vision_macs(config.vision) / 1e9 == pytest.approx(162, abs=1)
    assert 2 * resampler_macs(config.resampler, config.vision) / 1e9 == pytest.approx(11.5, abs=0.1)


def test_a_step_costs_vision_layers_and_probes():
    table = cost_table(tabletop(), 10)
    assert table.language(0) == 0
    assert table.language(4) == pytest.approx(4 * table.layers[0])
    assert table.total(4, 3) == pytest.approx(table.vision + table.language(4) + 3 * table.head)


def test_a_memory_budget_keeps_the_layers_whose_bytes_fit():
    config = tabletop()
    for dtype, bits in ((torch.float32, None), (torch.float16, None), (torch.float32, 8), (torch.float32, 4)):
        sizes = layer_bytes(config, dtype, bits)
        exact = sum(sizes[:6]) / GIB
        assert cumulated_gib(sizes)[5] == exact
        assert layers_within(config, sizes, exact) == 6
        assert layers_within(config, sizes, exact * 0.999) == 4
        assert layers_within(config, sizes, 0) == 12
