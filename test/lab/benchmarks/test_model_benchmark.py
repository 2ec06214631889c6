"""Tests of the benchmark of the network: the plain way decides alike, counts are true, the time is kept."""

import itertools
import json
import math
import re
import runpy

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image
from small_model import INSTRUCTION, SMALL, observations, small_model, small_tokenizer

from deer_vla_ros.__main__ import main
from deer_vla_ros.budget.cost import cost_table
from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.lab.benchmarks import model_benchmark, step_counts
from deer_vla_ros.lab.benchmarks.model_benchmark import FEWEST_STEPS, Subject
from deer_vla_ros.lab.benchmarks.plain_policy import PlainPolicy
from deer_vla_ros.lab.benchmarks.roofline import Rates, StepWork, at_depth, mean_layers
from deer_vla_ros.lab.benchmarks.step_counts import ProfileEvent, counted, from_profile
from deer_vla_ros.model.checkpoint import EMBEDDED, load
from deer_vla_ros.model.config import openflamingo_3b, openflamingo_9b, tabletop

CPU = torch.device("cpu")
ROUNDING = 1e-5
KEYS = (
    "whole_step_ratio",
    "language_ratio",
    "roofline_share",
    "host_waits",
    "idle_share",
    "peak_memory_ratio",
    "rows",
    "skipped",
    "device",
    "dtype",
    "threads",
    "torch",
    "date",
    "network",
    "minutes",
)


def small_subject(dtype=torch.float32) -> Subject:
    return Subject(small_model().to(dtype), small_tokenizer(), "l2", "small")


def embedded_subject() -> Subject:
    checkpoint = load(EMBEDDED)
    return Subject(checkpoint.model, checkpoint.tokenizer, checkpoint.info.delta, "embedded")


def at_median_delta(subject: Subject) -> ExitRule:
    """A rule under which steps stop at different exits."""
    exits = subject.model.config.exits
    policy = DeerPolicy(subject.model, subject.tokenizer, ExitRule(exits, (-1.0,) * len(exits)))
    policy.reset(INSTRUCTION)
    deltas = [policy.step(each).deltas for each in observations(8, seed=1)]
    return ExitRule(exits, tuple(np.median(deltas, 0).tolist()))


@pytest.mark.parametrize("make", [small_subject, embedded_subject])
def test_the_plain_way_decides_as_the_policy_does(make):
    subject = make()
    rule = at_median_delta(subject)
    policy = DeerPolicy(subject.model, subject.tokenizer, rule)
    plain = PlainPolicy(subject.model, subject.tokenizer, rule)
    depths = set()
    for each in (policy, plain):
        each.reset(INSTRUCTION)
    for observation in observations(10):
        ours, theirs = policy.step(observation), plain.step(observation)
        assert ours.layers_run == theirs.layers_run
        assert ours.action.pose == pytest.approx(theirs.action.pose, abs=ROUNDING)
        assert ours.action.gripper_probability == pytest.approx(
            theirs.action.gripper_probability, abs=ROUNDING
        )
        depths.add(ours.layers_run)
    assert len(depths) > 1, "the thresholds made no difference"


@pytest.mark.parametrize("make", [small_subject, embedded_subject])
def test_the_plain_way_at_full_depth_decides_as_the_static_row_does(make):
    subject = make()
    last = subject.model.config.exits[-1]
    policy = DeerPolicy(
        subject.model,
        subject.tokenizer,
        ExitRule((last,), (-1.0,), steps_per_stage=model_benchmark.ONLY_ONCE),
    )
    plain = PlainPolicy(subject.model, subject.tokenizer, None)
    for each in (policy, plain):
        each.reset(INSTRUCTION)
    for number, observation in enumerate(observations(4)):
        ours, theirs = policy.step(observation), plain.step(observation)
        assert ours.head_probes == (1 if number else 2)
        assert theirs.layers_run == last + 1
        assert ours.action.pose == pytest.approx(theirs.action.pose, abs=ROUNDING)


def test_autocast_keeps_the_action_of_the_plain_way_nearly():
    subject, (observation,) = small_subject(), observations(1)
    exact, rounded = (
        PlainPolicy(subject.model, subject.tokenizer, None, autocast) for autocast in (None, torch.bfloat16)
    )
    for each in (exact, rounded):
        each.reset(INSTRUCTION)
    poses = [each.step(observation).action.pose for each in (exact, rounded)]
    assert 0 < np.abs(poses[0] - poses[1]).max() < 0.1


def test_the_plain_way_refuses_weights_that_are_not_float32():
    subject = small_subject(torch.float16)
    with pytest.raises(UserError, match="torch.float16.*float32"):
        PlainPolicy(subject.model, subject.tokenizer, None)


@pytest.mark.parametrize("count", [1, 3])
def test_the_counted_waits_are_the_values_that_were_read(count):
    subject, (observation,) = small_subject(), observations(1)
    exits = SMALL.exits[:count]
    rule = ExitRule(exits, (-1.0,) * count)
    # The policy reads once per exit. The plain way also reads the pose and the gripper's probability.
    for each, reads in (
        (DeerPolicy(subject.model, subject.tokenizer, rule), count),
        (PlainPolicy(subject.model, subject.tokenizer, rule), count + 2),
    ):
        each.reset(INSTRUCTION)
        each.step(observation)
        counts = counted(CPU, lambda each=each: each.step(observation))
        assert counts.host_waits == counts.reads == reads
        assert counts.launches > 10 * count and counts.busy_ms is None


def test_operators_are_counted_by_what_they_are_made_of():
    weight, x = torch.ones(3, 3), torch.ones(2, 3)
    counts = counted(CPU, lambda: (torch.nn.functional.linear(x, weight) + 1).sum().item())
    assert counts.host_waits == 1
    assert counts.launches == 5, "a transposition, a product, a sum of both, a total, a read"


def test_a_profile_of_a_gpu_is_counted_within_the_last_step():
    """The profile is made up: this machine need not have a GPU."""
    first = [ProfileEvent(step_counts.STEP, False, 0, 90), ProfileEvent("cudaLaunchKernel", False, 1, 2)]
    host = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cudaGraphLaunch", "cuLaunchKernelEx", "cudaMalloc"]
    host += ["cudaMemcpyAsync", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaEventRecord"]
    second = [ProfileEvent(step_counts.STEP, False, 100, 900), ProfileEvent(step_counts.STEP, True, 105, 800)]
    second += [ProfileEvent(name, False, 110 + i, 111 + i) for i, name in enumerate(host)]
    second += [
        ProfileEvent("gemm", True, 200, 300),
        ProfileEvent("gemm", True, 250, 350),
        ProfileEvent("Memcpy DtoH (Device -> Pinned)", True, 400, 410),
        ProfileEvent("Memcpy HtoD (Pageable -> Device)", True, 410, 420),
    ]
    after = [ProfileEvent("cudaDeviceSynchronize", False, 901, 950)]
    counts = from_profile([*second, *first, *after])
    assert (counts.launches, counts.host_waits, counts.reads) == (4, 2, 1)
    assert counts.busy_ms == pytest.approx(0.170)


def test_torchs_profiler_gives_the_events_that_are_counted():
    events = step_counts._profile(CPU, lambda: torch.ones(3).sum())
    assert [event.name for event in events].count(step_counts.STEP) == 2
    inside = [event for event in events if event.name == "aten::sum"]
    assert len(inside) == 2 and not any(event.on_device for event in inside)
    assert from_profile(events) == step_counts.StepCounts(0, 0, 0, 0.0)


@pytest.fixture
def ticking(monkeypatch):
    """Each look at the clock of a run takes four seconds, so that a run does not depend on the machine."""
    ticks = itertools.count(0, 4)
    monkeypatch.setattr(model_benchmark.time, "monotonic", lambda: float(next(ticks)))
    monkeypatch.setattr(model_benchmark, "measured_rates", lambda device, dtype: Rates(1e10, 1e10))


def test_a_run_measures_every_row_within_its_minutes(ticking):
    told = []
    report = model_benchmark.measure(
        lambda device, dtype: small_subject(dtype),
        CPU,
        torch.float32,
        20,
        lambda what, share: told.append((what, share)),
    )
    assert set(KEYS) <= set(report) and not report["skipped"]
    rows = report["rows"]
    assert [(row["kind"], row["layers"]) for row in rows] == [
        ("exit", 2), ("exit", 4), ("exit", 6), ("static", 6), ("plain", 6),
    ]  # fmt: skip
    assert [row["host_waits"] for row in rows] == [1, 2, 3, 1, 2]
    assert all(row["steps"] >= FEWEST_STEPS for row in rows)
    for row in rows:
        step = row["ms"]["step"]
        assert 0 < step["p50"] <= step["p95"]
        share = sum(row["bound_ms"].values()) / step["p50"]
        assert row["roofline_share"] == pytest.approx(share, rel=0.2, abs=0.001)  # it has three digits
    mean, static, plain = rows[0], rows[-2], rows[-1]  # 6 / 5.2 layers is above the first exit
    assert report["whole_step_ratio"] == pytest.approx(
        plain["ms"]["step"]["p50"] / mean["ms"]["step"]["p50"], rel=0.01
    )
    assert report["language_ratio_to_own_static"] == pytest.approx(
        static["ms"]["language"]["p50"] / mean["ms"]["language"]["p50"], rel=0.05
    )
    assert report["host_waits"] == mean["host_waits"] and report["idle_share"] is None
    assert report["measured_minutes"] <= 20 + 1
    shares = [share for _, share in told]
    assert shares == sorted(shares) and shares[-1] <= 1 and told[0][0] == "making the network"


def test_every_static_step_runs_all_layers(ticking, monkeypatch):
    reached, step = [], DeerPolicy.step

    def noted(policy: DeerPolicy, observation):
        done = step(policy, observation)
        if policy.rule.steps_per_stage > 1:
            reached.append(done.layers_run)
        return done

    monkeypatch.setattr(DeerPolicy, "step", noted)
    model_benchmark.measure(lambda device, dtype: small_subject(dtype), CPU, torch.float32, 20)
    assert len(reached) > FEWEST_STEPS and set(reached) == {6}


def test_without_time_only_the_static_row_is_measured_and_the_others_are_named(ticking):
    report = model_benchmark.measure(lambda device, dtype: small_subject(dtype), CPU, torch.float32, 0.01)
    (row,) = report["rows"]
    assert row["kind"] == "static" and row["steps"] == FEWEST_STEPS
    assert sorted(each.partition(":")[0] for each in report["skipped"]) == [
        "exit after 2 layers",
        "exit after 4 layers",
        "exit after 6 layers",
        "the plain way, static, all 6 layers",
    ]
    assert report["whole_step_ratio"] is None and report["roofline_share"] is None
    assert "not measured" in model_benchmark.text(report)[-1]


def test_a_half_network_is_compared_with_its_float32_weights_if_they_fit(ticking, monkeypatch):
    def run():
        return model_benchmark.measure(lambda device, dtype: small_subject(dtype), CPU, torch.bfloat16, 10)

    report = run()
    assert report["dtype"] == "bfloat16" and report["rows"][-1]["kind"] == "plain"
    monkeypatch.setattr(model_benchmark, "free_bytes", lambda device: 1000)
    report = run()
    assert [each for each in report["skipped"] if "float32 weights need" in each]
    assert report["whole_step_ratio"] is None and report["whole_step_ratio_to_own_static"] is not None


def test_a_network_with_random_weights_decides_finite_actions_in_every_number_type():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        subject = model_benchmark.random_subject("tabletop", 24, CPU, dtype)
        assert subject.model.dtype == dtype and len(subject.model.layers) == 24
        policy = DeerPolicy(
            subject.model, subject.tokenizer, ExitRule(subject.model.config.exits[-1:], (-1.0,))
        )
        policy.reset(INSTRUCTION)
        pose = policy.step(observations(1)[0]).action.pose
        assert np.isfinite(pose).all() and 0 < np.abs(pose).max() < 1


def test_the_mean_depth_is_the_papers_and_a_figure_there_lies_between_two_exits():
    assert mean_layers(openflamingo_3b(24)) == mean_layers(openflamingo_3b(12)) == pytest.approx(24 / 5.2)
    assert mean_layers(openflamingo_9b()) == pytest.approx(32 / 5.2)
    assert mean_layers(tabletop()) == pytest.approx(12 / 5.2)
    assert at_depth(4.5, {6: 30.0, 4: 10.0, 2: 5.0}) == pytest.approx(15.0)
    assert at_depth(1.0, {4: 10.0, 2: 5.0}) == 5.0
    assert at_depth(6.0, {4: 10.0, 2: 5.0}) is None and at_depth(6.0, {}) is None


def test_the_roofline_is_the_slower_of_reading_and_computing():
    rates = Rates(bytes_per_s=1e9, macs_per_s=1e12)
    assert rates.bound_ms(weight_bytes=2e6, gmac=1) == pytest.approx(2.0)
    assert rates.bound_ms(weight_bytes=2e6, gmac=10) == pytest.approx(10.0)


def test_a_step_at_full_depth_reads_every_tensor_that_is_not_encoded_once():
    sizes = {name: tensor.nbytes for name, tensor in small_model().state_dict().items()}
    work = StepWork(cost_table(SMALL, 6), sizes)
    read = work.weight_bytes(SMALL.decoder.layers, 1)
    unread = ("token_embedding", "last_head", "auxiliary_heads")
    assert sum(read.values()) == sum(size for name, size in sizes.items() if not name.startswith(unread))
    shallow = work.weight_bytes(2, 1)
    assert shallow["vision"] == read["vision"] and shallow["language"] * 3 == read["language"]
    twice = work.weight_bytes(2, 2)["head"]
    state = sum(
        size for name, size in sizes.items() if name.startswith("shared_head.") and "weight_hh" in name
    )
    assert twice == 2 * shallow["head"] - state
    assert work.gmac(2, 3)["head"] == pytest.approx(3 * cost_table(SMALL, 6).head)


def test_the_command_writes_report_and_plot(tmp_path, capsys):
    arguments = ["--preset", "tabletop", "--random-weights", "--layers", "4", "--minutes", "0.05"]
    files = tmp_path / "a" / "report.json", tmp_path / "b" / "plot.png"
    assert main(["benchmark", "model", *arguments, "--json", str(files[0]), "--plot", str(files[1])]) == 0
    report = json.loads(files[0].read_text())
    assert {*KEYS, "command"} <= set(report)
    assert report["network"] == "tabletop, 4 layers, random weights" and report["dtype"] == "float32"
    named = {row["name"] for row in report["rows"]} | {each.partition(":")[0] for each in report["skipped"]}
    assert len(named) == 4 and "static, all 4 layers" in named
    assert 0 < report["rates"]["bytes_per_s"] < math.inf
    with Image.open(files[1]) as picture:
        assert picture.width > 500
    assert "the plain way" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "openflamingo_4b", "--random-weights"), "openflamingo_4b.*openflamingo_3b"),
        (("--preset", "tabletop"), "--random-weights"),
        (("--random-weights", "--checkpoint", "somewhere"), "one of them"),
        (("--preset", "tabletop", "--random-weights", "--layers", "1"), "decoder.layers is 1"),
        (("--checkpoint", "/nowhere"), "/nowhere"),
        (("--device", "cuda"), "cuda.*no GPU"),
    ],
)
def test_a_wrong_argument_is_named_with_the_remedy(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["benchmark", "model", *arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error), error


def test_a_network_that_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(model_benchmark, "free_bytes", lambda device: 4 * 2**30)
    with pytest.raises(UserError, match="9.7 GiB.*4.0 GiB are free.*--layers"):
        model_benchmark.random_subject("openflamingo_3b", None, CPU, torch.float32)


def test_the_predictions_are_marked_and_follow_from_the_published_rates(capsys):
    script = runpy.run_path(str(ROOT / "scripts" / "predict_speed.py"))
    rows = {row["gpu"]: row for row in script["predictions"]("openflamingo_3b")}
    assert len(rows) == 4
    for row in rows.values():
        assert 1 < row["whole_step_ratio"] < row["language_ratio"]
        assert row["vision_share_static"] < row["vision_share_mean"] < 1
    layers_bytes = 24 * (50.3e6 + 36.7e6) * 2
    assert rows["H100 SXM"]["static_ms"] * (1 - rows["H100 SXM"]["vision_share_static"]) == pytest.approx(
        (layers_bytes + 40.9e6 * 2) / 3.35e9, rel=0.01
    )
    script["main"]()
    assert capsys.readouterr().out.startswith("PREDICTIONS")
