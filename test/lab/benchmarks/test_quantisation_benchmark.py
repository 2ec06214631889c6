"""Tests of the comparison of number types: what it measures, and that scores and calibrations use them."""

import json

import torch
from small_model import observations

from deer_vla_ros.__main__ import main
from deer_vla_ros.budget.calibration import Episode
from deer_vla_ros.lab.benchmarks import quantisation_benchmark
from deer_vla_ros.lab.scoring import evaluation_run
from deer_vla_ros.model.checkpoint import EMBEDDED
from deer_vla_ros.model.config import tabletop
from deer_vla_ros.model.network import layer_bytes


def test_fewer_bits_take_fewer_bytes_and_move_decisions_more():
    episodes = [
        Episode("lift the red block", observations(8)),
        Episode("open the drawer", observations(4, 1)),
    ]
    types = ("float32", "int8", "int4", "float32")
    whole, eight, four, again = quantisation_benchmark.measure(EMBEDDED, "cpu", episodes, types)
    for row, bits in ((whole, None), (eight, 8), (four, 4)):
        assert row["layers_bytes"] == sum(layer_bytes(tabletop(), torch.float32, bits))
        assert row["steps"] == 12 and 0 < row["language_ms"] < row["step_ms"]
    for row in (whole, again):
        assert row["pose_deviation_max"] == row["delta_deviation_p95"] == 0
        assert row["exit_agreement"] == row["gripper_agreement"] == 1
    assert 0 < eight["pose_deviation_mean"] < four["pose_deviation_mean"] < 0.2
    assert 0 < eight["delta_deviation_median"] < four["delta_deviation_median"]
    assert "int4" in quantisation_benchmark.text([whole, four])[2]


def test_an_evaluation_uses_the_number_type_and_its_report_names_it(tmp_path, monkeypatch):
    used, load_as, path = [], evaluation_run.load_as, tmp_path / "report.json"
    monkeypatch.setattr(evaluation_run, "load_as", lambda *asked: used.append(asked[0]) or load_as(*asked))
    arguments = ["--chains", "1", "--steps", "1", "--jobs", "1", "--dtype", "int8", "--json", str(path)]
    assert main(["evaluate", *arguments]) == 0
    assert used == ["int8"] and json.loads(path.read_text())["dtype"] == "int8"


def test_a_benchmark_of_random_weights_in_few_bits_names_them(tmp_path):
    path = tmp_path / "report.json"
    arguments = ["--preset", "tabletop", "--layers", "4", "--random-weights", "--minutes", "0.02"]
    assert main(["benchmark", "model", *arguments, "--dtype", "int8", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["layers_bits"] == 8 and report["layers_bytes"] < report["weight_bytes"]
    assert any("no quantised weights" in each for each in report["skipped"])
