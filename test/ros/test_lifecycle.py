"""Tests of the policy node's lifecycle over real DDS: start, transitions, end, kill, and clean-up."""

import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from harness import REACHES, START_TIMEOUT, Client, spawn, wait_until
from lifecycle_msgs.msg import State, Transition
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rig import Rig, moves
from std_srvs.srv import SetBool

LIFE = (
    Transition.TRANSITION_CONFIGURE,
    Transition.TRANSITION_ACTIVATE,
    Transition.TRANSITION_DEACTIVATE,
    Transition.TRANSITION_CLEANUP,
)


MANAGED = "managed/deer_vla"
BEFORE = {
    Transition.TRANSITION_DEACTIVATE: State.PRIMARY_STATE_ACTIVE,
    Transition.TRANSITION_CLEANUP: State.PRIMARY_STATE_INACTIVE,
}
"""The lifecycle state that each transition leaves."""


@pytest.fixture(scope="module")
def client():
    with Client("lifecycle_test") as client:
        yield client


@pytest.fixture(scope="module")
def shared(client):
    """A node that waits for a manager, and the robot that it controls."""
    rig = Rig(client, "managed/")
    with (
        spawn("node", "--ros-args", "-r", "__ns:=/managed", "-p", "autostart:=false") as process,
        rig.running(),
    ):
        yield process, rig


@pytest.fixture
def managed(client, shared):
    """The shared node, unconfigured before the test and after it."""
    process, rig = shared
    assert client.state(MANAGED) == State.PRIMARY_STATE_UNCONFIGURED
    yield process, rig
    for transition in (Transition.TRANSITION_DEACTIVATE, Transition.TRANSITION_CLEANUP):
        if client.state(MANAGED) == BEFORE[transition]:
            assert client.change_state(MANAGED, transition), process.output()


def test_without_autostart_a_manager_leads_the_node_through_its_life(client, managed):
    process, _ = managed
    told = process.output().count("]: active\n")
    for transition in (*LIFE, Transition.TRANSITION_CONFIGURE):
        assert client.change_state(MANAGED, transition), process.output()
        assert client.state(MANAGED) == REACHES[transition]
    assert process.output().count("]: active\n") == told + 1


def test_a_failing_configure_says_why_in_one_line_and_leaves_the_node_unconfigured(client):
    with spawn("node", "--ros-args", "-r", "__ns:=/failing", "-p", "model.path:=/nowhere") as process:
        wait_until(lambda: "configure failed" in process.output(), START_TIMEOUT, "the reason")
        line = next(line for line in process.output().splitlines() if "configure failed" in line)
        assert "/nowhere" in line and "config.json is missing" in line
        assert "Traceback" not in process.output()
        assert client.state("failing/deer_vla") == State.PRIMARY_STATE_UNCONFIGURED
        assert process.stop() == 0


def test_the_first_step_takes_no_more_than_twice_the_median(client, managed):
    process, rig = managed
    assert client.change_state(MANAGED, Transition.TRANSITION_CONFIGURE)
    rig.instruct("lift the red block")
    ratios = []
    while len(ratios) < 8 and min(ratios, default=9.0) > 2.0:  # Other processes may delay a first step.
        begin = len(rig.steps)
        assert client.change_state(MANAGED, Transition.TRANSITION_ACTIVATE)
        wait_until(lambda begin=begin: len(rig.steps) >= begin + 20, 20.0, "20 steps")
        per_layer = [step.total_ms / (10 + step.layers_run) for step in rig.steps[begin : begin + 20]]
        ratios.append(per_layer[0] / statistics.median(per_layer))
        assert client.change_state(MANAGED, Transition.TRANSITION_DEACTIVATE)
    assert min(ratios) <= 2.0, (ratios, process.output())


@pytest.mark.parametrize(
    ("warm_up", "times", "limit_kib"), [(5, 15, 1250), pytest.param(20, 80, 4000, marks=pytest.mark.long)]
)
def test_configuring_again_and_again_leaves_no_memory_and_no_thread_behind(
    client, managed, warm_up, times, limit_kib
):
    process, _ = managed

    def live(times: int) -> tuple[int, int]:
        """Runs LIFE `times` times. Returns the node's own memory [KiB] and its threads."""
        for _ in range(times):
            for transition in LIFE:
                assert client.change_state(MANAGED, transition), process.output()
        status = Path(f"/proc/{process.pid}/status").read_text()
        return tuple(int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("RssAnon", "Threads"))

    (before_kib, threads_before), (after_kib, threads_after) = live(warm_up), live(times)
    assert threads_after == threads_before
    # Per tensor that it gives to torch, safetensors 0.8 keeps 64 bytes (vllm-omni#7143): 34 KiB a time.
    assert after_kib - before_kib < limit_kib, f"{after_kib - before_kib} KiB in {times} configures"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_node_with_a_hold_and_status_0(client, number):
    rig = Rig(client, "ended/")
    with spawn("node", "--ros-args", "-r", "__ns:=/ended") as process, rig.running():
        rig.instruct("open the drawer")
        wait_until(lambda: any(map(moves, rig.twists)), START_TIMEOUT, "the arm to move")
        assert process.stop(number) == 0
        assert not moves(rig.twists[-1])


def test_an_arm_moved_while_the_node_was_inactive_is_not_sent_back(client, managed):
    _, rig = managed
    assert client.change_state(MANAGED, Transition.TRANSITION_CONFIGURE)
    assert client.change_state(MANAGED, Transition.TRANSITION_ACTIVATE)
    rig.instruct("open the drawer")
    rig.await_steps(3)
    begin = len(rig.twists)
    assert client.change_state(MANAGED, Transition.TRANSITION_DEACTIVATE)
    wait_until(lambda: len(rig.twists) > begin and not moves(rig.twists[-1]), what="the hold of deactivate")
    rig.instruct("")
    rig.position = rig.position + [0.0, 0.4, 0.0]
    silent, sent = len(rig.targets), rig.poses_sent
    wait_until(lambda: rig.poses_sent >= sent + 3, what="the new pose to be measured")
    assert client.change_state(MANAGED, Transition.TRANSITION_ACTIVATE)
    wait_until(lambda: len(rig.targets) >= silent + 5, what="the hold after activation")
    assert {t.pose.position.y for t in rig.targets[silent:]} == {rig.position[1]}


def test_budgets_set_before_and_between_activations_hold_and_withdrawn_ones_leave_nothing(client, managed):
    process, rig = managed

    def ask(value: float) -> bool:
        parameter = ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=value)
        request = SetParameters.Request(parameters=[Parameter(name="budget.memory_gib", value=parameter)])
        return client.call(SetParameters, f"{MANAGED}/set_parameters", request).results[0].successful

    assert not ask(-1.0), "no amount"
    assert ask(1e-6), "what is feasible only a configured node knows"
    assert not client.change_state(MANAGED, Transition.TRANSITION_CONFIGURE)
    assert "configure failed: budget.memory_gib is 1e-06" in process.output()
    assert ask(0.0)
    assert client.change_state(MANAGED, Transition.TRANSITION_CONFIGURE)
    assert ask(0.001), "a third of the layers, while inactive"
    assert client.change_state(MANAGED, Transition.TRANSITION_ACTIVATE)
    rig.instruct("open the drawer")
    rig.await_steps(5)
    assert rig.budgets[-1].resident_layers < 12
    assert ask(0.0) and process.running()


def test_a_requested_hold_outlives_a_cleanup_and_may_stand_from_the_start(client):
    rig = Rig(client, "heldup/")
    with (
        spawn("node", "--ros-args", "-r", "__ns:=/heldup", "-p", "control.start_held:=true") as process,
        rig.running(),
    ):
        client.await_active(process, "heldup/deer_vla")
        rig.instruct("open the drawer")
        wait_until(lambda: "holding: hold was requested" in process.output(), what="the hold from the start")
        for transition in (
            Transition.TRANSITION_DEACTIVATE,
            Transition.TRANSITION_CLEANUP,
            Transition.TRANSITION_CONFIGURE,
            Transition.TRANSITION_ACTIVATE,
        ):
            assert client.change_state("heldup/deer_vla", transition)
        rig.await_hold()
        assert not rig.steps
        assert client.call(SetBool, "heldup/deer_vla/hold", SetBool.Request(data=False)).success
        rig.await_steps(3)


def test_what_hangs_after_a_signal_says_where_and_ends():
    hangs = """
import time
from deer_vla_ros.ros.process import ros_process
with ros_process(None, end_within_s=0.5):
    print("up", flush=True)
    while True:
        time.sleep(0.1)
"""
    with subprocess.Popen(
        [sys.executable, "-c", hangs], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 1
        assert "line 7 in <module>" in process.stderr.read()


def test_a_node_killed_and_started_again_does_not_make_the_arm_jump(client):
    rig = Rig(client, "killed/")
    with rig.running():
        rig.instruct("lift the red block")
        for _ in range(2):
            # The arm is held until the test receives the new node's messages: one that was lost before would
            # count as a jump.
            with spawn(
                "node", "--ros-args", "-r", "__ns:=/killed", "-p", "control.start_held:=true"
            ) as process:
                begin = len(rig.targets)
                wait_until(
                    lambda begin=begin: len(rig.targets) > begin + 2, START_TIMEOUT, "the first targets"
                )
                begun = len(rig.steps)

                def moves_on(begun=begun) -> bool:
                    # On a busy machine the first node's watchdog may still be there. It is another commander,
                    # so the node wants to be asked again.
                    assert client.call(SetBool, "killed/deer_vla/hold", SetBool.Request(data=False)).success
                    time.sleep(0.5)
                    return len(rig.steps) >= begun + 10

                wait_until(moves_on, START_TIMEOUT, "ten steps")
                process.send(signal.SIGKILL)
                process.wait()
            positions = [
                [getattr(t.pose.position, axis) for axis in "xyz"] for t in rig.targets[max(begin - 1, 0) :]
            ]
            assert np.linalg.norm(np.diff(positions, axis=0), axis=1).max() <= 0.06 + 1e-6
