"""Tests of steps with fixed memory: they decide as eager steps do, allocate nothing, and read once per exit.

CUDA graphs need a GPU. Here a replay calls the function that was captured; everything else is the same.
"""

import dataclasses
import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from small_model import INSTRUCTION, SMALL, observations, small_model, small_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from deer_vla_ros.inference.backends import Captured, Compiled, Direct
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.inference.residency import ResidentLayers
from deer_vla_ros.inference.static_step import ExitGroup, StaticStep
from deer_vla_ros.inference.types import PolicyStep
from deer_vla_ros.model.action_space import CALVIN
from deer_vla_ros.model.checkpoint import Checkpoint, CheckpointInfo, load, save

CPU = torch.device("cpu")
NEVER = ExitRule(SMALL.exits, (-1.0,) * 3)
TEXTS = ("push", INSTRUCTION, "lift the blue block to the left")
"""Of 4, 7 and 10 tokens. A captured function is for 8 or 16."""
EIGHT = "push the red block left"
"""Of 8 tokens: it is not padded."""


class Replayed(Captured):
    """Captures a function by keeping it, as a CUDA graph keeps what it did.

    replays: how many functions ran. waits: how often the host waited. inside: whether a function runs now.
    """

    def __init__(self):
        super().__init__(CPU)
        self.replays = self.waits = self.captures = 0
        self.inside = False

    def capture(self, run):
        self.captures += 1
        run()

        def replay():
            self.replays += 1
            self.inside = True
            run()
            self.inside = False

        return replay

    def mark(self):
        mark = super().mark()
        mark.wait = self._wait
        return mark

    def _wait(self):
        self.waits += 1


def mixed_rule(**changes) -> ExitRule:
    """Thresholds in the middle of the measured deltas, so that an episode takes every exit."""
    policy = new_policy(None)
    deltas = np.array([policy.step(each).deltas for each in observations(12)])
    return ExitRule(SMALL.exits, (*np.quantile(deltas[:, :-1], 0.4, axis=0).tolist(), 1e8), **changes)


def new_policy(backend, rule: ExitRule = NEVER, model=None, text: str = INSTRUCTION) -> DeerPolicy:
    policy = DeerPolicy(model or small_model(), small_tokenizer(), rule, backend=backend)
    policy.reset(text)
    return policy


def decided(step: PolicyStep) -> tuple:
    return step.exits, step.exit_index, step.stop, step.thresholds, step.head_probes, step.tokens


def assert_same(step: PolicyStep, eager: PolicyStep, tolerance: float = 0.0) -> None:
    assert decided(step) == decided(eager)
    np.testing.assert_allclose(step.deltas, eager.deltas, rtol=0, atol=tolerance)
    np.testing.assert_allclose(step.action.pose, eager.action.pose, rtol=0, atol=tolerance)
    assert step.action.gripper_probability == pytest.approx(eager.action.gripper_probability, abs=tolerance)


@pytest.mark.parametrize("launches_early", [False, True])
@pytest.mark.parametrize("backend", [Replayed, lambda: Direct(CPU)], ids=["replayed", "direct"])
def test_two_hundred_steps_decide_as_eager_ones_to_the_bit(backend, launches_early):
    rule = mixed_rule()
    static, eager = new_policy(backend(), rule, text=EIGHT), new_policy(None, rule, text=EIGHT)
    static.launches_early = launches_early
    exits = set()
    for number, observation in enumerate(observations(200)):
        if number == 100:
            assert static.reset(EIGHT) == eager.reset(EIGHT) == 8
        expected = eager.step(observation)
        assert_same(static.step(observation), expected)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(static.state, eager.state))
        exits.add(expected.exit_index)
    assert exits == {0, 1, 2}, "the test saw every exit"


def test_a_padded_text_leads_to_the_same_steps():
    """Up to the rounding of a text of another length, which the memory of an episode passes on."""
    rule = mixed_rule()
    static, eager = new_policy(Replayed(), rule), new_policy(None, rule)
    for number, observation in enumerate(observations(60)):
        if number % 10 == 0:
            text = TEXTS[number // 10 % len(TEXTS)]
            assert static.reset(text) == eager.reset(text) == (4, 7, 10)[TEXTS.index(text)]
        assert_same(static.step(observation), eager.step(observation), 1e-4)


def test_nothing_is_allocated_and_the_host_reads_once_per_exit():
    backend, model = Replayed(), small_model()
    with torch.inference_mode():
        static = StaticStep(model, "l2", backend)
        static.reset(*small_tokenizer().encode([INSTRUCTION]), small_tokenizer().image_token)
        captures = backend.captures
        images, pose = torch.rand(1, 2, 3, 16, 16), torch.zeros(1, 6)
        memory = dict.fromkeys(part.data_ptr() for part in (*static.state, *static.prepared))
        with Operators(backend) as operators:
            for number in range(200):
                depth, backend.replays, backend.waits = number % 3, 0, 0
                static.start()
                static.begin(images, pose)
                for index in range(depth + 1):
                    static.launch(index)
                    static.read(index)
                static.keep(depth)
                assert static.times(depth).total > 0
                # One function looks, one runs for each exit, one keeps the memory.
                assert backend.replays == depth + 3
                assert backend.waits == depth + 1
    # Outside the captured functions, the only operators are copies to memory that is there already.
    assert operators.seen == {"aten.copy_.default"}
    assert backend.captures == captures
    assert memory == dict.fromkeys(part.data_ptr() for part in (*static.state, *static.prepared))


class Operators(TorchDispatchMode):
    """Notes the operators that run outside captured functions."""

    def __init__(self, backend: Replayed):
        super().__init__()
        self._backend, self.seen = backend, set()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if not self._backend.inside:
            self.seen.add(str(function))
        return function(*arguments, **(named or {}))


def test_a_launch_that_was_in_vain_changes_no_result():
    rule, backend = mixed_rule(), Replayed()
    early, plain = new_policy(backend, rule), new_policy(Replayed(), rule)
    early.launches_early = True
    for observation in observations(60):
        expected = plain.step(observation)
        backend.replays = 0
        assert_same(early.step(observation), expected)
        launched = min(expected.exit_index + 2, 3)
        assert backend.replays == launched + 2
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(early.state, plain.state))


def test_rules_that_a_backend_does_not_run_give_the_same_steps_with_one():
    mixed = mixed_rule()
    rules = [
        mixed,
        ExitRule((1, 3), mixed.thresholds[:2]),
        ExitRule((3,), (1e8,)),
        dataclasses.replace(mixed, steps_per_stage=2),
        dataclasses.replace(mixed, ensemble=True),
        dataclasses.replace(mixed, delta="feature"),
    ]
    static, eager = new_policy(Replayed()), new_policy(None)
    drawn = np.random.default_rng(0)
    for number, observation in enumerate(observations(120)):
        if number % 10 == 0:
            static.reset(TEXTS[number // 10 % 3])
            eager.reset(TEXTS[number // 10 % 3])
        static.rule = eager.rule = rules[drawn.integers(len(rules))]
        assert_same(static.step(observation), eager.step(observation), 1e-4)


@pytest.mark.parametrize("layer", [0, 5])
def test_an_action_that_is_not_finite_leaves_the_memory_as_it_was(layer):
    model, broken = small_model(), []
    static, undisturbed = new_policy(Replayed(), model=model), new_policy(Replayed())
    for policy in (static, undisturbed):
        policy.step(observations(1)[0])
    model.layers[layer].register_forward_hook(
        lambda module, given, output: output * float("nan") if broken else output
    )
    broken.append(True)
    assert not static.step(observations(1, seed=5)[0]).action.is_finite
    broken.clear()
    for observation in observations(3, seed=6):
        assert_same(static.step(observation), undisturbed.step(observation))


def test_the_times_of_a_step_are_in_order_and_add_up():
    policy = new_policy(Replayed())
    for observation in observations(5):
        times = policy.step(observation).times
        assert min(times.preprocess, times.vision, times.language, times.head) > 0


# Layers that come and go


@pytest.fixture
def small_folder(tmp_path):
    info = CheckpointInfo(SMALL, CALVIN, "random", False, "l2", (0.01, 0.02, 1e8))
    save(tmp_path, Checkpoint(info, small_model(), small_tokenizer()), "")
    return tmp_path


def to_depth(layers: int) -> ExitRule:
    exits = tuple(range(1, layers, 2))
    return ExitRule(exits, (-1.0,) * len(exits))


@pytest.mark.parametrize("backend", [Replayed, lambda: Direct(CPU)], ids=["replayed", "direct"])
def test_layers_that_were_loaded_back_are_used_and_those_that_left_free_their_memory(backend, small_folder):
    checkpoint = load(small_folder)
    policy = new_policy(backend(), to_depth(6), checkpoint.model)
    eager = new_policy(None, to_depth(6), load(small_folder).model)
    layers = ResidentLayers(checkpoint.model, small_folder, policy)
    for observation in observations(6):
        assert_same(policy.step(observation), eager.step(observation), 1e-4)
        left = weakref.ref(checkpoint.model.layers[4])
        layers.keep(2)
        gc.collect()
        assert left() is None, "something still holds a layer that left"
        policy.rule = eager.rule = to_depth(2)
        assert_same(policy.step(observation), eager.step(observation), 1e-4)
        layers.keep(6)
        layers.wait()
        assert_same(policy.step(observation), eager.step(observation), 1e-4)
        assert layers.absorb()
        policy.rule = eager.rule = to_depth(6)


def test_functions_of_loaded_layers_are_prepared_by_the_thread_that_loads(small_folder):
    class Threads(Replayed):
        names = []

        def capture(self, run):
            self.names.append(threading.current_thread().name)
            return super().capture(run)

    checkpoint = load(small_folder, layers=2)
    backend = Threads()
    policy = new_policy(backend, to_depth(2), checkpoint.model)
    layers = ResidentLayers(checkpoint.model, small_folder, policy)
    before = len(backend.names)
    layers.keep(6)
    layers.wait()
    assert layers.absorb()
    policy.rule = to_depth(6)
    policy.step(observations(1)[0])
    # Two more exits, each for texts of 8 and of 16 tokens.
    assert backend.names[before:] == ["load_layers"] * 4


# Compilation


def explained(group: ExitGroup, model, tokens: int):
    text = model.encode_text(*small_tokenizer().encode([TEXTS[1]]), 2)
    head = model.shared_head
    return torch._dynamo.explain(group)(
        text.embedding,
        torch.rand(1, SMALL.visual_tokens, SMALL.vision.width),
        text,
        None,
        torch.zeros(1, 6),
        head.prepare(head.initial_state()),
    )


@pytest.mark.parametrize("index", [0, 1])
def test_a_group_of_layers_with_its_reading_is_one_graph_without_a_break(index):
    Compiled(CPU)  # lets torch trace the head
    model = small_model()
    group = ExitGroup(model.layers[2 * index : 2 * index + 2], model.shared_head, "l2", index == 0)
    with torch.no_grad():
        found = explained(group, model, 7)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
