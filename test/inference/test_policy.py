"""Tests of the policy: its exits, its memory, its times, and its decisions for several lanes."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import INSTRUCTION, SMALL, observations, small_model, small_tokenizer

from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.exit_rule import DELTAS, ExitRule
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.inference.preprocess import ImagePreprocessor
from deer_vla_ros.inference.types import Observation, PolicyStep, StopReason
from deer_vla_ros.model.checkpoint import EMBEDDED, load
from deer_vla_ros.model.config import GroundingConfig, ModelConfig, ProprioceptionConfig
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
    expected = [DELTAS[NEVER.delta](poses[i], poses[before]).item() for i, before in ((1, 0), (3, 1), (5, 3))]
    assert step.deltas == pytest.approx(expected, abs=1e-6)  # probes of one batch are rounded differently


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


@settings(max_examples=25)
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
            lane = fixed[layer]._lanes[0]
            lane.state, lane.prepared = before, fixed[layer]._model.shared_head.prepare(before)
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
        for kept, again in zip(policy.state, recomputed.state):
            torch.testing.assert_close(kept, again, rtol=0, atol=5e-6)
        np.testing.assert_allclose(step.action.pose, recomputed.pose[0, 0].numpy(), rtol=0, atol=5e-6)
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
    tokens = policy.reset("lift the blue block to the left")
    second = run(policy, 2)
    assert (first[0].tokens, second[0].tokens, tokens) == (7, 10, 10)
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
    with pytest.raises(UserError, match=r"call reset\(instruction\) before step"):
        policy.step(observations(1)[0])


class BrokenStep(Exception):
    pass


@pytest.mark.parametrize("part", ["vision", "layers.1", "layers.4", "shared_head.pose"])
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
        ("shared_head.pose", "head", 3),
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


# Several lanes


INSTRUCTIONS = ("push", "lift the red block", "push the blue block to the left", "lift the block")
"""Of 4, 7, 10 and 6 tokens."""


def with_lanes(model: MultiExitVLA, lanes: int, rule: ExitRule = NEVER) -> DeerPolicy:
    """A policy whose first lanes have the instructions above."""
    policy = DeerPolicy(model, small_tokenizer(), rule, lanes)
    for lane in range(lanes):
        policy.reset(INSTRUCTIONS[lane], lane)
    return policy


def mixed_rules(model: MultiExitVLA, **changes) -> list[ExitRule]:
    """A rule for each lane, under which an episode takes every exit."""
    policy = new_policy(dataclasses.replace(NEVER, delta=changes.get("delta", "l2")), model)
    rules = []
    for lane, instruction in enumerate(INSTRUCTIONS):
        policy.reset(instruction)
        deltas = np.array([policy.step(observation).deltas for observation in episode(lane)])
        rules.append(
            ExitRule(SMALL.exits, (*np.quantile(deltas[:, :-1], 0.4, axis=0).tolist(), 1e8), **changes)
        )
    return rules


def episode(lane: int, steps: int = 12) -> list[Observation]:
    random = np.random.default_rng(lane)
    tcp = np.concatenate([random.uniform(0, 0.4, (steps, 3)), np.tile([1.0, 0, 0, 0], (steps, 1))], 1)
    return [
        dataclasses.replace(observation, tcp=pose)
        for observation, pose in zip(observations(steps, lane), tcp)
    ]


def exact_model(config: ModelConfig = SMALL) -> MultiExitVLA:
    """In float64, where the noise of another batch size is below any mistake."""
    return small_model(config).double()


def assert_same(one: PolicyStep, other: PolicyStep, noise: float = 1e-7) -> None:
    assert (one.exit_layer, one.stop, one.layers_run, one.head_probes, one.tokens) == (
        other.exit_layer,
        other.stop,
        other.layers_run,
        other.head_probes,
        other.tokens,
    )
    assert one.deltas == pytest.approx(other.deltas, abs=noise, nan_ok=True)
    assert one.action.pose == pytest.approx(other.action.pose, abs=noise)
    assert one.action.gripper_probability == pytest.approx(other.action.gripper_probability, abs=noise)


@pytest.mark.parametrize(
    "changes",
    [{}, {"steps_per_stage": 3}, {"ensemble": True}, {"delta": "feature"}],
    ids=["plain", "stages", "ensemble", "feature"],
)
def test_lanes_of_different_instructions_rules_and_depths_decide_as_alone(changes):
    model, tokenizer = exact_model(), small_tokenizer()
    rules = mixed_rules(model, **changes)
    together = DeerPolicy(model, tokenizer, NEVER, lanes=4)
    alone = [DeerPolicy(model, tokenizer, rule) for rule in rules]
    for lane, instruction in enumerate(INSTRUCTIONS):
        assert together.reset(instruction, lane) == alone[lane].reset(instruction)
        together.set_rule(rules[lane], lane)
    taken = set()
    for seen in zip(*(episode(lane) for lane in range(4))):
        steps = together.step_lanes(dict(enumerate(seen)))
        for lane, observation in enumerate(seen):
            assert_same(steps[lane], alone[lane].step(observation))
        taken.add(tuple(step.exit_layer for step in steps.values()))
    assert {layer for layers in taken for layer in layers} == set(SMALL.exits), "the test saw every exit"
    assert any(len(set(layers)) == 3 for layers in taken), "lanes left the batch at different exits"


def test_a_network_with_grounding_and_proprioception_sees_no_padding_either():
    config = dataclasses.replace(
        SMALL,
        grounding=GroundingConfig(channels=8, queries=2),
        proprioception=ProprioceptionConfig((0.2, 0.0, 0.2), 0.2, 0.5),
    )
    model = exact_model(config)
    together, alone = with_lanes(model, 4), new_policy(NEVER, model)
    steps = together.step_lanes({lane: episode(lane)[0] for lane in range(4)})
    for lane, instruction in enumerate(INSTRUCTIONS):
        alone.reset(instruction)
        assert_same(steps[lane], alone.step(episode(lane)[0]))


def test_lanes_of_the_embedded_network_decide_as_alone():
    checkpoint = load(EMBEDDED)
    rule = ExitRule(checkpoint.info.model.exits, checkpoint.info.thresholds, checkpoint.info.delta)
    together = DeerPolicy(checkpoint.model, checkpoint.tokenizer, rule, 3)
    alone = [DeerPolicy(checkpoint.model, checkpoint.tokenizer, rule) for _ in range(3)]
    for lane, instruction in enumerate(
        ("open the drawer", "push the red block to the left", "use the switch to turn on the lamp")
    ):
        assert together.reset(instruction, lane) == alone[lane].reset(instruction)
    for seen in zip(*(episode(lane, steps=6) for lane in range(3))):
        for lane, step in together.step_lanes(dict(enumerate(seen))).items():
            assert_same(step, alone[lane].step(seen[lane]), noise=1e-5)


def test_lanes_begin_end_and_pause_without_touching_one_another():
    model = exact_model()
    rule = mixed_rules(model)[1]
    together, alone = with_lanes(model, 2, rule), [new_policy(rule, model) for _ in range(2)]
    for lane, policy in enumerate(alone):
        policy.reset(INSTRUCTIONS[lane])
    for i, seen in enumerate(zip(episode(0), episode(1))):
        lanes = [0, 1] if i % 3 else [1]
        if i == 5:
            alone[0].reset(INSTRUCTIONS[2])
            together.reset(INSTRUCTIONS[2], 0)
        steps = together.step_lanes({lane: seen[lane] for lane in lanes})
        assert list(steps) == lanes
        for lane in lanes:
            assert_same(steps[lane], alone[lane].step(seen[lane]))
    assert together.step_lanes({}) == {}


def test_a_rule_with_one_exit_takes_just_that_one_and_runs_nothing_deeper():
    model = exact_model()
    ran = []
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda module, args, output, i=i: ran.append((i, len(output))))
    together = with_lanes(model, 2)
    together.set_rule(ExitRule((3,), (1e8,)), 0)
    steps = together.step_lanes({0: episode(0)[0], 1: episode(1)[0]})
    assert [steps[lane].layers_run for lane in (0, 1)] == [4, 6]
    assert [steps[lane].head_probes for lane in (0, 1)] == [2, 4]
    assert ran == [(0, 2), (1, 2), (2, 2), (3, 2), (4, 1), (5, 1)], "a lane that has exited costs no layer"


def test_an_action_that_is_not_finite_leaves_the_memory_of_its_lane_alone():
    model = exact_model()
    together, alone = with_lanes(model, 2), new_policy(NEVER, model)
    for lane in (0, 1):
        together.reset(INSTRUCTION, lane)
    first, second = episode(0)[:2]
    hook = model.layers[0].register_forward_hook(
        lambda module, args, output: output * torch.tensor([[[float("nan")]], [[1.0]]])
    )
    steps = together.step_lanes({0: first, 1: first})
    hook.remove()
    assert [steps[lane].action.is_finite for lane in (0, 1)] == [False, True]
    together.step_lanes({0: first})
    alone.step(first)
    assert_same(together.step_lanes({0: second})[0], alone.step(second))


def test_a_lane_without_an_instruction_and_an_unknown_exit_are_refused():
    together = DeerPolicy(small_model(), small_tokenizer(), NEVER, 2)
    together.reset(INSTRUCTIONS[0])
    with pytest.raises(UserError, match=r"lanes \[1\] have no instruction yet"):
        together.step_lanes({0: episode(0)[0], 1: episode(1)[0]})
    with pytest.raises(UserError, match="choose from"):
        together.set_rule(ExitRule((2,), (0.0,)), 1)


def test_one_rule_is_set_for_every_lane():
    together = with_lanes(small_model(), 2)
    together.rule = ALWAYS
    steps = together.step_lanes({0: episode(0)[0], 1: episode(1)[0]})
    assert [steps[lane].layers_run for lane in (0, 1)] == [2, 2]
