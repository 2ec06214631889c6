"""Does every lane of a lock-step batch decide as a policy of its own?"""

import dataclasses

import numpy as np
import pytest
import torch
from small_model import SMALL, observations, small_model, small_tokenizer

from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.lockstep import LockstepPolicy
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.inference.types import Observation, PolicyStep
from deer_vla_ros.model.checkpoint import EMBEDDED, load
from deer_vla_ros.model.config import GroundingConfig, ModelConfig, ProprioceptionConfig
from deer_vla_ros.model.network import MultiExitVLA

INSTRUCTIONS = ("push", "lift the red block", "push the blue block to the left", "lift the block")
"""Of 4, 7, 10 and 6 tokens."""
NEVER = ExitRule(SMALL.exits, (-1.0, -1.0, -1.0))


def mixed_rules(model, tokenizer, **changes) -> list[ExitRule]:
    """A rule for each lane, under which an episode takes every exit."""
    policy, rules = (
        DeerPolicy(model, tokenizer, dataclasses.replace(NEVER, delta=changes.get("delta", "l2"))),
        [],
    )
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
    rules = mixed_rules(model, tokenizer, **changes)
    together = LockstepPolicy(model, tokenizer, NEVER, lanes=4)
    alone = [DeerPolicy(model, tokenizer, rule) for rule in rules]
    for lane, instruction in enumerate(INSTRUCTIONS):
        alone[lane].reset(instruction)
        assert together.reset(lane, instruction) == alone[lane].tokens
        together.set_rule(rules[lane], lane)
    taken = set()
    for seen in zip(*(episode(lane) for lane in range(4))):
        steps = together.step(dict(enumerate(seen)))
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
    model, tokenizer = exact_model(config), small_tokenizer()
    together, alone = LockstepPolicy(model, tokenizer, NEVER, 4), DeerPolicy(model, tokenizer, NEVER)
    for lane, instruction in enumerate(INSTRUCTIONS):
        together.reset(lane, instruction)
    steps = together.step({lane: episode(lane)[0] for lane in range(4)})
    for lane, instruction in enumerate(INSTRUCTIONS):
        alone.reset(instruction)
        assert_same(steps[lane], alone.step(episode(lane)[0]))


def test_the_embedded_network_decides_in_lock_step_as_deer_policy_does():
    checkpoint = load(EMBEDDED)
    rule = ExitRule(checkpoint.info.model.exits, checkpoint.info.thresholds, checkpoint.info.delta)
    together = LockstepPolicy(checkpoint.model, checkpoint.tokenizer, rule, 3)
    alone = [DeerPolicy(checkpoint.model, checkpoint.tokenizer, rule) for _ in range(3)]
    for lane, instruction in enumerate(
        ("open the drawer", "push the red block to the left", "use the switch to turn on the lamp")
    ):
        assert together.reset(lane, instruction) == (alone[lane].reset(instruction), alone[lane].tokens)[1]
    for seen in zip(*(episode(lane, steps=6) for lane in range(3))):
        for lane, step in together.step(dict(enumerate(seen))).items():
            assert_same(step, alone[lane].step(seen[lane]), noise=1e-5)


def test_lanes_begin_end_and_pause_without_touching_one_another():
    model, tokenizer = exact_model(), small_tokenizer()
    rule = mixed_rules(model, tokenizer)[1]
    together = LockstepPolicy(model, tokenizer, rule, 2)
    alone = [DeerPolicy(model, tokenizer, rule) for _ in range(2)]
    for lane, policy in enumerate(alone):
        policy.reset(INSTRUCTIONS[lane])
        together.reset(lane, INSTRUCTIONS[lane])
    for i, seen in enumerate(zip(episode(0), episode(1))):
        lanes = [0, 1] if i % 3 else [1]
        if i == 5:
            alone[0].reset(INSTRUCTIONS[2])
            together.reset(0, INSTRUCTIONS[2])
        steps = together.step({lane: seen[lane] for lane in lanes})
        assert list(steps) == lanes
        for lane in lanes:
            assert_same(steps[lane], alone[lane].step(seen[lane]))
    assert together.step({}) == {}


def test_a_rule_with_one_exit_takes_just_that_one_and_runs_nothing_deeper():
    model, tokenizer = exact_model(), small_tokenizer()
    ran = []
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda module, args, output, i=i: ran.append((i, len(output))))
    together = LockstepPolicy(model, tokenizer, NEVER, 2)
    together.reset(0, INSTRUCTIONS[0])
    together.reset(1, INSTRUCTIONS[1])
    together.set_rule(ExitRule((3,), (1e8,)), 0)
    steps = together.step({0: episode(0)[0], 1: episode(1)[0]})
    assert [steps[lane].layers_run for lane in (0, 1)] == [4, 6]
    assert [steps[lane].head_probes for lane in (0, 1)] == [2, 4]
    assert ran == [(0, 2), (1, 2), (2, 2), (3, 2), (4, 1), (5, 1)], "a lane that has exited costs no layer"


def test_an_action_that_is_not_finite_leaves_the_memory_of_its_lane_alone():
    model, tokenizer = exact_model(), small_tokenizer()
    together, alone = LockstepPolicy(model, tokenizer, NEVER, 2), DeerPolicy(model, tokenizer, NEVER)
    alone.reset(INSTRUCTIONS[0])
    for lane in (0, 1):
        together.reset(lane, INSTRUCTIONS[0])
    first, second = episode(0)[:2]
    hook = model.layers[0].register_forward_hook(
        lambda module, args, output: output * torch.tensor([[[float("nan")]], [[1.0]]])
    )
    steps = together.step({0: first, 1: first})
    hook.remove()
    assert [steps[lane].action.is_finite for lane in (0, 1)] == [False, True]
    together.step({0: first})
    alone.step(first)
    assert_same(together.step({0: second})[0], alone.step(second))


def test_a_lane_without_an_instruction_and_an_unknown_exit_are_refused():
    together = LockstepPolicy(small_model(), small_tokenizer(), NEVER, 2)
    together.reset(0, INSTRUCTIONS[0])
    with pytest.raises(UserError, match=r"lanes \[1\] have no instruction yet"):
        together.step({0: episode(0)[0], 1: episode(1)[0]})
    with pytest.raises(UserError, match="choose from"):
        together.set_rule(ExitRule((2,), (0.0,)), 1)
