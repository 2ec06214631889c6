"""Tests of the soak command as a process: two minutes of all faults, bad arguments, an interrupted run."""

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import wait_until

SOAK = (sys.executable, "-m", "deer_vla_ros", "soak")


def soak(*arguments, timeout=60.0):
    return subprocess.run([*SOAK, *arguments], capture_output=True, text=True, timeout=timeout)


def marked(mark):
    """The processes whose environment has `mark`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.name) != os.getpid() and mark.encode() in (folder / "environ").read_bytes():
                found.append(folder.name)
        except OSError:
            continue
    return found


@pytest.mark.parametrize("arguments", [("--minutes", "0"), ("--minutes", "nan"), ("--robot", "real")])
def test_bad_arguments_are_refused_with_status_2(arguments):
    assert soak(*arguments).returncode == 2


def test_an_unknown_fault_is_refused_in_one_line(tmp_path):
    result = soak("--faults", "nonsense", "--out", str(tmp_path))
    assert result.returncode == 1
    assert (
        result.stderr.startswith("error: soak: no fault is called nonsense")
        and result.stderr.count("\n") == 1
    )


BUSY = 1.5
"""The machine was busy if this thread waited this many times longer than necessary for its processor time."""
PROBE_S = 0.05


@pytest.fixture
def delays():
    """How many times longer than PROBE_S this much processor time takes, measured every two seconds."""
    found, over = [], threading.Event()

    def probe():
        while not over.wait(2.0):
            began, used = time.perf_counter(), time.thread_time()
            while time.thread_time() - used < PROBE_S:
                pass
            found.append((time.perf_counter() - began) / PROBE_S)

    thread = threading.Thread(target=probe)
    thread.start()
    yield found
    over.set()
    thread.join()


@pytest.mark.soak
def test_two_minutes_of_faults(tmp_path, delays):
    """Checks all goals. Those of time count only if the machine was not busy: then the node is late, too."""
    report = tmp_path / "soak.json"
    arguments = "--minutes 2 --seed 1 --faults all --json".split()
    result = soak(*arguments, str(report), "--out", str(tmp_path), timeout=400.0)
    figures, told = json.loads(report.read_text()), result.stdout + result.stderr
    assert figures["commands"] > 500
    assert figures["commands_outside_limits"] == 0, figures["violations"]
    assert figures["stale_commands"] == 0, figures["violations"]
    assert figures["unhandled_exceptions"] == 0, told
    if statistics.median(delays) < BUSY:
        assert figures["longest_silence_s"] <= 1.0, figures["violations"]
        assert figures["broken_promises"] == 0, told
        is_slow = figures["longest_silence_s"] > 0.5 or figures["time_to_recover_p95"] > 3.0
        assert result.returncode == 0 or is_slow, told
    assert figures["recoveries"]["seen"] == figures["recoveries"]["expected"] > 15
    assert figures["memory_growth_percent_per_hour"] is None and figures["memory_reason"]
    assert not figures["left_behind"]


@pytest.mark.long  # It starts five processes. The test of the demo interrupts two in every run.
def test_ctrl_c_ends_every_process_and_leaves_the_report_so_far(tmp_path):
    report, mark = tmp_path / "soak.json", f"SOAK_TEST={tmp_path}"
    arguments = ("--minutes", "5", "--faults", "pose_nan", "--json", str(report), "--out", str(tmp_path))
    with subprocess.Popen(
        [*SOAK, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | dict([mark.split("=", 1)]),
        # A shell that runs the tests in the background may have set this signal to be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert "pose_nan" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(60.0) == 1
    wait_until(lambda: not marked(mark), 10.0, "the end of all processes")
    figures = json.loads(report.read_text())
    assert figures["interrupted"] and figures["faults"]["pose_nan"] >= 1
