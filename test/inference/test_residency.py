"""Tests of ResidentLayers: dropped layers free their memory at once and are loaded back during control."""

import ctypes
import dataclasses
import gc
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import INSTRUCTION, SMALL, observations, small_model, small_tokenizer, with_decoder

from deer_vla_ros.errors import UserError
from deer_vla_ros.inference import residency
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.inference.residency import ResidentLayers
from deer_vla_ros.model.action_space import CALVIN
from deer_vla_ros.model.checkpoint import EMBEDDED, WEIGHTS, Checkpoint, CheckpointInfo, load, save
from deer_vla_ros.model.config import tabletop
from deer_vla_ros.model.network import MultiExitVLA

BIG = with_decoder(tabletop(), width=640, heads=8)
"""12 layers of 20 MiB in float32."""
SLACK = 5 * 2**20
"""The tolerance for the memory of the process: a quarter of one layer. It was measured to vary by 1 MiB."""


@pytest.fixture(scope="module")
def big_folder(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("big")
    torch.manual_seed(0)
    embedded = load(EMBEDDED)
    save(
        folder,
        Checkpoint(dataclasses.replace(embedded.info, model=BIG), MultiExitVLA(BIG), embedded.tokenizer),
        "",
    )
    yield folder
    (folder / WEIGHTS).unlink()  # pytest would keep a quarter of a gigabyte


@pytest.fixture
def small_folder(tmp_path) -> Path:
    info = CheckpointInfo(
        SMALL, CALVIN, weights="random", trained=False, delta="l2", thresholds=(0.01, 0.02, 1e8)
    )
    save(tmp_path, Checkpoint(info, small_model(), small_tokenizer()), "")
    return tmp_path


def resident_bytes() -> int:
    """Memory of this process alone, without pages of files, which Linux drops and reads again at will."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


def bytes_of(model: MultiExitVLA, first: int) -> int:
    """Of the layers from `first` on; on the meta device a tensor tells what it would take."""
    return sum(parameter.nbytes for layer in model.layers[first:] for parameter in layer.parameters())


def threads() -> tuple[set[threading.Thread], int]:
    """Python's, and how many the process has, torch's own included."""
    return set(threading.enumerate()), len(os.listdir("/proc/self/task"))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "waited for half a minute"
        time.sleep(0.001)


def is_in_place(model: MultiExitVLA, count: int) -> bool:
    """Whether exactly the first `count` layers have memory."""
    return all(
        parameter.is_meta == (i >= count)
        for i, layer in enumerate(model.layers)
        for parameter in layer.parameters()
    )


def is_as_stored(checkpoint: Checkpoint, count: int) -> bool:
    """Whether exactly the first `count` layers have memory, have the weights of the folder, and can run."""
    layers, dtype = checkpoint.model.layers[:count], checkpoint.model.dtype
    stored = load_file(checkpoint.folder / WEIGHTS)
    return (
        is_in_place(checkpoint.model, count)
        and not any(part.training for layer in layers for part in layer.modules())
        and not any(parameter.requires_grad for parameter in layers.parameters())
        and all(tensor.dtype == dtype for tensor in layers.state_dict().values())
        and all(
            torch.equal(tensor, stored[f"layers.{name}"].to(dtype))
            for name, tensor in layers.state_dict().items()
        )
    )


def new_policy(checkpoint: Checkpoint) -> DeerPolicy:
    policy = DeerPolicy(checkpoint.model, checkpoint.tokenizer, to_depth(2))
    policy.reset(INSTRUCTION)
    return policy


def to_depth(layers: int) -> ExitRule:
    """Reads the head at every second layer and never agrees before `layers` layers have run."""
    exits = tuple(range(1, layers, 2))
    return ExitRule(exits, (-1.0,) * len(exits))


def outcome(policy: DeerPolicy, layers: int, seed: int) -> tuple:
    """One step of `layers` layers: what it does, and what the policy then remembers, to the bit."""
    policy.rule = to_depth(layers)
    step = policy.step(observations(1, seed)[0])
    assert step.exit_layer == layers - 1
    state = tuple(part.numpy().tobytes() for part in policy.state)
    return step.action.pose.tobytes(), step.action.gripper_probability, state


# What a checkpoint gives


def test_a_loaded_network_lives_apart_from_its_file(small_folder):
    checkpoint, path = load(small_folder), small_folder / WEIGHTS
    assert checkpoint.folder == small_folder
    before = {name: tensor.clone() for name, tensor in checkpoint.model.state_dict().items()}
    with path.open("r+b") as file:  # in place: a view of the mapped file would see it
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in checkpoint.model.state_dict().items())


# Memory


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Memory that only the garbage collector would find stays where it is. What earlier tests freed is given
    back, because `keep` gives it back too."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    gc.disable()
    yield
    gc.enable()


def test_lowering_frees_the_memory_at_once(big_folder, no_collector):
    checkpoint = load(big_folder)
    resident = ResidentLayers(checkpoint.model, checkpoint.folder)
    for count in (11, 8, 2):
        dropped = bytes_of(checkpoint.model, count) - bytes_of(checkpoint.model, resident.count)
        before = resident_bytes()
        resident.keep(count)
        assert before - resident_bytes() >= 0.9 * dropped
        assert (resident.count, resident.wanted) == (count, count)
        assert is_in_place(checkpoint.model, count)


def test_six_times_down_and_up_leave_memory_and_threads_as_they_were(big_folder, no_collector):
    checkpoint = load(big_folder)
    resident = ResidentLayers(checkpoint.model, checkpoint.folder)
    moved, high, before = bytes_of(checkpoint.model, 2), resident_bytes(), threads()
    for _ in range(6):
        resident.keep(2)
        assert abs(resident_bytes() - (high - moved)) < SLACK
        resident.keep(12)
        until(resident.absorb)
        assert resident.count == 12
        assert abs(resident_bytes() - high) < SLACK
    until(lambda: threads() == before)  # Linux needs a moment to bury one
    assert is_as_stored(checkpoint, 12)


# Control goes on


def test_control_goes_on_during_a_load_and_then_acts_as_if_the_layers_had_never_gone(big_folder):
    checkpoint = load(big_folder)
    resident = ResidentLayers(checkpoint.model, checkpoint.folder)
    policy, depths = new_policy(checkpoint), [12, 12]
    taken = [outcome(policy, 12, seed=0), outcome(policy, 12, seed=1)]
    resident.keep(2)
    resident.keep(12)
    assert (resident.count, resident.wanted) == (2, 12)
    during = 0
    while not resident.absorb():
        during = len(depths) - 2  # the load still goes on: the steps so far were made during it
        taken.append(outcome(policy, resident.count, seed=len(depths)))
        depths.append(2)
    print("DURING", during)
    assert during >= 1
    assert (resident.count, resident.wanted) == (12, 12)
    for _ in range(3):
        taken.append(outcome(policy, 12, seed=len(depths)))
        depths.append(12)

    undisturbed = load(big_folder)
    reference = new_policy(undisturbed)
    assert taken == [outcome(reference, depth, seed) for seed, depth in enumerate(depths)]
    assert outcome(new_policy(undisturbed), 2, seed=0) != taken[0], "depth is not seen in the outcome"


def test_a_layer_that_is_not_there_fails_loudly_and_leaves_the_policys_memory(small_folder):
    checkpoint = load(small_folder)
    policy, undisturbed = new_policy(checkpoint), new_policy(load(small_folder))
    assert outcome(policy, 6, seed=0) == outcome(undisturbed, 6, seed=0)
    ResidentLayers(checkpoint.model, checkpoint.folder).keep(4)
    with pytest.raises(RuntimeError, match="meta"):
        outcome(policy, 6, seed=1)
    assert outcome(policy, 4, seed=2) == outcome(undisturbed, 4, seed=2)


# A load that is called off, or sent elsewhere


@pytest.fixture
def loading(big_folder, no_collector) -> Iterator[tuple[Checkpoint, ResidentLayers, int]]:
    """Of 12 layers wanted, 2 are in place and some more are read; and the bytes of the process before."""
    checkpoint = load(big_folder)
    resident = ResidentLayers(checkpoint.model, checkpoint.folder)
    resident.keep(2)
    low = resident_bytes()
    resident.keep(12)
    read = bytes_of(
        checkpoint.model, 10
    )  # two layers, each counted twice: in the mapped file and in its own memory
    until(lambda: resident_bytes() > low + 2 * read)
    assert not resident.absorb(), "the load ended too soon for this test"
    yield checkpoint, resident, low
    resident.close()
    assert "load_layers" not in {thread.name for thread in threading.enumerate()}


def test_lowering_during_a_load_calls_it_off(loading):
    checkpoint, resident, low = loading
    resident.keep(2)
    assert abs(resident_bytes() - low) < SLACK
    assert "load_layers" not in {thread.name for thread in threading.enumerate()}
    assert not resident.absorb()
    assert (resident.count, resident.wanted) == (2, 2)
    assert is_in_place(checkpoint.model, 2)


def test_a_load_is_called_off_at_once(loading):
    checkpoint, resident, low = loading
    begin = time.monotonic()
    until(resident.absorb)
    rest_of_load = time.monotonic() - begin
    waits = []
    for _ in range(3):
        resident.keep(2)
        resident.keep(12)
        begin = time.monotonic()
        resident.keep(2)
        waits.append(time.monotonic() - begin)
    assert min(waits) < rest_of_load / 3


def test_closing_during_a_load_calls_it_off(loading):
    checkpoint, resident, low = loading
    resident.close()
    assert abs(resident_bytes() - low) < SLACK
    assert "load_layers" not in {thread.name for thread in threading.enumerate()}
    assert not resident.absorb()
    assert (resident.count, resident.wanted) == (2, 2)


@pytest.mark.parametrize("asked", [(3,), (6, 12), (2, 5)])
def test_a_load_can_be_sent_elsewhere(loading, asked):
    checkpoint, resident, low = loading
    for count in asked:
        resident.keep(count)
        assert (resident.count, resident.wanted) == (2, count)
    until(resident.absorb)
    assert (resident.count, resident.wanted) == (asked[-1], asked[-1])
    moved = bytes_of(checkpoint.model, 2) - bytes_of(checkpoint.model, asked[-1])
    assert abs(resident_bytes() - (low + moved)) < SLACK
    assert is_as_stored(checkpoint, asked[-1])


def test_layers_that_are_loaded_but_wanted_no_more_are_never_put_in_place(small_folder):
    checkpoint = load(small_folder)
    resident = ResidentLayers(checkpoint.model, checkpoint.folder)
    before = threads()[0]
    resident.keep(2)
    resident.keep(6)
    until(lambda: threads()[0] == before)
    resident.keep(4)
    until(resident.absorb)
    assert (resident.count, resident.wanted) == (4, 4)
    assert is_as_stored(checkpoint, 4)
    resident.keep(6)
    until(lambda: threads()[0] == before)
    resident.keep(3)
    assert not resident.absorb()
    assert (resident.count, resident.wanted) == (3, 3)
    assert is_in_place(checkpoint.model, 3)


# What goes wrong


def change_tensors(path: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(b""), "header"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "incomplete"),
        (
            lambda path: change_tensors(path, lambda all: all.pop("layers.3.block.up.weight")),
            "layers.3.block.up.weight",
        ),
        (
            lambda path: change_tensors(path, lambda all: all.update({"layers.5.colour": torch.zeros(1)})),
            "layers.5.colour",
        ),
        (
            lambda path: change_tensors(
                path, lambda all: all.update({"layers.5.block.up.weight": torch.zeros(16, 32)})
            ),
            "layers.5.block.up.weight: shape is (16, 32), the network's (32, 16)",
        ),
    ],
)
def test_a_load_that_fails_is_told_once_while_control_goes_on_and_may_be_tried_again(
    small_folder, damage, complaint
):
    checkpoint, path = load(small_folder), small_folder / WEIGHTS
    resident = ResidentLayers(checkpoint.model, checkpoint.folder)
    policy, undisturbed = new_policy(checkpoint), new_policy(load(small_folder))
    whole, before = path.read_bytes(), threads()[0]
    resident.keep(2)
    damage(path)
    as_if_loaded_from(path, resident)
    resident.keep(6)
    until(lambda: threads()[0] == before)
    with pytest.raises(UserError) as failure:
        resident.absorb()
    message = str(failure.value)
    assert (
        str(path) in message and complaint in message and "layers 2 to 5" in message and "\n" not in message
    )
    assert not resident.absorb()
    assert (resident.count, resident.wanted) == (2, 2)
    assert is_in_place(checkpoint.model, 2)
    assert outcome(policy, 2, seed=0) == outcome(undisturbed, 2, seed=0)

    path.write_bytes(whole)
    as_if_loaded_from(path, resident)
    resident.keep(6)
    until(resident.absorb)
    assert resident.count == 6
    assert is_as_stored(checkpoint, 6)
    assert outcome(policy, 6, seed=1) == outcome(undisturbed, 6, seed=1)


def as_if_loaded_from(path: Path, resident: ResidentLayers) -> None:
    """A file that was written after the network was loaded is refused before anything else is checked."""
    if path.exists():
        resident._identity = residency._identity(path)


@pytest.mark.parametrize("count", [-1, 0, 1, 7])
def test_a_count_that_no_network_can_run_is_refused_and_changes_nothing(small_folder, count):
    checkpoint = load(small_folder)
    resident = ResidentLayers(checkpoint.model, checkpoint.folder)
    for kept in (6, 4):
        resident.keep(kept)
        with pytest.raises(UserError, match=f"{count} asked for: give 2 to 6"):
            resident.keep(count)
        assert (resident.count, resident.wanted) == (kept, kept)
        assert is_as_stored(checkpoint, kept)


def test_layers_that_could_not_come_back_do_not_go():
    model = small_model()
    resident = ResidentLayers(model, None)
    resident.keep(6)
    with pytest.raises(UserError, match="no checkpoint folder"):
        resident.keep(4)
    assert (resident.count, resident.wanted) == (6, 6)
    assert is_in_place(model, 6)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_layers_come_back_to_the_bit(big_folder, no_collector, bits):
    checkpoint = load(big_folder, bits=bits)
    before = {name: tensor.clone() for name, tensor in checkpoint.model.layers.state_dict().items()}
    resident = ResidentLayers(checkpoint.model, checkpoint.folder)
    low = resident_bytes() - sum(checkpoint.model.layer_bytes[2:])
    for _ in range(4):
        resident.keep(2)
        assert resident_bytes() < low + 3 * SLACK, "the allocator keeps what quantising a piece takes"
        resident.keep(12)
        until(resident.absorb)
        assert resident.count == 12
    after = checkpoint.model.layers.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_come_back_in_the_precision_that_they_had(small_folder, dtype):
    checkpoint = load(small_folder, dtype=dtype)
    resident = ResidentLayers(checkpoint.model, checkpoint.folder)
    resident.keep(2)
    resident.keep(6)
    until(resident.absorb)
    assert {parameter.dtype for parameter in checkpoint.model.layers.parameters()} == {dtype}
    assert is_as_stored(checkpoint, 6)
