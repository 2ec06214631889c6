"""Does one control step do what it says, and remember exactly what it has to?"""

import dataclasses
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import INSTRUCTION, SMALL, observations, small_model, small_tokenizer

from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.inference.preprocess import ImagePreprocessor
from deer_vla_ros.inference.types import PolicyStep, StopReason
from deer_vla_ros.model.head import HeadState, pool
from deer_vla_ros.model.network import MultiExitVLA

NEVER = ExitRule(SMALL.exits, (-1.0, -1.0, -1.0))
ALWAYS = ExitRule(SMALL.exits, (1e8, 1e8, 1e8))


def new_policy(rule: ExitRule = NEVER, model: MultiExitVLA | None = None) -> DeerPolicy:
    policy = DeerPolicy(model or small_model(), small_tokenizer(), rule)
    policy.reset(INSTRUCTION)
    return policy


def run(policy: DeerPolicy, count: int, seed: int = 0) -> list[PolicyStep]:
    return [policy.step(observation) for observation in observations(count, seed)]


def mixed_rule(**changes) -> ExitRule:
    """Thresholds in the middle of the measured deltas, so that an episode takes every exit."""
    deltas = np.array([step.deltas for step in run(new_policy(), 12)])
    return ExitRule(SMALL.exits, (*np.quantile(deltas[:, :-1], 0.4, axis=0).tolist(), 1e8), **changes)


def outcome(step: PolicyStep) -> tuple:
    """What a step decided, to the bit, without the time it took."""
    return (
        step.action.pose.tobytes(),
        step.action.gripper_probability,
        step.exit_layer,
        step.stop,
        np.array(step.deltas).tobytes(),
    )


def same_state(a: HeadState, b: HeadState) -> bool:
    return torch.equal(a.hidden, b.hidden) and torch.equal(a.cell, b.cell)


def copy_of(state: HeadState) -> HeadState:
    return HeadState(state.hidden.clone(), state.cell.clone())


# The exit


def test_a_step_stops_at_the_first_exit_whose_delta_is_not_above_its_threshold():
    rule = mixed_rule()
    steps = run(new_policy(rule), 12)
    for step in steps:
        agreed = [
            i
            for i, (delta, threshold) in enumerate(zip(step.deltas[:-1], rule.thresholds))
            if delta <= threshold
        ]
        assert step.exit_index == (agreed[0] if agreed else 2)
        assert step.stop == (StopReason.AGREED if agreed else StopReason.DEEPEST)
        assert np.isnan(step.deltas).tolist() == [i > step.exit_index for i in range(3)]
        assert step.head_probes == step.exit_index + 2
    assert {step.exit_layer for step in steps} == {1, 3, 5}, "the test saw every exit"


def test_the_first_exit_is_compared_with_the_layer_just_before_it_and_the_others_with_the_exit_before():
    model = small_model()
    step = run(new_policy(NEVER, model), 1)[0]
    preprocess, tokenizer = ImagePreprocessor(16, model.device, model.dtype), small_tokenizer()
    observation = observations(1)[0]
    text = model.encode_text(*tokenizer.encode([INSTRUCTION]), tokenizer.image_token)
    hidden = list(
        model.hidden_states(model.encode_images(preprocess((observation.static, observation.gripper))), text)
    )
    poses = [
        model.shared_head(pool(state)[:, None], model.shared_head.initial_state()).pose[0, 0]
        for state in hidden
    ]
    expected = [NEVER.measure(poses[i], poses[before]) for i, before in ((1, 0), (3, 1), (5, 3))]
    assert step.deltas == tuple(expected)


@pytest.mark.parametrize(
    ("rule", "layers"),
    [(ALWAYS, 2), (NEVER, 6), (ExitRule((1, 3), (-1.0, -1.0)), 4), (ExitRule((3,), (1.0,)), 4)],
)
def test_a_step_runs_no_layer_deeper_than_its_exit(rule, layers):
    model = small_model()
    ran = []
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    step = new_policy(rule, model).step(observations(1)[0])
    assert step.layers_run == layers
    assert ran == list(range(layers))


@settings(deadline=None, max_examples=25)
@given(
    thresholds=st.tuples(*[st.floats(0, 0.5)] * 2),
    more=st.tuples(*[st.floats(0, 0.5)] * 2),
    seed=st.integers(0, 99),
)
def test_larger_thresholds_never_make_a_step_deeper(thresholds, more, seed):
    larger = tuple(threshold + extra for threshold, extra in zip(thresholds, more))
    policy = new_policy()
    depths = []
    for chosen in (thresholds, larger):
        policy.reset(INSTRUCTION)
        policy.rule = ExitRule(SMALL.exits, (*chosen, 1e8))
        depths.append(policy.step(observations(1, seed)[0]).layers_run)
    assert depths[1] <= depths[0]


def test_nan_never_agrees_so_the_step_goes_to_the_deepest_exit():
    model = small_model()
    model.layers[0].register_forward_hook(lambda module, args, output: output * float("nan"))
    step = new_policy(ALWAYS, model).step(observations(1)[0])
    assert (step.exit_layer, step.stop) == (5, StopReason.DEEPEST)
    assert not step.action.is_finite


def test_between_two_probing_steps_the_depth_stays_and_the_head_is_read_once():
    steps = run(new_policy(mixed_rule(steps_per_stage=3)), 12)
    for i, step in enumerate(steps):
        if i % 3:
            assert (step.stop, step.head_probes, step.exit_layer) == (
                StopReason.STAGE,
                1,
                steps[i - 1].exit_layer,
            )
            assert np.isnan(step.deltas).all()
        else:
            assert step.stop != StopReason.STAGE
    assert len({step.exit_layer for step in steps}) > 1, "the test saw more than one depth"


def test_with_ensemble_the_action_is_the_mean_of_two_exits_and_nothing_else_changes():
    plain, mean = new_policy(mixed_rule()), new_policy(mixed_rule(ensemble=True))
    fixed = {layer: new_policy(ExitRule((layer,), (0.0,))) for layer in SMALL.exits}
    chosen = set()
    for observation in observations(8):
        before = copy_of(plain.state)
        one, other = plain.step(observation), mean.step(observation)
        assert outcome(one)[2:] == outcome(other)[2:]
        assert same_state(plain.state, mean.state)
        alone = []
        for layer in SMALL.exits[max(0, one.exit_index - 1) : one.exit_index + 1]:
            fixed[layer]._state = before
            alone.append(fixed[layer].step(observation).action)
        pose = np.mean([action.pose for action in alone], axis=0)
        probability = np.mean([action.gripper_probability for action in alone])
        np.testing.assert_allclose(other.action.pose, pose, rtol=0, atol=1e-6)
        assert other.action.gripper_probability == pytest.approx(probability, abs=1e-6)
        chosen.add(one.exit_layer)
    assert chosen == {1, 3, 5}, "the test saw every exit"


# What is remembered


def test_the_state_kept_from_the_probe_equals_recomputing_the_head_at_the_chosen_exit():
    model, tokenizer = small_model(), small_tokenizer()
    policy = new_policy(mixed_rule(), model)
    preprocess = ImagePreprocessor(SMALL.vision.image_size, model.device, model.dtype)
    text = model.encode_text(*tokenizer.encode([INSTRUCTION]), tokenizer.image_token)
    state, chosen = model.shared_head.initial_state(), set()
    for observation in observations(12):
        step = policy.step(observation)
        visual = model.encode_images(preprocess((observation.static, observation.gripper)))
        hidden = list(model.hidden_states(visual, text))[step.exit_layer]
        recomputed = model.shared_head(pool(hidden)[:, None], state)
        assert same_state(policy.state, recomputed.state)
        assert np.array_equal(step.action.pose, recomputed.pose[0, 0].numpy())
        state = recomputed.state
        chosen.add(step.exit_layer)
    assert chosen == {1, 3, 5}, "the test saw every exit"


def test_the_state_changes_what_the_same_observation_leads_to():
    policy = new_policy()
    observation = observations(1)[0]
    assert outcome(policy.step(observation)) != outcome(policy.step(observation))


def test_reset_clears_the_memory():
    rule = mixed_rule(steps_per_stage=3)
    policy = new_policy(rule)
    first = [outcome(step) for step in run(policy, 4)]
    policy.reset(INSTRUCTION)
    assert same_state(policy.state, small_model().shared_head.initial_state())
    assert [outcome(step) for step in run(policy, 4)] == first


def test_reset_takes_the_new_instruction():
    policy = new_policy()
    first = run(policy, 2)
    policy.reset("lift the blue block to the left")
    second = run(policy, 2)
    assert (first[0].tokens, second[0].tokens, policy.tokens) == (7, 10, 10)
    assert outcome(first[0]) != outcome(second[0])


def test_a_new_rule_keeps_the_memory():
    changing, constant = new_policy(NEVER), new_policy(NEVER)
    run(changing, 3), run(constant, 3)
    state = changing.state
    changing.rule = ALWAYS
    assert changing.state is state
    changing.rule = NEVER
    assert outcome(run(changing, 1, seed=9)[0]) == outcome(run(constant, 1, seed=9)[0])


def test_a_new_rule_takes_effect_on_the_next_step():
    policy = new_policy(NEVER)
    before = run(policy, 1)[0]
    policy.rule = ALWAYS
    after = run(policy, 1)[0]
    assert (before.exit_layer, after.exit_layer) == (5, 1)
    assert after.thresholds == ALWAYS.thresholds


def test_a_rule_with_a_layer_that_is_no_exit_is_refused_and_the_old_one_stays():
    policy = new_policy(NEVER)
    with pytest.raises(
        UserError, match=r"layers \[2, 7\] are no exits of this network: choose from \(1, 3, 5\)"
    ):
        policy.rule = ExitRule((1, 2, 7), (0.0, 0.0, 0.0))
    assert policy.rule is NEVER
    assert run(policy, 1)[0].exit_layer == 5


def test_a_stage_that_meets_a_shallower_rule_keeps_within_it():
    policy = new_policy(dataclasses.replace(NEVER, steps_per_stage=3))
    assert run(policy, 1)[0].exit_layer == 5
    policy.rule = ExitRule((1, 3), (-1.0, -1.0), steps_per_stage=3)
    assert run(policy, 1)[0].exit_layer == 3


def test_a_step_before_the_first_reset_says_what_to_do():
    policy = DeerPolicy(small_model(), small_tokenizer(), NEVER)
    assert policy.tokens == 0
    with pytest.raises(UserError, match=r"call reset\(instruction\) before step"):
        policy.step(observations(1)[0])


class BrokenStep(Exception):
    pass


@pytest.mark.parametrize("part", ["vision", "layers.1", "layers.4", "shared_head"])
def test_a_step_that_raises_in_the_middle_leaves_the_memory_as_it_was(part):
    model = small_model()
    rule = ExitRule(SMALL.exits, (-1.0,) * 3, steps_per_stage=2)
    policy, undisturbed = new_policy(rule, model), new_policy(rule)
    run(policy, 2), run(undisturbed, 2)
    state, before = policy.state, copy_of(policy.state)

    def fail(*_):
        raise BrokenStep

    hook = model.get_submodule(part).register_forward_hook(fail)
    with pytest.raises(BrokenStep):
        policy.step(observations(1, seed=5)[0])
    hook.remove()
    assert policy.state is state and same_state(state, before)
    # The next steps are what they would have been, the probing ones among them included.
    assert [outcome(step) for step in run(policy, 3)] == [outcome(step) for step in run(undisturbed, 3)]


def test_a_non_finite_action_leaves_the_memory_as_it_was():
    model = small_model()
    rule = ExitRule(SMALL.exits, (-1.0,) * 3, steps_per_stage=2)
    policy, undisturbed = new_policy(rule, model), new_policy(rule)
    run(policy, 2), run(undisturbed, 2)
    state, before = policy.state, copy_of(policy.state)
    hook = model.layers[5].register_forward_hook(lambda module, args, output: output * float("inf"))
    assert not policy.step(observations(1, seed=5)[0]).action.is_finite
    hook.remove()
    assert policy.state is state and same_state(state, before)
    assert [outcome(step) for step in run(policy, 3)] == [outcome(step) for step in run(undisturbed, 3)]


def test_an_earlier_steps_result_is_not_changed_by_a_later_one():
    policy = new_policy()
    first = policy.step(observations(1)[0])
    before = outcome(first)
    run(policy, 3, seed=4)
    assert outcome(first) == before


# What is computed, and how often


def test_both_cameras_pass_the_vision_tower_in_one_batch():
    model = small_model()
    batches = []
    model.vision.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    run(new_policy(NEVER, model), 3)
    assert batches == [2, 2, 2]


def test_the_instruction_is_tokenised_and_embedded_once_per_episode():
    model, tokenizer = small_model(), small_tokenizer()
    embedded, encoded = [], []
    model.token_embedding.register_forward_hook(lambda *_: embedded.append(1))
    encode = tokenizer.encode
    tokenizer.encode = lambda texts: encoded.append(texts) or encode(texts)
    policy = DeerPolicy(model, tokenizer, NEVER)
    for instruction in (INSTRUCTION, "lift the blue block"):
        policy.reset(instruction)
        run(policy, 4)
    assert encoded == [[INSTRUCTION], ["lift the blue block"]]
    assert len(embedded) == 2


def test_the_same_inputs_give_the_same_bits_twice():
    rule = mixed_rule()
    first, second = ([outcome(step) for step in run(new_policy(rule), 10)] for _ in range(2))
    assert first == second


def test_the_gripper_opens_above_one_half_only():
    action = run(new_policy(), 1)[0].action
    grippers = [
        dataclasses.replace(action, gripper_probability=p).gripper for p in (0.0, 0.5, 0.5000001, 1.0)
    ]
    assert grippers == [-1, -1, 1, 1]
    assert action.pose.shape == (6,) and action.pose.dtype == np.float32
    assert np.abs(action.pose).max() <= 1 and 0 <= action.gripper_probability <= 1


# Where the time goes


def test_the_stages_are_not_negative_and_sum_to_about_the_time_of_the_step():
    policy = new_policy()
    shares = []
    for observation in observations(30):
        start = time.perf_counter()
        times = policy.step(observation).times
        wall = (time.perf_counter() - start) * 1e3
        assert min(times.preprocess, times.vision, times.language, times.head) >= 0
        assert times.total == pytest.approx(times.preprocess + times.vision + times.language + times.head)
        assert times.total <= wall
        shares.append(times.total / wall)
    assert np.median(shares) > 0.8


@pytest.mark.parametrize(
    ("part", "stage", "calls"),
    [
        ("vision", "vision", 1),
        ("resampler", "vision", 1),
        ("layers.2", "language", 1),
        ("shared_head", "head", 4),
    ],
)
def test_a_slow_part_is_booked_on_its_own_stage(part, stage, calls):
    model = small_model()
    policy = new_policy(NEVER, model)
    usual = np.median([dataclasses.astuple(step.times) for step in run(policy, 10)], axis=0)

    def dawdle(*_):
        end = time.perf_counter() + 0.1
        while time.perf_counter() < end:
            pass

    model.get_submodule(part).register_forward_hook(dawdle)
    slow = np.median([dataclasses.astuple(step.times) for step in run(policy, 3)], axis=0)
    extra = dict(zip(("preprocess", "vision", "language", "head"), slow - usual))
    assert extra.pop(stage) > 0.9 * 100 * calls
    assert max(extra.values()) < 50
