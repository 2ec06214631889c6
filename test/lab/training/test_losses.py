"""Tests of the loss: it is that of the paper, and the draws of exits are uniform."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_model import INSTRUCTION, SMALL, small_model, small_tokenizer, with_decoder

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.training.losses import (
    ActionTargets,
    ExitDraws,
    LossWeights,
    action_loss,
    draw_exits,
    draw_per_segment,
    draw_per_step,
    exit_features,
    multi_exit_loss,
    segments,
)
from deer_vla_ros.model.head import HeadOutput, HeadState, pool

BATCH, WINDOW, EXITS = 2, 4, 3
STATE = HeadState(torch.zeros(1), torch.zeros(1))


def output(pose: torch.Tensor, logit: torch.Tensor) -> HeadOutput:
    return HeadOutput(pose, logit, STATE, pose)


def some_targets(seed: int = 1) -> ActionTargets:
    random = torch.Generator().manual_seed(seed)
    return ActionTargets.from_actions(torch.rand(BATCH, WINDOW, 7, generator=random) * 2 - 1)


def some_features(rows: int = EXITS, seed: int = 2) -> torch.Tensor:
    return torch.randn(
        rows, BATCH, WINDOW, SMALL.decoder.width, generator=torch.Generator().manual_seed(seed)
    )


def of_one_exit(exit_index: int) -> ExitDraws:
    drawn = torch.full((BATCH, WINDOW), exit_index)
    return ExitDraws(drawn, drawn)


# One head


def test_the_pose_error_is_quadratic_up_to_delta_and_linear_beyond():
    pose = torch.zeros(1, 1, 6)
    pose[..., 0], pose[..., 1] = 0.5, 2.0
    targets = ActionTargets(torch.zeros(1, 1, 6), torch.zeros(1, 1))
    loss = action_loss(output(pose, torch.zeros(1, 1, 1)), targets, LossWeights())
    assert float(loss.pose) == pytest.approx((0.5 * 0.5**2 + (2.0 - 0.5)) / 6)


def test_the_gripper_error_is_the_cross_entropy_of_its_probability():
    logits = torch.tensor([[[2.0], [-1.0]]])
    loss = action_loss(
        output(torch.zeros(1, 2, 6), logits),
        ActionTargets(torch.zeros(1, 2, 6), torch.tensor([[1.0, 0.0]])),
        LossWeights(),
    )
    probabilities = logits.sigmoid()[0, :, 0]
    assert float(loss.gripper) == pytest.approx(
        float(-(probabilities[0].log() + (1 - probabilities[1]).log()) / 2)
    )


def test_the_total_weighs_pose_and_gripper():
    random = torch.Generator().manual_seed(0)
    given_output = output(torch.rand(2, 3, 6, generator=random), torch.randn(2, 3, 1, generator=random))
    targets = ActionTargets(torch.zeros(2, 3, 6), torch.ones(2, 3))
    loss = action_loss(given_output, targets, LossWeights(pose=2.0, gripper=0.05))
    assert float(loss.total) == pytest.approx(float(2.0 * loss.pose + 0.05 * loss.gripper))


def test_a_dataset_s_gripper_sign_is_open_or_closed():
    targets = ActionTargets.from_actions(torch.tensor([[[0.0] * 6 + [1.0], [0.0] * 6 + [-1.0]]]))
    assert targets.gripper.tolist() == [[1.0, 0.0]]
    assert targets.pose.shape == (1, 2, 6)


def test_a_step_that_only_pads_its_window_changes_nothing_and_gets_no_gradient():
    random = torch.Generator().manual_seed(0)
    pose, logit = (torch.randn(1, 3, size, generator=random).requires_grad_() for size in (6, 1))
    valid = torch.tensor([[True, True, False]])
    targets = ActionTargets(torch.zeros(1, 3, 6), torch.ones(1, 3), valid)
    loss = action_loss(output(pose, logit), targets, LossWeights())
    whole = action_loss(
        output(pose[:, :2], logit[:, :2]),
        ActionTargets(targets.pose[:, :2], targets.gripper[:, :2]),
        LossWeights(),
    )
    torch.testing.assert_close(
        (loss.pose, loss.gripper, loss.total), (whole.pose, whole.gripper, whole.total)
    )
    loss.total.backward()
    assert pose.grad[0, 2].abs().sum() == 0 and logit.grad[0, 2] == 0
    assert pose.grad[0, 1].abs().sum() > 0 and logit.grad[0, 1] != 0


def test_windows_of_padding_alone_have_no_loss():
    targets = ActionTargets(torch.ones(1, 2, 6), torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool))
    assert (
        float(action_loss(output(torch.zeros(1, 2, 6), torch.zeros(1, 2, 1)), targets, LossWeights()).total)
        == 0
    )


@pytest.mark.parametrize(
    "wrong", [{"huber_delta": 0.0}, {"huber_delta": float("nan")}, {"pose": -1.0}, {"gripper": float("inf")}]
)
def test_impossible_weights_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        LossWeights(**wrong)


# Draws

sizes = {
    "exits": st.integers(1, 8),
    "batch": st.integers(1, 5),
    "window": st.integers(1, 16),
    "seed": st.integers(0, 2**31),
}


@given(**sizes)
def test_every_draw_is_an_exit_and_repeats_with_its_seed(exits, batch, window, seed):
    for draw in (draw_per_step, draw_per_segment):
        drawn = draw(exits, batch, window, torch.Generator().manual_seed(seed))
        assert drawn.shape == (batch, window) and drawn.dtype == torch.int64
        assert 0 <= int(drawn.min()) and int(drawn.max()) < exits
        assert torch.equal(drawn, draw(exits, batch, window, torch.Generator().manual_seed(seed)))


@given(**sizes)
def test_a_window_has_at_most_two_segments_split_at_one_step_for_the_whole_batch(exits, batch, window, seed):
    drawn = draw_per_segment(exits, batch, window, torch.Generator().manual_seed(seed))
    changes = drawn[:, 1:] != drawn[:, :-1]
    assert (changes.sum(dim=1) <= 1).all()
    assert len(set(changes.nonzero()[:, 1].tolist())) <= 1


def test_every_split_and_every_pair_of_exits_occurs():
    random = torch.Generator().manual_seed(0)
    splits, pairs = set(), set()
    for _ in range(400):
        drawn = draw_per_segment(3, 8, 4, random)
        pairs |= {(row[0], row[-1]) for row in drawn.tolist()}
        changes = (drawn[:, 1:] != drawn[:, :-1]).nonzero()[:, 1].tolist()
        splits.add(changes[0] + 1 if changes else 4)
    assert splits == {1, 2, 3, 4}
    assert pairs == {(first, second) for first in range(3) for second in range(3)}


def test_every_step_draws_on_its_own_and_every_exit_as_often():
    drawn = draw_per_step(4, 100, 100, torch.Generator().manual_seed(0))
    assert torch.bincount(drawn.flatten()).tolist() == pytest.approx([2500] * 4, abs=150)
    assert float((drawn[:, 1:] == drawn[:, :-1]).float().mean()) == pytest.approx(0.25, abs=0.02)


def test_the_split_counts_the_steps_of_the_first_segment():
    drawn = torch.tensor([[2, 0], [1, 1]])
    assert segments(drawn, 1, 3).tolist() == [[2, 0, 0], [1, 1, 1]]
    assert segments(drawn, 3, 3).tolist() == [[2, 2, 2], [1, 1, 1]]


# All heads


def test_each_head_reads_the_exit_that_it_belongs_to():
    model, features, targets, weights = small_model(), some_features(), some_targets(), LossWeights()
    loss = multi_exit_loss(model, features, targets, of_one_exit(1), weights)

    def alone(head, feature):
        return action_loss(head(feature, head.initial_state(BATCH)), targets, weights).total

    parts = {name: float(part.total) for name, part in loss.parts()}
    assert parts == pytest.approx(
        {
            "auxiliary_1": float(alone(model.auxiliary_heads["1"], features[0])),
            "auxiliary_3": float(alone(model.auxiliary_heads["3"], features[1])),
            "last": float(alone(model.last_head, features[2])),
            "shared_1": float(alone(model.shared_head, features[1])),
            "shared_2": float(alone(model.shared_head, features[1])),
        }
    )
    assert float(loss.total) == pytest.approx(sum(parts.values()))


def test_the_shared_head_reads_at_every_step_the_exit_drawn_for_it():
    model, features, targets = small_model(), some_features(), some_targets()
    draws = ExitDraws(torch.tensor([[0, 2, 1, 0], [2, 2, 0, 1]]), torch.tensor([[1, 1, 2, 2], [0, 0, 1, 1]]))
    loss = multi_exit_loss(model, features, targets, draws, LossWeights())
    for part, drawn in zip(loss.shared, (draws.per_step, draws.per_segment), strict=True):
        read = torch.stack(
            [torch.stack([features[drawn[b, t], b, t] for t in range(WINDOW)]) for b in range(BATCH)]
        )
        expected = action_loss(
            model.shared_head(read, model.shared_head.initial_state(BATCH)), targets, LossWeights()
        )
        assert float(part.total) == pytest.approx(float(expected.total))


def test_without_random_exits_the_shared_head_sees_the_last_exit_only():
    model, targets = small_model(), some_targets()
    features = some_features().requires_grad_()
    loss = multi_exit_loss(model, features, targets, of_one_exit(0), LossWeights(), random_exits=False)
    expected = multi_exit_loss(model, features, targets, of_one_exit(2), LossWeights())
    assert [part.total.item() for part in loss.shared] == [part.total.item() for part in expected.shared]
    sum(part.total for part in loss.shared).backward()
    assert features.grad[:2].abs().sum() == 0 and features.grad[2].abs().sum() > 0


def test_without_auxiliary_heads_only_the_shared_head_trains():
    model, targets = small_model().requires_grad_(True), some_targets()
    loss = multi_exit_loss(
        model, some_features(), targets, of_one_exit(1), LossWeights(), auxiliary_heads=False
    )
    assert [name for name, _ in loss.parts()] == ["shared_1", "shared_2"]
    loss.total.backward()
    moved = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == {"shared_head"}


# Features


def features_of(model, images, instructions=(INSTRUCTION, "lift the blue block to the left")):
    tokenizer = small_tokenizer()
    return exit_features(model, images, *tokenizer.encode(instructions), tokenizer.image_token)


def test_the_features_are_those_that_a_single_step_reads():
    model, tokenizer = small_model(), small_tokenizer()
    images = torch.randn(BATCH, WINDOW, 2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    features = features_of(model, images)
    assert features.shape == (EXITS, BATCH, WINDOW, SMALL.decoder.width)
    ids, mask = tokenizer.encode([INSTRUCTION, "lift the blue block to the left"])
    for sample in range(BATCH):
        text = model.encode_text(ids[sample : sample + 1], mask[sample : sample + 1], tokenizer.image_token)
        for step in range(WINDOW):
            hidden = list(model.hidden_states(model.encode_images(images[sample, step][None]), text))
            read = torch.stack([pool(hidden[layer])[0] for layer in SMALL.exits])
            torch.testing.assert_close(features[:, sample, step], read)


def test_a_final_norm_adds_the_last_head_s_own_feature():
    config = with_decoder(SMALL, final_norm=True)
    model = small_model(config)
    images = torch.randn(BATCH, WINDOW, 2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    features = features_of(model, images)
    assert features.shape[0] == EXITS + 1
    targets = some_targets()
    loss = multi_exit_loss(model, features, targets, of_one_exit(EXITS - 1), LossWeights())
    head = model.last_head
    expected = action_loss(head(features[EXITS], head.initial_state(BATCH)), targets, LossWeights())
    assert float(loss.last.total) == pytest.approx(float(expected.total))
    shared = action_loss(
        model.shared_head(features[EXITS - 1], model.shared_head.initial_state(BATCH)), targets, LossWeights()
    )
    assert float(loss.shared[0].total) == pytest.approx(float(shared.total))


def test_dropout_in_training_makes_the_passes_differ():
    model = small_model(
        dataclasses.replace(SMALL, head=dataclasses.replace(SMALL.head, mlp_dropout=0.5))
    ).train()
    torch.manual_seed(0)
    loss = multi_exit_loss(model, some_features(), some_targets(), of_one_exit(1), LossWeights())
    assert float(loss.shared[0].total) != float(loss.shared[1].total)


def test_a_batch_s_draws_fill_both_passes():
    draws = draw_exits(EXITS, BATCH, WINDOW, torch.Generator().manual_seed(0))
    assert draws.per_step.shape == draws.per_segment.shape == (BATCH, WINDOW)
