"""Tests that a stage changes exactly its own parameters, with the right rates."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_model import INSTRUCTION, SMALL, small_model, small_tokenizer, with_decoder

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.training.losses import (
    ActionTargets,
    LossWeights,
    draw_exits,
    exit_features,
    multi_exit_loss,
)
from deer_vla_ros.lab.training.optimisation import (
    Optimiser,
    OptimiserSettings,
    Schedule,
    Stage,
    parameter_groups,
)

CONSTANT = Schedule(warmup_steps=0)
BATCH, WINDOW = 2, 3


def loss_of(model, seed: int = 0) -> torch.Tensor:
    """Computes the loss from images once."""
    random, tokenizer = torch.Generator().manual_seed(seed), small_tokenizer()
    images = torch.randn(BATCH, WINDOW, 2, 3, 16, 16, generator=random)
    features = exit_features(model, images, *tokenizer.encode([INSTRUCTION] * BATCH), tokenizer.image_token)
    targets = ActionTargets.from_actions(torch.rand(BATCH, WINDOW, 7, generator=random) * 2 - 1)
    return multi_exit_loss(
        model, features, targets, draw_exits(len(SMALL.exits), BATCH, WINDOW, random), LossWeights()
    ).total


def part_of(name: str) -> str:
    """Returns the part of the network that a parameter belongs to, in the words of the paper."""
    if name.startswith("layers."):
        return "cross-attention" if ".cross_attention." in name else "block"
    return name.split(".")[0]


def moved_parts(stage: Stage, settings: OptimiserSettings, model=None) -> dict[str, set[bool]]:
    """Returns for each part of the network whether its parameters changed in one step."""
    model = model or small_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimiser = Optimiser(model, stage, settings, CONSTANT)
    loss_of(model).backward()
    optimiser.step()
    moved: dict[str, set[bool]] = {}
    for name, parameter in model.named_parameters():
        moved.setdefault(part_of(name), set()).add(not torch.equal(parameter, before[name]))
    return moved


HEAD_PARTS = {"shared_head", "last_head", "auxiliary_heads"}
JOINT_PARTS = HEAD_PARTS | {"resampler", "token_embedding", "cross-attention"}


@pytest.mark.parametrize(
    ("stage", "settings", "parts"),
    [
        (Stage.JOINT, OptimiserSettings(), JOINT_PARTS),
        (Stage.JOINT, OptimiserSettings(train_vision=True), JOINT_PARTS | {"vision"}),
        (Stage.JOINT, OptimiserSettings(train_decoder=True), JOINT_PARTS | {"block"}),
        (Stage.EXIT, OptimiserSettings(), HEAD_PARTS),
        (Stage.EXIT, OptimiserSettings(train_vision=True, train_decoder=True), HEAD_PARTS),
    ],
)
def test_a_stage_moves_its_parts_and_nothing_else(stage, settings, parts):
    moved = moved_parts(stage, settings)
    assert {part for part, answers in moved.items() if True in answers} == parts
    assert {part for part, answers in moved.items() if answers == {False}} == set(moved) - parts


def test_what_is_frozen_gets_no_gradient():
    model = small_model()
    Optimiser(model, Stage.JOINT, OptimiserSettings(), CONSTANT)
    loss_of(model).backward()
    with_gradient = {
        part_of(name) for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    assert with_gradient == JOINT_PARTS


def test_in_the_exit_stage_features_carry_no_graph():
    model, tokenizer = small_model(), small_tokenizer()
    Optimiser(model, Stage.EXIT, OptimiserSettings(), CONSTANT)
    images = torch.zeros(1, 2, 2, 3, 16, 16)
    features = exit_features(model, images, *tokenizer.encode([INSTRUCTION]), tokenizer.image_token)
    assert not features.requires_grad
    Optimiser(model, Stage.JOINT, OptimiserSettings(), CONSTANT)
    assert exit_features(model, images, *tokenizer.encode([INSTRUCTION]), tokenizer.image_token).requires_grad


def test_the_final_norm_belongs_to_the_decoder():
    model = small_model(with_decoder(SMALL, final_norm=True))
    assert moved_parts(Stage.JOINT, OptimiserSettings(), model)["final_norm"] == {False}
    assert moved_parts(Stage.JOINT, OptimiserSettings(train_decoder=True), model)["final_norm"] == {True}


# Groups


@pytest.mark.parametrize("stage", list(Stage))
def test_everything_that_moves_is_in_exactly_one_group(stage):
    model = small_model()
    settings = OptimiserSettings(train_vision=True, train_decoder=True)
    names = [name for group in parameter_groups(model, stage, settings) for name in group.names]
    assert len(names) == len(set(names))
    expected = {
        name for name, _ in model.named_parameters() if stage is Stage.JOINT or part_of(name) in HEAD_PARTS
    }
    assert set(names) == expected


def test_only_cross_attention_decays_and_the_heads_learn_slower():
    groups = parameter_groups(
        small_model(), Stage.JOINT, OptimiserSettings(learning_rate=1e-3, head_scale=0.5, weight_decay=0.2)
    )
    by_key = {(group.learning_rate, group.weight_decay): group.names for group in groups}
    assert set(by_key) == {(1e-3, 0.2), (1e-3, 0.0), (5e-4, 0.0)}
    assert {part_of(name) for name in by_key[1e-3, 0.2]} == {"cross-attention"}
    assert {part_of(name) for name in by_key[5e-4, 0.0]} == HEAD_PARTS
    first = {
        name.removeprefix("layers.0.cross_attention.")
        for name in by_key[1e-3, 0.2]
        if name.startswith("layers.0.")
    }
    assert first == {
        "attention.query.weight",
        "attention.key_value.weight",
        "attention.out.weight",
        "feed_forward.norm.weight",
        "feed_forward.up.weight",
        "feed_forward.down.weight",
    }


def test_towers_that_train_decay_in_their_matrices():
    settings = OptimiserSettings(train_vision=True, train_decoder=True)
    model = small_model()
    parameters = dict(model.named_parameters())
    decaying = [
        name
        for group in parameter_groups(model, Stage.JOINT, settings)
        if group.weight_decay
        for name in group.names
    ]
    blocks = [name for name in decaying if part_of(name) in ("block", "vision")]
    assert {part_of(name) for name in blocks} == {"block", "vision"}
    assert all(parameters[name].ndim > 1 for name in blocks)
    assert not any("embedding" in name for name in blocks)


def test_in_the_exit_stage_the_heads_learn_at_the_whole_rate():
    (group,) = parameter_groups(
        small_model(), Stage.EXIT, OptimiserSettings(learning_rate=3e-5, head_scale=0.25)
    )
    assert (group.learning_rate, group.weight_decay) == (3e-5, 0.0)


# Steps


def test_weight_decay_shrinks_what_it_applies_to():
    model = small_model()
    optimiser = Optimiser(
        model, Stage.JOINT, OptimiserSettings(learning_rate=0.1, weight_decay=0.5), CONSTANT
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in optimiser.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    after = dict(model.named_parameters())
    query = "layers.2.cross_attention.attention.query.weight"
    torch.testing.assert_close(after[query], before[query] * (1 - 0.1 * 0.5))
    assert torch.equal(after["resampler.latents"], before["resampler.latents"])


def test_the_norm_is_told_before_clipping_and_large_gradients_are_clipped(monkeypatch):
    model = small_model()
    optimiser = Optimiser(model, Stage.EXIT, OptimiserSettings(clip_norm=2.0), CONSTANT)
    seen = []
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self: seen.extend(p.grad.clone() for g in self.param_groups for p in g["params"]),
    )
    for parameter in optimiser.parameters():
        parameter.grad = torch.ones_like(parameter)
    count = sum(parameter.numel() for parameter in optimiser.parameters())
    assert optimiser.step() == pytest.approx(math.sqrt(count), rel=1e-5)
    assert float(torch.cat([gradient.flatten() for gradient in seen]).norm()) == pytest.approx(2.0, rel=1e-4)


def test_a_step_forgets_its_gradients():
    model = small_model()
    optimiser = Optimiser(model, Stage.JOINT, OptimiserSettings(), CONSTANT)
    loss_of(model).backward()
    optimiser.step()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_steps_lower_the_loss():
    model = small_model()
    optimiser = Optimiser(model, Stage.JOINT, OptimiserSettings(learning_rate=3e-3), Schedule(warmup_steps=2))
    losses = []
    for _ in range(24):
        loss = loss_of(model)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[1] == losses[0]  # warm-up begins at 0
    assert losses[-1] < 0.8 * losses[0]


def test_a_resumed_run_ends_where_an_uninterrupted_one_does():
    def run(optimiser, model, seeds):
        for seed in seeds:
            loss_of(model, seed).backward()
            optimiser.step()

    settings, schedule = (
        OptimiserSettings(learning_rate=1e-3),
        Schedule("cosine", warmup_steps=2, total_steps=6),
    )
    model = small_model()
    whole = Optimiser(model, Stage.JOINT, settings, schedule)
    run(whole, model, range(2))
    resumed_model, state = copy.deepcopy(model), copy.deepcopy(whole.state_dict())
    run(whole, model, range(2, 4))
    resumed = Optimiser(resumed_model, Stage.JOINT, settings, schedule)
    resumed.load_state_dict(state)
    assert resumed.steps == 2
    run(resumed, resumed_model, range(2, 4))
    assert resumed.rates == whole.rates
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(resumed_model.named_parameters())[name]), name


# Schedules


@given(warmup=st.integers(0, 50), rest=st.integers(1, 200), kind=st.sampled_from(("constant", "cosine")))
def test_a_schedule_rises_to_one_and_never_leaves_its_range(warmup, rest, kind):
    schedule = Schedule(kind, warmup_steps=warmup, total_steps=warmup + rest)
    scales = [schedule.scale(step) for step in range(warmup + rest + 5)]
    assert all(0 <= scale <= 1 for scale in scales)
    assert scales[:warmup] == sorted(scales[:warmup])
    assert scales[warmup] == 1
    assert scales[warmup:] == sorted(scales[warmup:], reverse=True)
    assert scales[-1] == (1 if kind == "constant" else pytest.approx(0, abs=1e-12))
    if warmup:
        assert scales[0] == 0


def test_halfway_down_a_cosine_is_half():
    assert Schedule("cosine", warmup_steps=10, total_steps=30).scale(20) == pytest.approx(0.5)


def test_the_rates_of_the_groups_follow_the_schedule():
    model = small_model()
    optimiser = Optimiser(model, Stage.JOINT, OptimiserSettings(learning_rate=1e-3), Schedule(warmup_steps=4))
    for step in range(6):
        share = min(step / 4, 1)
        assert sorted(optimiser.rates) == pytest.approx(sorted((1e-3 * share, 1e-3 * share, 2.5e-4 * share)))
        loss_of(model).backward()
        optimiser.step()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: OptimiserSettings(learning_rate=0.0), "learning_rate is 0.0"),
        (lambda: OptimiserSettings(clip_norm=-1.0), "clip_norm is -1.0"),
        (lambda: OptimiserSettings(weight_decay=float("nan")), "weight_decay is nan"),
        (lambda: OptimiserSettings(betas=(0.9, 1.0)), "betas are"),
        (lambda: Schedule("linear"), "give one of constant, cosine"),
        (lambda: Schedule(warmup_steps=-1), "warmup_steps is -1"),
        (lambda: Schedule("cosine", warmup_steps=10, total_steps=10), "total_steps is 10"),
    ],
)
def test_impossible_settings_are_refused_by_name(wrong, message):
    with pytest.raises(UserError, match=message):
        wrong()
