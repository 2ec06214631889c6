"""Tests that the layers treat text, images, padding and positions as the reference does."""

import pytest
import torch
from small_model import INSTRUCTION, SMALL, small_model, small_tokenizer, with_decoder

from deer_vla_ros.model.decoder import alibi_slopes, attention_bias
from deer_vla_ros.model.network import MultiExitVLA

WIDTH, VISUAL_TOKENS = SMALL.vision.width, 2 * SMALL.resampler.latents


def visual_tokens(seed: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, VISUAL_TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def hidden_states(
    model: MultiExitVLA, ids: list[int], image_token: int, visual: torch.Tensor
) -> torch.Tensor:
    """(layers, S, width) of one text without padding."""
    text = model.encode_text(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64), image_token)
    return torch.cat(list(model.hidden_states(visual, text)))


@pytest.mark.parametrize("heads", [1, 2, 4, 16, 32])
def test_alibi_slopes_of_a_power_of_two_halve_geometrically(heads):
    expected = [2 ** (-8 * h / heads) for h in range(1, heads + 1)]
    assert alibi_slopes(heads, 8).tolist() == pytest.approx(expected)


def test_alibi_slopes_of_other_head_counts_interleave_those_of_the_next_power():
    eight = [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(6, 8).tolist() == pytest.approx([*eight[1::2], *eight[::2]][:6])


def test_a_token_sees_itself_and_real_tokens_before_it_only():
    mask = torch.tensor([[1, 1, 1, 0]])
    bias = attention_bias(mask, SMALL.decoder)[0, 0]
    visible = bias > -1e30
    assert visible.tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [True, True, True, False],
        [True, True, True, False],
    ]


def test_a_nearer_token_is_penalised_less_by_exactly_its_slope():
    bias = attention_bias(torch.ones(1, 5, dtype=torch.int64), SMALL.decoder)
    slopes = alibi_slopes(SMALL.decoder.heads, 8)
    for head, slope in enumerate(slopes):
        last = bias[0, head, -1]
        assert torch.allclose(last[1:] - last[:-1], slope.expand(4))


def test_text_before_the_image_token_gets_no_cross_attention():
    model, tokenizer = small_model(), small_tokenizer()
    image, ids = tokenizer.image_token, [5, 6, tokenizer.image_token, 7, 8]
    one, other = (hidden_states(model, ids, image, visual_tokens(seed)) for seed in (1, 2))
    assert torch.equal(one[:, :2], other[:, :2])
    assert ((one[:, 2:] - other[:, 2:]).abs().amax(-1) > 1e-4).all(), (
        "from <image> on every token sees the images, in every layer"
    )


def test_without_an_image_token_the_images_change_nothing():
    model, tokenizer = small_model(), small_tokenizer()
    one, other = (
        hidden_states(model, [5, 6, 7], tokenizer.image_token, visual_tokens(seed)) for seed in (1, 2)
    )
    assert torch.equal(one, other)


def test_closed_gates_make_the_network_blind_and_open_ones_do_not():
    tokenizer = small_tokenizer()
    ids = tokenizer.encode([INSTRUCTION])[0][0].tolist()
    for gate, blind in ((0.0, True), (0.7, False)):
        model = small_model(with_decoder(SMALL, gate_init=gate))
        one, other = (
            hidden_states(model, ids, tokenizer.image_token, visual_tokens(seed)) for seed in (1, 2)
        )
        assert torch.equal(one, other) == blind


def test_right_padding_does_not_change_the_hidden_states_of_real_tokens():
    model, tokenizer = small_model(), small_tokenizer()
    short, long = "lift block", "push the red block to the left"
    ids, mask = tokenizer.encode([short, long])
    visual = visual_tokens(0)
    together = torch.stack(
        list(
            model.hidden_states(visual.expand(2, -1, -1), model.encode_text(ids, mask, tokenizer.image_token))
        )
    )
    for row, instruction in enumerate((short, long)):
        alone_ids, _ = tokenizer.encode([instruction])
        alone = hidden_states(model, alone_ids[0].tolist(), tokenizer.image_token, visual)
        assert mask[row].sum() == alone.shape[1]
        torch.testing.assert_close(together[:, row, : alone.shape[1]], alone, rtol=0, atol=1e-5)


def test_a_later_token_does_not_change_an_earlier_one():
    model, tokenizer = small_model(), small_tokenizer()
    image = tokenizer.image_token
    one = hidden_states(model, [image, 5, 6, 7], image, visual_tokens(0))
    other = hidden_states(model, [image, 5, 6, 8], image, visual_tokens(0))
    torch.testing.assert_close(one[:, :3], other[:, :3], rtol=0, atol=1e-6)
    assert not torch.allclose(one[:, 3], other[:, 3])


def test_a_layer_runs_only_when_its_output_is_asked_for():
    model, tokenizer = small_model(), small_tokenizer()
    ran = []
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    text = model.encode_text(*tokenizer.encode([INSTRUCTION]), tokenizer.image_token)
    states = model.hidden_states(visual_tokens(0), text)
    assert ran == []
    next(states), next(states)
    assert ran == [0, 1]
    assert len(list(states)) == 4
    assert ran == [0, 1, 2, 3, 4, 5]


def test_the_final_norm_is_never_part_of_the_layers():
    config = with_decoder(SMALL, final_norm=True)
    model, tokenizer = small_model(config), small_tokenizer()
    plain = small_model(SMALL)
    plain.load_state_dict(
        {name: tensor for name, tensor in model.state_dict().items() if name != "final_norm.weight"}
    )
    ids = tokenizer.encode([INSTRUCTION])[0][0].tolist()
    with_norm, without = (
        hidden_states(m, ids, tokenizer.image_token, visual_tokens(0)) for m in (model, plain)
    )
    assert torch.equal(with_norm, without)


def test_both_cameras_share_the_weights_and_keep_their_order():
    model = small_model()
    images = torch.randn(1, 2, 3, 16, 16)
    visual = model.encode_images(images)
    assert visual.shape == (1, VISUAL_TOKENS, WIDTH)
    swapped = model.encode_images(images.flip(1))
    half = SMALL.resampler.latents
    torch.testing.assert_close(visual[:, :half], swapped[:, half:], rtol=0, atol=1e-6)
    torch.testing.assert_close(visual[:, half:], swapped[:, :half], rtol=0, atol=1e-6)


def test_patch_tokens_come_without_the_class_token_and_before_the_final_norm():
    model = small_model()
    tokens = model.vision(torch.randn(1, 3, 16, 16))
    assert tokens.shape == (1, SMALL.vision.tokens, WIDTH)
    # A layer norm fresh from initialisation would leave every token with mean 0 and deviation 1.
    assert not torch.allclose(tokens.mean(-1), torch.zeros(1, SMALL.vision.tokens), atol=1e-3)
    assert not torch.allclose(tokens.std(-1, unbiased=False), torch.ones(1, SMALL.vision.tokens), atol=1e-2)


def test_the_head_steps_through_a_window_as_it_does_one_step_at_a_time():
    head = small_model().shared_head
    features = torch.randn(1, 5, SMALL.decoder.width)
    window = head(features, head.initial_state())
    state, poses = head.initial_state(), []
    for step in range(5):
        output = head(features[:, step : step + 1], state)
        state = output.state
        poses.append(output.pose)
    torch.testing.assert_close(torch.cat(poses, dim=1), window.pose, rtol=0, atol=1e-6)
    torch.testing.assert_close(state.cell, window.state.cell, rtol=0, atol=1e-6)
    assert window.pose.abs().max() <= 1
