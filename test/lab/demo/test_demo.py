"""Tests of the demo as a user runs it: its results, and that nothing is left behind, however it ends."""

import json
import os
import signal

import pytest
from deer_vla_ros.msg import PolicyStep
from harness import spawn, wait_until
from PIL import Image
from processes import children, command_of, gone

START_S = 120.0
"""The most time for the start; it is long, because torch starts slowly on a busy machine."""
CONTROLLING = "controlling"
"""The word that the policy node logs after its first step."""


def started_by_demo(out):
    """Waits until the policy controls. Returns the demo's process id, and its two processes by command."""
    log = out / "node.log"
    wait_until(lambda: log.exists() and CONTROLLING in log.read_text(), START_S, "the first step")
    (demo,) = [pid for pid in children(os.getpid()) if "demo" in command_of(pid)]
    return demo, {command_of(pid)[3]: pid for pid in children(demo)}


@pytest.fixture
def out(tmp_path):
    """A results folder with the summary of an earlier demo."""
    out = tmp_path / "demo"
    out.mkdir()
    (out / "summary.json").write_text("{}")
    return out


INSTRUCTIONS = ("turn off the led", "turn on the lamp", "turn off the led", "stand on your head")
"""Two that the embedded network does in time, one that is then done already, and one that is not a task of
the table."""


def test_a_demo_leaves_its_steps_a_summary_and_a_picture(out):
    said = [part for text in INSTRUCTIONS for part in ("--instruction", text)]
    with spawn("demo", "--seconds", "14", "--seed", "33", "--out", str(out), *said) as demo:
        status = demo.wait(START_S)
        output = demo.output()
    summary = json.loads((out / "summary.json").read_text())
    rows = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]

    assert status == (0 if summary["passed"] else 1), output
    if summary["passed"]:
        assert len(rows) >= 0.9 * 10 * summary["seconds"]
        assert summary["rate_hz"] == pytest.approx(10, abs=1)
    else:  # A busy machine may do too few steps. Then this is the only reason, and the demo tells it.
        assert len(rows) < 0.9 * 10 * summary["seconds"]
        assert summary["reason"].startswith(f"{len(rows)} steps in ")
        assert f"error: {summary['reason']}" in output
    assert len(rows) == summary["steps"]
    assert [told["instruction"] for told in summary["instructions"]] == list(INSTRUCTIONS)
    assert [told["done"] for told in summary["instructions"]] == [True, True, False, False], output
    assert summary["done"] == 2
    assert all(0 < told["steps"] <= 60 for told in summary["instructions"])
    assert "2 of 4 instructions" in output
    assert sum(summary["exits"].values()) == summary["steps"]
    assert 0 < summary["macs_fraction"] <= 1
    assert all(stage["p50"] <= stage["p95"] for stage in summary["latency_ms"].values())
    assert "NO_INSTRUCTION" not in summary["holds"]
    assert summary["lost_steps"] == 0
    assert summary["episodes"] == 4
    assert summary["first_step_s"] > 0
    assert summary["seed"] == 33
    assert summary.keys() >= {"dropped", "weights", "trained"}
    assert rows[0].keys() == PolicyStep.get_fields_and_field_types().keys()
    assert ("NOT TRAINED" in output) == (not summary["trained"])
    with Image.open(out / "cameras.png") as picture:
        assert picture.width > 1000
    assert {found.name for found in out.iterdir()} == {
        "summary.json",
        "steps.jsonl",
        "cameras.png",
        "table.log",
        "node.log",
    }


@pytest.mark.parametrize(
    ("command", "name"), [("node", "policy node"), pytest.param("sim", "table", marks=pytest.mark.long)]
)
def test_a_demo_fails_when_one_of_its_processes_is_killed_and_ends_the_other(command, name, out):
    with spawn("demo", "--seconds", "600", "--out", str(out)) as demo:
        _, started = started_by_demo(out)
        os.kill(started[command], signal.SIGKILL)
        assert demo.wait(30) == 1
        output = demo.output()
    assert f"error: the {name} ended before it was to, with signal SIGKILL" in output
    assert f"--- the end of {out}" in output
    assert set(started) == {"node", "sim"}
    assert all(gone(pid) for pid in started.values())
    assert not (out / "summary.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_an_interrupted_demo_ends_its_processes_in_order_and_leaves_no_half_summary(number, out):
    with spawn("demo", "--seconds", "600", "--out", str(out)) as demo:
        _, started = started_by_demo(out)
        assert demo.stop(number, timeout=30) == 1
        assert demo.output().endswith("interrupted\n")
    assert all(gone(pid) for pid in started.values())
    # The node has published a last hold: it was asked to end, not killed.
    assert "control is ending" in (out / "node.log").read_text()
    assert {found.name for found in out.iterdir()} == {"table.log", "node.log"}


def test_nothing_goes_on_after_a_demo_that_was_killed(out):
    with spawn("demo", "--seconds", "600", "--out", str(out)) as demo:
        pid, started = started_by_demo(out)
        os.kill(pid, signal.SIGKILL)
        demo.wait()
        try:
            for name, child in started.items():
                wait_until(lambda child=child: gone(child), 30, f"the end of {name}")
        except AssertionError:
            print(*(log.read_text() for log in sorted(out.glob("*.log"))), sep="---\n")
            raise


def test_a_checkpoint_that_is_not_there_is_named_before_anything_starts(tmp_path):
    with spawn("demo", "--model", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")) as demo:
        assert demo.wait(30) == 1
        assert "nothing: config.json is missing" in demo.output()
    assert not (tmp_path / "out").exists()
