"""Tests that each ablation changes the named part and nothing else."""

import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT

from deer_vla_ros.budget.calibration import Calibration
from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.benchmarks import ablations
from deer_vla_ros.lab.training.recipe import Recipe, Train
from deer_vla_ros.model.checkpoint import EMBEDDED, load_info

RECIPE = ROOT / "config" / "training" / "ablation.yaml"


@given(
    st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda parts: sum(parts) > 0.01),
    st.lists(st.integers(1, 80), min_size=1, max_size=30),
)
def test_a_schedule_gives_every_exit_its_share_as_nearly_as_whole_steps_can(parts, lengths):
    shares = dict(zip((1, 3, 5), np.array(parts) / sum(parts)))
    steps_by_time = [sum(length > time for length in lengths) for time in range(max(lengths))]
    schedule = ablations.by_time(shares, steps_by_time)
    assert [layer for layer, _ in schedule] == [1, 3] and schedule[0][1] <= schedule[1][1]
    coarsest = max(steps_by_time) / sum(steps_by_time) / 2
    for (_, until), wanted in zip(schedule, np.cumsum(list(shares.values()))):
        assert sum(steps_by_time[:until]) / sum(lengths) == pytest.approx(wanted, abs=coarsest + 1e-9)


def test_every_network_is_trained_by_the_recipe_but_for_its_switch(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(ablations, "_call", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(ablations, "_calibrate", lambda folder, on_progress: None)
    setting = ablations.Setting(RECIPE, tmp_path / "data", tmp_path / "out", processes=2, fraction=0.3)
    folders = ablations.networks(setting, lambda line: None)
    recipes = {
        name: Recipe.read(path)
        for name, path in zip(folders, (arguments[arguments.index("--config") + 1] for arguments in calls))
    }
    assert len({str(folder) for folder in folders.values()}) == len(recipes) == len(ablations.TRAINED)
    whole = recipes.pop(ablations.ALL_PARTS)
    assert whole.steps == Recipe.read(RECIPE).steps and whole.network.config().head.lstm_layers == 1
    for name, recipe in recipes.items():
        network, train = ablations.TRAINED[name]
        assert network or train
        for step in recipe.steps:
            if isinstance(step, Train):
                assert all(getattr(step, field) == value for field, value in train.items())
        assert [getattr(step, "steps", None) for step in recipe.steps] == [
            getattr(step, "steps", None) for step in whole.steps
        ]
    (beside_eight, _), (beside_two, _) = (
        (step for step in r.steps if isinstance(step, Train)) for r in (whole, recipes["no auxiliary heads"])
    )
    assert [getattr(beside_two, g) / getattr(beside_eight, g) for g in ("heatmap", "point", "turn")] == [
        2 / 8
    ] * 3
    assert recipes["no LSTM"].network.config().head.lstm_layers == 0


@pytest.mark.parametrize(("cores", "processes"), [(1, 1), (2, 2), (6, 4), (12, 8), (48, 32)])
def test_a_training_takes_as_many_processes_as_share_its_batches_evenly(
    cores, processes, tmp_path, monkeypatch
):
    calls = []
    monkeypatch.setattr(ablations, "_call", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(ablations, "_calibrate", lambda folder, on_progress: None)
    ablations.networks(ablations.Setting(RECIPE, tmp_path, tmp_path / "out", cores, 0.3), lambda line: None)
    assert {call[call.index("--nproc-per-node") + 1] for call in calls} == {processes}


def test_the_criteria_and_thresholds_are_compared_at_one_cost():
    calibration = Calibration.load(EMBEDDED)
    shares = ablations.shares_within(calibration, EMBEDDED, 0.5)
    assert sum(shares.values()) == pytest.approx(1) and tuple(shares) == calibration.exits
    deeper = ablations.family_thresholds(calibration, EMBEDDED, "exp", 0.8)
    assert len(deeper) == len(calibration.exits)
    assert deeper != ablations.family_thresholds(calibration, EMBEDDED, "exp", 0.4)


def test_a_network_without_calibration_is_refused_with_the_command_that_makes_one(tmp_path, monkeypatch):
    bare = tmp_path / "bare"
    shutil.copytree(EMBEDDED, bare, ignore=shutil.ignore_patterns("calibration*"))
    setting = ablations.Setting(RECIPE, tmp_path, tmp_path / "out", processes=1, fraction=0.3)
    with pytest.raises(UserError, match="bare has no calibration.*calibrate"):
        ablations.points(setting, {ablations.ALL_PARTS: bare}, lambda points: [], lambda line: None)


def test_a_trained_network_is_compared_as_it_is_and_left_as_it_was(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(ablations, "_call", lambda *arguments: calls.append(arguments))
    before = {path: path.read_bytes() for path in EMBEDDED.iterdir() if path.is_file()}
    setting = ablations.Setting(RECIPE, tmp_path, tmp_path / "out", processes=1, fraction=0.3)
    found = ablations.points(
        setting,
        {ablations.ALL_PARTS: EMBEDDED},
        lambda points: [{"steps_by_time": [4, 3, 2, 1]} for _ in points],
        lambda line: None,
    )
    (by_features,) = (point.folder for point in found if point.label == ablations.FEATURES)
    assert by_features.is_relative_to(tmp_path) and load_info(by_features).delta == "feature"
    assert {point.folder for point in found} == {EMBEDDED, by_features} and len(found) == 7
    assert [call[1:4] for call in calls] == [("deer_vla_ros", "calibrate", "table")]
    assert before == {path: path.read_bytes() for path in EMBEDDED.iterdir() if path.is_file()}
