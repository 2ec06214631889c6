"""Tests of the commands calibrate, budget and benchmark budgets, on few episodes of the simulated table."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from shared import made_once

from deer_vla_ros.__main__ import main
from deer_vla_ros.budget.budgeted_policy import BudgetedPolicy
from deer_vla_ros.budget.calibration import CALIBRATION, Calibration, closed_loop_shares, columns
from deer_vla_ros.budget.path import exits_taken
from deer_vla_ros.budget.types import Budget
from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.inference.types import Observation
from deer_vla_ros.model.checkpoint import EMBEDDED, load, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A copy of the embedded checkpoint, calibrated again on six episodes."""

    def make(folder: Path) -> None:
        checkpoint = shutil.copytree(EMBEDDED, folder / "checkpoint")
        (checkpoint / CALIBRATION).unlink()
        command = ("calibrate", "table", "--checkpoint", str(checkpoint), "--episodes", "6", "--steps", "25")
        done = subprocess.run(
            [sys.executable, "-m", "deer_vla_ros", *command], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "150 steps" in done.stdout

    return made_once(tmp_path_factory, "calibrated", make) / "checkpoint"


def test_a_calibration_holds_every_exit_of_every_step_with_its_provenance(folder):
    calibration = Calibration.load(folder)
    assert calibration.exits == (1, 3, 5, 7, 9, 11) and calibration.deltas.shape == (150, 6)
    assert calibration.poses.shape == (150, 6, 6) and np.abs(calibration.poses).max() <= 1.0
    assert (calibration.deviations[:, -1] == 0).all() and (calibration.deviations[:, 0] > 0).all()
    lengths = np.bincount(calibration.episodes)
    assert len(lengths) > 6 and lengths.min() > 0, (
        "each of six sessions shows more than one task in its 25 steps, or part of one"
    )
    assert calibration.steps.tolist() == [step for length in lengths for step in range(length)]
    windows = sum(len(range(0, length - 12 + 1, 6)) for length in lengths)
    assert len(calibration.window_deltas) == windows * 6, (
        "windows of 12 steps begin at 0, 6, 12 ..., with 6 positions each"
    )
    assert "seeds 0 to 5" in calibration.provenance["source"] and len(calibration.provenance["weights"]) == 64
    assert sorted(calibration.paths) == [1, 2, 3, 4, 5, 6]


def test_what_calibration_measures_is_what_the_policy_does():
    """Compares closed-loop shares of two rules, and the deltas that decide, with `DeerPolicy` under each."""
    checkpoint = load(EMBEDDED)
    random = np.random.default_rng(0)
    rules = [(0.008, 0.01, 0.01, 0.01, 0.01, 1e8), (0.012, -1e8, 0.02, 0.005, 0.0, 1e8)]
    policy = DeerPolicy(checkpoint.model, checkpoint.tokenizer, ExitRule((1, 3, 5, 7, 9, 11), rules[0]))
    policy.reset("open the drawer")
    images = random.integers(0, 255, (12, 2, 80, 80, 3), dtype=np.uint8)
    observations = [Observation(*pair, np.array([0.4, 0.0, 0.2, 1.0, 0.0, 0.0, 0.0])) for pair in images]
    features = np.stack([policy.features(observation).numpy() for observation in observations])
    episode = columns(torch.from_numpy(features), (1, 3, 5, 7, 9, 11))
    shares = closed_loop_shares(checkpoint.model.shared_head, [episode], np.array(rules), "l2")
    for rule, measured in zip(rules, shares, strict=True):
        policy.rule = ExitRule((1, 3, 5, 7, 9, 11), rule)
        policy.reset("open the drawer")
        on_images = [policy.step(observation).exit_index for observation in observations]
        policy.reset("open the drawer")
        on_features = [policy.step_on_features(torch.from_numpy(step)).exit_index for step in features]
        assert on_images == on_features
        assert measured == pytest.approx(np.bincount(on_images, minlength=6) / 12)


def test_a_calibration_without_enough_time_is_refused_and_leaves_the_old_one(folder, capsys):
    before = (folder / CALIBRATION).read_bytes()
    command = ["calibrate", "table", "--checkpoint", str(folder), "--episodes", "1", "--steps", "25"]
    assert main([*command, "--minutes", "0.0001"]) == 1
    assert "1 steps were measured in half of 0.0001 minutes, and 200 are needed" in capsys.readouterr().err
    assert (folder / CALIBRATION).read_bytes() == before


def test_a_calibration_of_another_depth_and_a_damaged_one_are_refused_with_the_remedy(folder, tmp_path):
    calibration = Calibration.load(folder)
    with pytest.raises(UserError, match="run `python -m deer_vla_ros calibrate`"):
        calibration.check((1, 3), "l2")
    with pytest.raises(UserError, match="'l2' deltas, the checkpoint's rule uses 'max'"):
        calibration.check(calibration.exits, "max")
    (tmp_path / CALIBRATION).write_bytes((folder / CALIBRATION).read_bytes()[:1000])
    with pytest.raises(UserError, match="not a calibration"):
        Calibration.load(tmp_path)
    assert Calibration.load(tmp_path / "nothing") is None


def test_a_calibration_with_values_that_are_no_numbers_is_refused(folder, tmp_path):
    calibration = Calibration.load(folder)
    deltas = calibration.deltas.copy()
    deltas[3, 2] = np.nan
    dataclasses.replace(calibration, deltas=deltas).save(tmp_path)
    with pytest.raises(UserError, match="not finite"):
        Calibration.load(tmp_path)


def test_the_calibration_of_other_weights_is_told_by_who_asks_for_an_average(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    checkpoint = load(other)
    checkpoint.model.shared_head.pose.out.bias += 0.01
    save(other, checkpoint, "Trained on.")
    policy = BudgetedPolicy(load(other))
    policy.check(Budget(peak_gmac=1.0), ["peak_gmac"])
    with pytest.raises(
        UserError, match="budget.average_fraction .* was measured on other weights .* calibrate"
    ):
        policy.check(Budget(average_fraction=0.5), ["average_fraction"])


def test_the_budget_command_tells_cost_against_deviation_and_draws_it(folder, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert main(["budget", str(folder), "--plot", str(tmp_path / "plot.png"), "--json", str(report)]) == 0
    output = capsys.readouterr().out
    assert "calibrated on 150 steps" in output and "seeds 0 to 5" in output
    rows = json.loads(report.read_text())
    assert len(rows) == 12 and (tmp_path / "plot.png").stat().st_size > 10_000
    assert [row["fraction"] for row in rows] == sorted(row["fraction"] for row in rows)
    assert rows[-1]["shares"][-1] == pytest.approx(1.0) and rows[-1]["deviation"]["path"] == 0
    assert rows[0]["shares"][0] == pytest.approx(1.0)
    for row in rows:
        assert sum(row["shares"]) == pytest.approx(1.0)
        assert set(row["deviation"]) == {"path", "exp", "gauss", "gamma"}


def test_one_question_is_answered_and_an_infeasible_one_named(folder, capsys):
    assert main(["budget", str(folder), "--fraction", "0.4"]) == 0
    assert "   0.400   " in capsys.readouterr().out
    assert main(["budget", str(folder), "--fraction", "0.01"]) == 1
    assert "give 0.1667 to 1" in capsys.readouterr().err
    assert main(["calibrate", "/some/bag"]) == 1
    assert "no such recording: give a rosbag2 folder" in capsys.readouterr().err


@pytest.mark.long
def test_the_benchmark_of_budgets_measures_as_many_as_it_was_asked_for(folder, tmp_path):
    episodes, budgets = 12, 3
    report = tmp_path / "report.json"
    command = ["benchmark", "budgets", "--checkpoint", str(folder), "--json", str(report)]
    command += ["--episodes", str(episodes), "--budgets", str(budgets)]
    done = subprocess.run([sys.executable, "-m", "deer_vla_ros", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(report.read_text())
    assert len(figures["rows"]) == budgets and figures["peak_violations"] == 0
    assert figures["seeds"]["held_out"] == f"500000 to {500_000 + episodes - 1}"
    for row in figures["rows"]:
        assert sum(row["exit_shares"]) == pytest.approx(1.0)
    worst = max(abs(row["relative_error"]) for row in figures["rows"])
    assert figures["worst_relative_error"] == pytest.approx(worst)
    governed = figures["worst_relative_error_shifted_governed"]
    for row in figures["rows"]:
        assert row["achieved"] == pytest.approx(row["requested"], abs=0.15), "600 steps, solved from 150"
    assert governed < 0.08
    assert governed < figures["worst_relative_error_shifted_ungoverned"]


def test_exits_taken_is_the_exit_rule():
    random = np.random.default_rng(0)
    deltas = random.uniform(0, 1, (200, 4)).astype(np.float32)
    rule = ExitRule((1, 3, 5, 7), (0.2, -1e8, 0.4, 1e8))
    for row, taken in zip(deltas, exits_taken(deltas, rule.thresholds), strict=True):
        assert taken == next((i for i in range(3) if rule.agrees(i, float(row[i]))), 3)


def test_a_search_goes_on_where_it_was_and_makes_what_it_found_the_checkpoints_own(folder, tmp_path, capsys):
    folder = shutil.copytree(folder, tmp_path / "checkpoint")
    command = [
        "search",
        "--checkpoint",
        str(folder),
        "--fraction",
        "1.0",
        "--chains",
        "1",
        "--steps",
        "6",
        "--jobs",
        "1",
    ]
    command += ["--study", str(tmp_path / "study"), "--json", str(tmp_path / "found.json"), "--trials"]
    assert main([*command, "2"]) == 0
    first, own = json.loads((tmp_path / "found.json").read_text()), load(folder).info.thresholds
    assert sorted(first["trials"]) == ["0", "1"] and first["found"]["cost"] <= 1
    assert tuple(first["thresholds"]) != own, "asked for nothing, the checkpoint stays as it was"
    assert main([*command, "3", "--default"]) == 0
    again = json.loads((tmp_path / "found.json").read_text())
    assert sorted(again["trials"]) == ["0", "1", "2"]
    assert {number: again["trials"][number] for number in first["trials"]} == first["trials"], (
        "they were not run again"
    )
    assert load(folder).info.thresholds == tuple(again["thresholds"])
    assert main([*command, "2", "--steps", "5"]) == 0
    other = json.loads((tmp_path / "found.json").read_text())
    assert sorted(other["trials"]) == ["0", "1"], "shorter instructions are another search, in the same file"
    assert "found in trial" in capsys.readouterr().out


def test_a_search_whose_first_evaluation_failed_says_so_and_goes_on(folder, tmp_path, capsys, monkeypatch):
    from deer_vla_ros.lab.scoring import evaluation_run

    real, calls = evaluation_run.evaluate, []

    def evaluate(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("the renderer died")
        return real(*arguments)

    monkeypatch.setattr(evaluation_run, "evaluate", evaluate)
    command = [
        "search",
        "--checkpoint",
        str(folder),
        "--fraction",
        "1.0",
        "--chains",
        "1",
        "--steps",
        "6",
        "--jobs",
        "1",
    ]
    assert main([*command, "--trials", "2", "--json", str(tmp_path / "found.json")]) == 0
    assert "calibration's thresholds: their evaluation failed; found in trial " in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["start"] is None
