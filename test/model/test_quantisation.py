"""Tests of matrices in 8 and 4 bits: their bytes and values, and what a network that has them decides."""

import numpy as np
import pytest
import torch
from small_model import SMALL, observations, small_model, small_tokenizer

from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.backend_check import choose
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.model import quantisation
from deer_vla_ros.model.action_space import CALVIN
from deer_vla_ros.model.checkpoint import EMBEDDED, Checkpoint, CheckpointInfo, load, load_as, save
from deer_vla_ros.model.config import openflamingo_3b, tabletop
from deer_vla_ros.model.network import layer_bytes
from deer_vla_ros.model.quantisation import (
    QuantisedLinear,
    dequantised,
    empty_tensors,
    packed_anywhere,
    product_anywhere,
    quantise,
    quantise_rows,
)

ROUNDING = 2**-7
"""Of a product in bfloat16: inputs and outputs are rounded to 8 bits."""


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes, one of them zero, and a group of equal numbers."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, columns, generator=generator) * torch.logspace(-4, 1, rows)[:, None]
    made[rows // 2] = 0
    made[0, :32] = 0.3
    return made


def quantised(weights: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of a matrix, as numbers, and their scales."""
    codes = weights.clone()
    return codes, quantise_rows(codes, bits)


def linear(weights: torch.Tensor, bits: int) -> QuantisedLinear:
    own = empty_tensors("layers.weight", weights.shape, torch.float32, bits)
    for _ in quantise(weights, *own.values()):
        pass
    made = QuantisedLinear(*weights.shape, bits)
    made.load_state_dict(dict(zip(("weight", "scale"), own.values())), assign=True)
    return made


@pytest.mark.parametrize("shape", [(16, 32), (96, 64), (80, 160), (3000 * 16, 32)])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_product_is_that_of_the_dequantised_matrix(bits, shape):
    weights = matrix(*shape)
    x = torch.randn(2, 7, shape[1], generator=torch.Generator().manual_seed(1))
    expected = x.double() @ dequantised(*quantised(weights, bits)).double().T
    size = x.abs().double() @ weights.abs().double().T  # of the terms of each sum
    result = linear(weights, bits)(x)
    assert result.dtype == torch.float32 and result.shape == expected.shape
    assert ((result - expected).abs() <= ROUNDING * size + 1e-30).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_other_devices_compute_the_same_product(bits):
    weights = matrix(96, 64)
    codes, scale = quantised(weights, bits)
    stored = (
        (codes.to(torch.int8), scale) if bits == 8 else (packed_anywhere(codes.int()), scale.transpose(0, 1))
    )
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    size = x.abs().float() @ weights.abs().T
    assert ((product_anywhere(x, *stored) - linear(weights, bits)(x)).abs() <= ROUNDING * size + 1e-30).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_no_weight_moves_by_more_than_half_a_step(bits):
    weights = matrix(96, 64)
    moved = (dequantised(*quantised(weights, bits)) - weights).abs()
    groups = weights.unflatten(1, (-1, 32))
    step = weights.abs().amax(1, keepdim=True) / 127 if bits == 8 else (groups.amax(2) - groups.amin(2)) / 15
    # and by what the rounding of the scale or of the zero to bfloat16 cuts off at the ends of the range
    rounding = 0 if bits == 8 else groups.abs().amax(2) / 128
    most = (0.51 * step + rounding + 1e-30).repeat_interleave(64 if bits == 8 else 32, 1)
    assert (moved <= most).all()


@pytest.mark.parametrize("config", [tabletop(), openflamingo_3b(2)], ids=["tabletop", "3b"])
def test_layers_in_fewer_bits_take_as_many_bytes_as_are_announced(config):
    whole, eight, four = (sum(layer_bytes(config, torch.float32, bits)) for bits in (None, 8, 4))
    assert four < eight < whole / 3
    if config == openflamingo_3b(2):
        assert eight < whole / 3.9 and four < whole / 6.3


@pytest.mark.parametrize("bits", [8, 4])
def test_a_loaded_layer_has_the_announced_bytes(bits):
    model = load(EMBEDDED, bits=bits, layers=3).model
    for layer, announced in zip(model.layers, layer_bytes(tabletop(), torch.float32, bits), strict=True):
        assert sum(tensor.nbytes for tensor in layer.state_dict().values()) == announced
    present = [not any(t.is_meta for t in layer.state_dict().values()) for layer in model.layers]
    assert present == [True] * 3 + [False] * 9
    assert (
        model.dtype == torch.float32
        and model.vision.state_dict().keys() == load(EMBEDDED).model.vision.state_dict().keys()
    )


def moves(bits: int | None, backend: str = "eager") -> np.ndarray:
    """(steps, 6) The poses of steps through all layers."""
    checkpoint = load(EMBEDDED, bits=bits)
    exits = checkpoint.info.model.exits
    rule = ExitRule(exits, (-1.0,) * len(exits), checkpoint.info.delta)
    chosen = choose(backend, checkpoint.model, checkpoint.tokenizer, rule)
    assert chosen.backend == backend, chosen.report
    chosen.policy.reset("lift the red block")
    return np.stack([chosen.policy.step(seen).action.pose for seen in observations(5)])


@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.2)])
def test_a_quantised_network_decides_nearly_the_same(bits, most):
    difference = np.abs(moves(bits) - moves(None)).max()
    assert 0 < difference < most


@pytest.mark.long
def test_a_quantised_network_can_be_compiled(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert np.abs(moves(4, "compiled") - moves(4)).max() < 0.05


def test_a_batch_decides_as_one_alone():
    checkpoint = load_as("int4", EMBEDDED)
    rule = ExitRule(checkpoint.info.model.exits, checkpoint.info.thresholds, checkpoint.info.delta)
    alone, both = (DeerPolicy(checkpoint.model, checkpoint.tokenizer, rule, lanes) for lanes in (1, 2))
    for lane, text in enumerate(("lift the red block", "open the drawer")):
        both.reset(text, lane)
    alone.reset("lift the red block")
    for first, second in zip(observations(3), observations(3, seed=1)):
        one, two = alone.step(first), both.step_lanes({0: first, 1: second})[0]
        np.testing.assert_allclose(one.action.pose, two.action.pose, atol=0.02)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_network_whose_sizes_torch_does_not_take_is_refused(tmp_path, bits):
    info = CheckpointInfo(SMALL, CALVIN, "random", False, "l2", (0.01, 0.02, 1e8))
    save(tmp_path, Checkpoint(info, small_model(), small_tokenizer()), "")
    with pytest.raises(UserError, match=f"int{bits}: .* 16 rows and 16 columns.* needed: use float32"):
        load(tmp_path, bits=bits)


def test_a_torch_without_the_operator_is_told_to_be_replaced(monkeypatch):
    monkeypatch.setitem(quantisation.ON_CPU, 4, "_no_such_operator")
    with pytest.raises(UserError, match="int4: torch .* no operator .*: install torch 2.6 or newer"):
        load_as("int4", EMBEDDED)
    load_as("int8", EMBEDDED)


def test_a_quantised_network_is_never_saved(tmp_path):
    with pytest.raises(AssertionError, match="full precision"):
        save(tmp_path, load(EMBEDDED, bits=8), "")
    assert not list(tmp_path.iterdir())
