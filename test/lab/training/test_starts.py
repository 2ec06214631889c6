"""Tests of the start of a training: its weights, its units and its earlier stages."""

import dataclasses
import json
import shutil

import pytest
import torch
from runs import EXIT, JOINT, parsed, recipe_file, train

from deer_vla_ros.bag.calvin_files import RECORDINGS, write_action_space
from deer_vla_ros.commands import train_command
from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.training.training_run import TrainingRun
from deer_vla_ros.model.action_space import CALVIN, TABLETOP
from deer_vla_ros.model.checkpoint import CONFIG, README, load, load_info

SHORT = {**JOINT, "steps": 2}
MY_ARM = dataclasses.replace(TABLETOP, frame="tool0", translation_m=0.01)


@pytest.fixture(scope="module")
def start(data, tmp_path_factory):
    """A checkpoint folder with an action space of its own."""
    folder = tmp_path_factory.mktemp("start")
    train(recipe_file(folder, SHORT), folder / "out", data)
    checkpoint = folder / "out" / "small" / "checkpoint"
    config = json.loads((checkpoint / CONFIG).read_text())
    (checkpoint / CONFIG).write_text(json.dumps({**config, "action_space": dataclasses.asdict(MY_ARM)}))
    return checkpoint


@pytest.fixture
def own_data(data, tmp_path):
    """Demonstrations that a test may change."""
    shutil.copytree(data, tmp_path / "data")
    return tmp_path / "data"


def from_start(folder, start, *steps, layers=4):
    network = {"preset": "tabletop", "layers": layers, "dropout": 0.0, "from_checkpoint": str(start)}
    return recipe_file(folder, *steps, network=network)


def test_fine_tuning_goes_on_from_the_weights_and_the_units_of_a_checkpoint(start, data, tmp_path):
    _, weights = train(from_start(tmp_path, start, EXIT), tmp_path / "out", data)
    before = load(start).model.state_dict()
    is_head = {name: name.startswith(("shared_head.", "last_head.", "auxiliary_heads.")) for name in weights}
    assert all(torch.equal(before[name], weights[name]) for name in weights if not is_head[name])
    assert any(not torch.equal(before[name], weights[name]) for name in weights if is_head[name])
    assert load_info(tmp_path / "out" / "small" / "checkpoint").action_space == MY_ARM


def test_a_checkpoint_of_another_shape_is_refused_before_it_is_loaded(start, data, tmp_path):
    config = from_start(tmp_path, start, EXIT, layers=6)
    with pytest.raises(
        UserError, match=r"network has decoder.layers 6, .*checkpoint has 4: give the network that the folder"
    ):
        train_command.run(parsed(config, tmp_path / "out", data))


def test_a_network_acts_in_the_units_that_its_labels_are_in(start, own_data, tmp_path):
    write_action_space(own_data / "demos", CALVIN)
    train(from_start(tmp_path, start, {**EXIT, "steps": 2}), tmp_path / "out", own_data)
    assert load_info(tmp_path / "out" / "small" / "checkpoint").action_space == CALVIN


def test_labels_in_two_units_are_refused(own_data, tmp_path):
    shutil.copytree(own_data / "demos", own_data / "others")
    write_action_space(own_data / "demos", CALVIN)
    write_action_space(own_data / "others", MY_ARM)
    config = recipe_file(tmp_path, {**SHORT, "data": ["demos", "others"]})
    with pytest.raises(UserError, match="demos and .*others say different things of what an action means"):
        train_command.run(parsed(config, tmp_path / "out", own_data))


def test_units_that_cannot_be_read_are_not_guessed(own_data, tmp_path):
    (own_data / "demos" / RECORDINGS).write_text('{"action_space": {"frame": "base"}}')
    with pytest.raises(UserError, match="translation_m"):
        train_command.run(parsed(recipe_file(tmp_path, SHORT), tmp_path / "out", own_data))


def test_a_stage_that_is_older_than_the_one_before_it_is_refused(data, tmp_path):
    config, run = recipe_file(tmp_path, SHORT, EXIT), tmp_path / "out" / "small"
    train(config, tmp_path / "out", data)
    shutil.rmtree(run / "stage-1-joint")
    with pytest.raises(
        UserError, match=r"stage-2-exit came of an older training of the stage before it: remove it"
    ):
        train_command.run(parsed(config, tmp_path / "out", data))
    shutil.rmtree(run / "stage-2-exit")
    train(config, tmp_path / "out", data)


def test_what_acts_for_dagger_is_the_network_of_this_training(data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(TrainingRun, "_other_command", lambda run, arguments: asked.append(arguments[0]))
    config, run = recipe_file(tmp_path, SHORT), tmp_path / "out" / "small"
    steps = [{"train": SHORT}, {"record": {"folder": "demos", "demos": 2, "seed": 2, "with_policy": True}}]
    for seed in (0, 1):
        recipe_file(tmp_path, seed=seed, steps=steps)
        _, weights = train(config, tmp_path / "out", data)
        acting = load(run / "policy_for_demos").model.state_dict()
        assert all(torch.equal(acting[name], weights[name]) for name in weights), f"seed {seed}"
        shutil.rmtree(run / "stage-1-joint")
    assert asked == ["record-demos"] * 2 and (run / "policy_for_demos" / README).is_file()
