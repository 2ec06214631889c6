"""Tests of the client of CALVIN's simulator with a stand-in: every fault is one line, no process is left."""

import ast
import gc
import io
import os
import shlex
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stand_ins import script, stand_in_calvin

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.calvin import calvin_process, calvin_simulator
from deer_vla_ros.lab.calvin.calvin_process import CalvinInstall, CalvinProcess, SimulatorLost
from deer_vla_ros.lab.soak.part import command_of, wait_until

ROBOT, SCENE = np.linspace(-0.5, 0.5, 15), np.linspace(0, 0.5, 24)
UP = np.array([0, 0, 1.0, 0, 0, 0, 1])


@pytest.fixture(scope="module")
def install(tmp_path_factory) -> CalvinInstall:
    return stand_in_calvin(tmp_path_factory.mktemp("stand in's"))


@pytest.fixture
def started(monkeypatch):
    """The processes that the test starts. At its end none of them may be left."""
    processes = []
    popen = subprocess.Popen

    def start(*arguments, **options):
        processes.append(popen(*arguments, **options))
        return processes[-1]

    monkeypatch.setattr(calvin_process.subprocess, "Popen", start)
    yield processes
    gc.collect()
    assert [each.pid for each in processes if Path(f"/proc/{each.pid}").exists()] == []


def drive(simulator: CalvinProcess, steps: int, task: str = "open_drawer") -> list[bool]:
    """Begins, asks the task, moves up and returns whether the task was done after each step."""
    simulator.begin(ROBOT, SCENE)
    simulator.ask(task)
    found = []
    for _ in range(steps):
        simulator.send(UP)
        found.append(simulator.receive()[1])
    return found


def line_of(error: BaseException) -> str:
    text = str(error)
    assert text and "\n" not in text
    return text


# --- What it does.


def test_a_view_holds_the_state_and_an_action_changes_it(install, started):
    with CalvinProcess(install) as simulator:
        view = simulator.begin(ROBOT, SCENE)
        assert np.array_equal(view.robot_obs, ROBOT) and np.array_equal(view.scene_obs, SCENE)
        assert view.static.shape == (200, 200, 3) and view.gripper.shape == (84, 84, 3)
        assert view.static.dtype == view.gripper.dtype == np.uint8
        simulator.ask("open_drawer")
        simulator.send(UP)
        after, done = simulator.receive()
        assert not done and after.robot_obs[2] == pytest.approx(ROBOT[2] + 0.02)
        assert not np.array_equal(after.static, view.static)


def test_the_oracle_judges_the_task_asked_last(install, started):
    with CalvinProcess(install) as simulator:
        assert drive(simulator, 3) == [False, True, True]
        simulator.ask("open_drawer")
        simulator.send(UP)
        assert simulator.receive()[1] is False


def test_it_says_its_versions_and_tasks(install, started):
    with CalvinProcess(install) as simulator:
        assert simulator.about.pybullet == "stand-in" and simulator.about.numpy == np.__version__
        assert len(simulator.about.tasks) == 34 and simulator.about is simulator.about


def test_simulators_work_at_the_same_time(install, started):
    simulators = [CalvinProcess(install) for _ in range(3)]
    for number, simulator in enumerate(simulators):
        simulator.begin(ROBOT + number, SCENE)
        simulator.ask("open_drawer")
    for simulator in simulators:
        simulator.send(UP)
    heights = [simulator.receive()[0].robot_obs[2] for simulator in simulators]
    assert heights == pytest.approx([ROBOT[2] + 0.02 + number for number in range(3)])
    for simulator in simulators:
        simulator.close()


def test_calls_in_a_wrong_order_are_defects(install, started):
    with CalvinProcess(install) as simulator:
        for call in (lambda: simulator.ask("open_drawer"), lambda: simulator.send(UP), simulator.receive):
            with pytest.raises(RuntimeError):
                call()
        simulator.begin(ROBOT, SCENE)
        with pytest.raises(RuntimeError):
            simulator.send(UP)
        simulator.ask("open_drawer")
        simulator.send(UP)
        for call in (lambda: simulator.send(UP), lambda: simulator.begin(ROBOT, SCENE)):
            with pytest.raises(RuntimeError):
                call()
        assert simulator.receive()[1] is False
    with pytest.raises(RuntimeError):
        simulator.begin(ROBOT, SCENE)


# --- What it refuses.


@pytest.mark.parametrize(
    "place, value, words",
    [(0, np.nan, "nan"), (5, -1.001, "-1.001"), (2, np.inf, "inf"), (6, 0.0, "-1 or 1"), (6, np.nan, "nan")],
)
def test_an_action_outside_the_limits_is_refused_before_it_is_sent(install, started, place, value, words):
    with CalvinProcess(install) as simulator:
        simulator.begin(ROBOT, SCENE)
        simulator.ask("open_drawer")
        with pytest.raises(UserError) as caught:
            simulator.send(np.where(np.arange(7) == place, value, UP))
        assert words in line_of(caught.value) and "1" in str(caught.value)
        simulator.send(UP)  # The simulator heard nothing of the other action.
        assert simulator.receive()[0].robot_obs[2] == pytest.approx(ROBOT[2] + 0.02)


def test_an_unknown_task_is_refused_and_the_last_one_stays(install, started):
    with CalvinProcess(install) as simulator:
        drive(simulator, 1)
        with pytest.raises(UserError, match="'fly'.*open_drawer"):
            simulator.ask("fly")
        simulator.send(UP)
        assert simulator.receive()[1] is True


@pytest.mark.parametrize("state", [(ROBOT[:14], SCENE), (ROBOT, SCENE * np.nan)])
def test_a_state_of_wrong_numbers_is_a_defect(install, started, state):
    with CalvinProcess(install) as simulator, pytest.raises(ValueError):
        simulator.begin(*state)


# --- What goes wrong in the process.


@pytest.mark.parametrize(
    "fault, words",
    [
        ("crash:2", "exit code 3: the arm fell off"),
        ("garbage:2", "no message"),
        ("shape:2", "other types or shapes"),
        ("garbage_start", "no message"),
    ],
)
def test_a_process_that_is_lost_is_one_line(install, started, monkeypatch, fault, words):
    monkeypatch.setenv("STAND_IN_FAULT", fault)
    simulator = CalvinProcess(install)
    with pytest.raises(SimulatorLost) as caught:
        drive(simulator, 5)
    assert words in line_of(caught.value)
    with pytest.raises(RuntimeError):
        simulator.begin(ROBOT, SCENE)


def test_a_python_that_cannot_be_run_is_one_line(install):
    with pytest.raises(UserError, match="'/no/such/python' cannot be run"):
        CalvinProcess(replace(install, python="/no/such/python"))


@pytest.mark.parametrize(
    "number, words",
    [
        (signal.SIGKILL, "signal SIGKILL, as when memory runs out: use fewer --lanes"),
        (signal.SIGSEGV, "signal SIGSEGV: it printed nothing on stderr"),
        (35, "signal 35: it printed nothing on stderr"),  # a real-time signal, which has no name
    ],
)
def test_a_killed_process_names_the_signal_and_no_old_warning(install, started, monkeypatch, number, words):
    monkeypatch.setenv("STAND_IN_FAULT", "warning")
    simulator = CalvinProcess(install)
    simulator.begin(ROBOT, SCENE)
    os.kill(started[0].pid, number)
    with pytest.raises(SimulatorLost) as caught:
        simulator.ask("open_drawer")
    assert line_of(caught.value) == f"the CALVIN simulator ended with {words}"


def test_a_script_that_tells_of_a_killed_simulator(install, started, tmp_path):
    telling = script(tmp_path, "exit 137")
    with pytest.raises(SimulatorLost, match="exit code 137, as when memory runs out: use fewer --lanes"):
        print(CalvinProcess(replace(install, python=telling)).about)


def test_more_simulators_than_files_may_be_open(install):
    code = f"""
import resource
from pathlib import Path
from deer_vla_ros.lab.calvin.calvin_process import CalvinInstall, CalvinProcess
install = CalvinInstall(Path({str(install.root)!r}), {install.python!r})
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
simulators = [CalvinProcess(install) for _ in range(40)]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "may open only 40 files: use fewer --lanes" in done.stderr.splitlines()[-1]


def test_what_a_script_prints_before_the_simulator_speaks_is_no_message(install, started, tmp_path):
    noisy = script(tmp_path, f'echo Activating env; exec {shlex.quote(install.python)} "$@"')
    with CalvinProcess(replace(install, python=noisy)) as simulator:
        assert drive(simulator, 2) == [False, True]


def test_a_program_that_only_prints_is_no_simulator(install, started, tmp_path):
    printing = script(tmp_path, "exec yes")
    with pytest.raises(SimulatorLost, match="over 65536 bytes before its first message"):
        print(CalvinProcess(replace(install, python=printing)).about)


@pytest.mark.parametrize("fault", ["hang:1", "hung_start"])
def test_a_process_that_hangs_is_killed_in_time(install, started, monkeypatch, fault):
    monkeypatch.setenv("STAND_IN_FAULT", fault)
    is_start = fault == "hung_start"
    simulator = CalvinProcess(install, start_s=0.5 if is_start else 60.0, answer_s=60.0 if is_start else 0.5)
    begin = time.monotonic()
    with pytest.raises(SimulatorLost, match="did not answer within 0.5 s and was killed"):
        drive(simulator, 1)
    assert time.monotonic() - begin < 50


def test_another_version_of_the_protocol_is_refused_with_both_versions(install, started, monkeypatch):
    monkeypatch.setenv("STAND_IN_FAULT", "version")
    with pytest.raises(UserError, match="version 99 .* version 1:"):
        print(CalvinProcess(install).about)


def test_a_simulator_that_cannot_start_says_why(install, started, monkeypatch):
    monkeypatch.setenv("STAND_IN_FAULT", "no_start")
    with pytest.raises(UserError, match="failed: ModuleNotFoundError: No module named 'pybullet'"):
        print(CalvinProcess(install).about)


def test_an_error_of_the_simulator_is_one_line_and_the_next_episode_works(install, started, monkeypatch):
    monkeypatch.setenv("STAND_IN_FAULT", "error:2")
    with CalvinProcess(install) as simulator:
        with pytest.raises(UserError, match="KeyError") as caught:
            drive(simulator, 5)
        assert not isinstance(caught.value, SimulatorLost) and line_of(caught.value)
        with pytest.raises(RuntimeError):
            simulator.send(UP)
        assert drive(simulator, 2) == [False, True]


def test_a_fault_that_is_to_happen_once_leaves_the_next_process_alone(
    install, started, monkeypatch, tmp_path
):
    monkeypatch.setenv("STAND_IN_FAULT", "crash:1")
    monkeypatch.setenv("STAND_IN_FAULT_ONCE", str(tmp_path / "happened"))
    with pytest.raises(SimulatorLost):
        drive(CalvinProcess(install), 1)
    with CalvinProcess(install) as simulator:
        assert drive(simulator, 2) == [False, True]


def test_what_the_simulator_prints_blocks_nothing_and_is_no_message(install, started, monkeypatch):
    monkeypatch.setenv("STAND_IN_FAULT", "loud")
    with CalvinProcess(install) as simulator:
        assert drive(simulator, 2) == [False, True]


# --- No process is left.


def test_a_process_that_nobody_closes_ends(install, started):
    simulator = CalvinProcess(install)
    assert simulator.about.tasks
    del simulator  # The fixture looks for what is left.


def test_a_killed_parent_leaves_no_simulator(install):
    code = f"""
import os, signal, time
from pathlib import Path
import numpy as np
from deer_vla_ros.lab.calvin.calvin_process import CalvinInstall, CalvinProcess
install = CalvinInstall(Path({str(install.root)!r}), {install.python!r})
starting, waiting, hanging, stopped = [CalvinProcess(install) for _ in range(4)]
for each in (waiting, hanging, stopped):
    each.begin(np.zeros(15), np.zeros(24))
hanging.ask("open_drawer")
hanging.send(np.ones(7))
os.kill(stopped._popen.pid, signal.SIGSTOP)
print(*(each._popen.pid for each in (starting, waiting, hanging, stopped)), flush=True)
time.sleep(600)
"""
    environment = {**os.environ, "STAND_IN_FAULT": "hang:1"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as parent:
        simulators = list(map(int, parent.stdout.readline().split()))
        assert len(simulators) == 4
        parent.kill()
    assert wait_until(lambda: not any(command_of(pid) for pid in simulators), 60)


def test_ctrl_c_does_not_reach_the_simulator(install, started):
    with CalvinProcess(install) as simulator:
        drive(simulator, 1)
        started[0].send_signal(signal.SIGINT)
        assert drive(simulator, 2) == [False, True]


# --- The protocol.


def test_the_program_is_valid_in_python_3_8():
    ast.parse(Path(calvin_simulator.__file__).read_text(), feature_version=(3, 8))


@pytest.mark.parametrize(
    "header, words",
    [
        (b"x" * 65537, "header of 65537 bytes"),
        (b"[]", "cannot be read"),
        (b"{}", "cannot be read"),
        (b'{"arrays": {"a": ["object", [2]]}}', "cannot be read"),
        (b'{"arrays": {"a": ["uint8", [-1]]}}', "cannot be read"),
        (b'{"arrays": {"a": ["uint8", [1, 1, 1, 1, 1]]}}', "cannot be read"),
        (b'{"arrays": {"a": ["uint8", [9999, 9999]]}}', "arrays of 99980001 bytes"),
        (b"[" * 60000, "cannot be read"),
    ],
)
def test_a_message_that_is_none_is_refused_before_its_arrays_are_read(header, words):
    stream = io.BytesIO(struct.pack(">I", len(header)) + header)
    with pytest.raises(calvin_simulator.NotAMessage, match=words):
        calvin_simulator.decode(stream.read)
