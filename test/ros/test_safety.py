"""Tests of safety over real DDS: a node that is stopped, killed, hung, doubled or not received."""

from __future__ import annotations

import os
import re
import signal
import time

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import TwistStamped
from harness import START_TIMEOUT, Client, spawn, spawn_python, wait_until
from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState
from paths import ROOT
from processes import children, command_of, gone
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.qos import QoSProfile
from rclpy.time import Time
from rig import Rig, moves
from rosgraph_msgs.msg import Clock
from std_msgs.msg import Bool, String
from std_srvs.srv import SetBool, Trigger

from deer_vla_ros.ros.messages import nanoseconds
from deer_vla_ros.ros.watchdog import Beat, WatchdogSettings
from deer_vla_ros.ros.watchdog_client import WatchdogClient

MAX_AGE_NS = 300_000_000


@pytest.fixture(scope="module")
def client():
    with Client("safety_test") as client:
        yield client


@pytest.fixture(scope="module")
def diagnostics(client):
    return client.listen(DiagnosticArray, "/diagnostics")


def node(namespace: str, *parameters: str):
    given = [word for parameter in parameters for word in ("-p", parameter)]
    return spawn("node", "--ros-args", "-r", f"__ns:=/{namespace}", *given)


def faulty_node(namespace: str, code: str):
    """A node in whose process `code` runs first."""
    start = "import sys\nfrom deer_vla_ros.__main__ import main\nsys.exit(main(['node', *sys.argv[1:]]))"
    arguments = ("--ros-args", "-r", f"__ns:=/{namespace}")
    return spawn_python("-c", f"{code}\n{start}", *arguments, fresh=False)


def watchdog_of(process) -> int:
    (pid,) = wait_until(
        lambda: [pid for pid in children(process.pid) if "deer_vla_ros.ros.watchdog" in command_of(pid)],
        what="a watchdog",
    )
    return pid


def clear(client: Client, namespace: str) -> None:
    assert client.call(SetBool, f"{namespace}/deer_vla/hold", SetBool.Request(data=False)).success


def holding(process) -> str:
    """The newest log line about a hold."""
    return process.output().rpartition("holding: ")[2]


def is_controlling(process) -> bool:
    """Whether control is the newest state in the log, and not a hold."""
    told = process.output()
    return told.rfind("controlling") > told.rfind("holding: ")


def await_moving(client: Client, process, rig: Rig, namespace: str, words: str = "open the drawer") -> None:
    client.await_active(process, f"{namespace}/deer_vla")
    rig.instruct(words)
    begin = len(rig.twists)
    wait_until(lambda: sum(map(moves, rig.twists[begin:])) >= 5, START_TIMEOUT, "five motions")


# --- The process is stopped, killed or hangs.

SLOW = """
import time
from deer_vla_ros.budget.budgeted_policy import BudgetedPolicy
from deer_vla_ros.ros.outputs import Outputs
step, publish = BudgetedPolicy.step, Outputs.publish
def slow_step(self, observation):
    time.sleep(0.15)
    return step(self, observation)
def slow_publish(self, command, frame_id):
    time.sleep(0.2)
    publish(self, command, frame_id)
BudgetedPolicy.step, Outputs.publish = slow_step, slow_publish
"""


def test_the_watchdog_does_not_hold_while_a_motion_that_is_still_young_leaves_slowly(client):
    """The time from one command to the next is too long for the watchdog here. The node beats in between,
    when it looks at the motion for the last time."""
    rig = Rig(client, "slowly/")
    with faulty_node("slowly", SLOW) as process, rig.running():
        await_moving(client, process, rig, "slowly")
        told, begin = process.output().count("holding: "), len(rig.twists)
        wait_until(lambda: len(rig.twists) >= begin + 15, what="commands")
        heard = rig.twists[begin : begin + 15]
        if process.output().count("holding: ") == told:  # a node that held itself, on a busy machine, says so
            assert all(map(moves, heard)), "somebody else held"


def test_a_killed_node_leaves_a_hold_behind_and_no_process(client):
    rig = Rig(client, "killed_once/")
    with node("killed_once") as process, rig.running():
        await_moving(client, process, rig, "killed_once")
        watchdog = watchdog_of(process)
        process.send(signal.SIGKILL)
        process.wait()
        begin = len(rig.twists)
        wait_until(
            lambda: len(rig.twists) >= begin + 5 and not any(map(moves, rig.twists[-4:])),
            what="holds of a dead node",
        )
        assert (
            np.linalg.norm([getattr(rig.targets[-1].pose.position, a) for a in "xyz"] - rig.position) <= 0.06
        )
        wait_until(lambda: gone(watchdog), what="the end of the watchdog")


HANGS = """
import ctypes
from deer_vla_ros.budget.budgeted_policy import BudgetedPolicy
original, steps = BudgetedPolicy.step, []
def step(self, observation):
    steps.append(1)
    if len(steps) == 10:
        ctypes.PyDLL(None).usleep(2_500_000)  # keeps the interpreter's lock
    return original(self, observation)
BudgetedPolicy.step = step
"""


def test_an_inference_that_keeps_the_interpreters_lock_is_held_for_by_the_watchdog(client):
    rig = Rig(client, "locked/")
    with faulty_node("locked", HANGS) as process, rig.running():
        client.await_active(process, "locked/deer_vla")
        rig.instruct("open the drawer")
        rig.await_steps(9, START_TIMEOUT)
        begin, before = len(rig.twists), len(rig.steps)
        wait_until(
            lambda: len([t for t in rig.twists[begin:] if not moves(t)]) >= 10, what="holds of the watchdog"
        )
        assert sum(map(moves, rig.twists[begin:])) <= 2
        late = wait_until(lambda: rig.steps[before:], what="the step that took so long")[0]
        # The frames that came meanwhile are either heard before this step is judged, or they are not.
        assert late.verdict == late.VERDICT_HELD and {"TOO_SLOW", "STATIC_STALE"} & set(late.reasons), (
            "what it decided in the end is told, and not done"
        )
        rig.await_steps(3)
        numbers = [step.step for step in rig.steps]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), "every inference is one step"


FAILS = """
from deer_vla_ros.control.controller import Controller
original, ticks = Controller.tick, []
class Panic(BaseException):
    pass
def tick(self, *given):
    command = original(self, *given)
    ticks.append(command is not None and not command.holds)
    if sum(ticks) == 10:
        raise Panic("no way on")
    return command
Controller.tick = tick
"""


def test_when_the_control_thread_ends_the_arm_holds_everybody_is_told_and_the_process_ends(
    client, diagnostics
):
    rig = Rig(client, "ended_by_itself/")
    with faulty_node("ended_by_itself", FAILS) as process, rig.running():
        client.await_active(process, "ended_by_itself/deer_vla")
        rig.instruct("open the drawer")
        assert process.wait(START_TIMEOUT) == 1
        wait_until(lambda: not moves(rig.twists[-1]), what="the hold")
        assert "control failed: Panic: no way on" in process.output()
        faults = [s for array in diagnostics for s in array.status if s.message.startswith("fault: Panic")]
        assert faults and faults[0].level == DiagnosticStatus.ERROR


RAISES = """
from deer_vla_ros.ros import policy_node
original = policy_node.PolicyNode._on_reset
asked = []
def reset(self, request, response):
    asked.append(1)
    if len(asked) == 1:
        raise RuntimeError("a defect")
    return original(self, request, response)
policy_node.PolicyNode._on_reset = reset
"""


def test_a_callback_that_raises_is_a_hold_and_those_after_it_run(client):
    rig = Rig(client, "defect/")
    with faulty_node("defect", RAISES) as process, rig.running():
        await_moving(client, process, rig, "defect")
        assert client.call(Trigger, "defect/deer_vla/reset").success, (
            "the second call; the first is never answered"
        )
        rig.await_hold()
        assert "a callback failed: RuntimeError: a defect" in process.output()
        clear(client, "defect")
        rig.await_steps(3)


@pytest.mark.parametrize(
    "error", ["MemoryError()", "OSError(28, 'No space left on device')", "ValueError('inf')"]
)
def test_whatever_fails_in_a_transition_is_one_line_with_the_reason(client, error):
    code = f"""
from deer_vla_ros.ros import loading
def fails(*given, **named):
    raise {error}
loading.warm_controller = fails
"""
    with faulty_node("unready", code) as process:
        wait_until(lambda: "configure failed: " in process.output(), START_TIMEOUT, "the reason")
        line = next(line for line in process.output().splitlines() if "configure failed" in line)
        assert error.partition("(")[0] in line and "Traceback" not in process.output()
        assert client.state("unready/deer_vla") == State.PRIMARY_STATE_UNCONFIGURED
        assert process.stop() == 0


# --- Requests.


@pytest.fixture(scope="module")
def busy(client):
    """A node that moves its arm. The requests of the tests must not disturb it."""
    rig = Rig(client, "asked/")
    with node("asked") as process, rig.running():
        await_moving(client, process, rig, "asked")
        yield process, rig


@pytest.mark.parametrize(
    "transition", [Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE, 77, 0]
)
def test_a_transition_that_the_state_does_not_have_is_refused_and_the_arm_goes_on(client, busy, transition):
    process, rig = busy
    request = ChangeState.Request(transition=Transition(id=transition))
    assert not client.call(ChangeState, "asked/deer_vla/change_state", request).success
    assert f"transition {transition} is refused" in process.output()
    assert client.state("asked/deer_vla") == State.PRIMARY_STATE_ACTIVE
    rig.await_steps(3)


def test_every_one_of_many_holds_is_answered(client, busy):
    _, rig = busy
    ask = client.node.create_client(SetBool, "asked/deer_vla/hold", qos_profile=QoSProfile(depth=1000))
    wait_until(ask.service_is_ready, what="the service")
    futures = [ask.call_async(SetBool.Request(data=i % 2 == 0)) for i in range(200)]
    wait_until(lambda: all(future.done() for future in futures), 30.0, "every answer")
    assert all(future.result().success for future in futures)
    client.node.destroy_client(ask)
    clear(client, "asked")
    rig.await_steps(3)


def test_a_stopped_node_is_held_for_and_says_nothing_old_when_it_goes_on(busy):
    process, rig = busy
    before = len(rig.targets)
    for _ in range(3):
        process.send(signal.SIGSTOP)
        begin = len(rig.twists)
        wait_until(
            lambda begin=begin: len([t for t in rig.twists[begin:] if not moves(t)]) >= 3, what="holds"
        )
        begin, resumed_ns = len(rig.twists), time.time_ns()
        process.send(signal.SIGCONT)
        wait_until(lambda begin=begin: sum(map(moves, rig.twists[begin:])) >= 3, what="motions again")
        moved = [twist for twist in rig.twists[begin:] if moves(twist)]
        late = [twist for twist in moved if nanoseconds(twist.header.stamp) < resumed_ns - MAX_AGE_NS]
        assert not late, "a motion decided on frames from before the stop"
    positions = [[getattr(t.pose.position, axis) for axis in "xyz"] for t in rig.targets[before:]]
    assert np.linalg.norm(np.diff(positions, axis=0), axis=1).max() <= 0.06 + 1e-6


def test_a_killed_watchdog_is_a_hold_until_there_is_another_one(busy):
    process, rig = busy
    watchdog, told = watchdog_of(process), len(process.output())
    os.kill(watchdog, signal.SIGKILL)
    wait_until(lambda: "the watchdog process does not answer" in process.output()[told:], what="the hold")
    wait_until(lambda: watchdog_of(process) != watchdog, what="another watchdog")
    rig.await_steps(5)


def test_a_hold_of_the_watchdog_is_no_command_of_another_node(client):
    topics = WatchdogSettings("/stalled/target", "/stalled/twist", "/stalled/pose", "/stalled", "dog", False)
    twists = client.listen(TwistStamped, topics.twist_topic)
    watchdog = WatchdogClient(topics, [])
    watchdog.start()
    try:
        wait_until(watchdog.is_alive, START_TIMEOUT, "the watchdog")
        watchdog.beat(Beat(0, True, 0, (), 0.3, 0.3, 0.1, 0.05, 0.2, 10.0, "base"))  # an old beat: stalled
        wait_until(lambda: len(twists) >= 3, START_TIMEOUT, "holds")
        stamps = [nanoseconds(twist.header.stamp) for twist in twists]
        assert all(map(watchdog.has_published, stamps)) and not watchdog.has_published(stamps[0] + 1)
    finally:
        watchdog.close()


def test_looser_limits_are_refused_while_the_arm_moves_and_tighter_ones_are_not(client, busy):
    def ask(name: str, value: float):
        given = ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=value)
        request = SetParameters.Request(parameters=[Parameter(name=name, value=given)])
        return client.call(SetParameters, "asked/deer_vla/set_parameters", request).results[0]

    process, rig = busy
    for _ in range(20):
        wait_until(lambda: is_controlling(process), what="control")
        told = len(process.output())
        refused = ask("guard.leash_m", 1.0)
        if not refused.successful:
            break
        # A busy machine delays frames, and the node holds for a moment. Only then may it have agreed.
        wait_until(lambda told=told: "holding: " in process.output()[told:], what="the hold")
        assert ask("guard.leash_m", 0.15).successful
    assert (
        not refused.successful
        and "guard.leash_m would allow more while the arm moves: call ~/hold" in refused.reason
    )
    assert ask("guard.leash_m", 0.1).successful
    assert "limit changed: guard.leash_m is 0.1" in process.output()
    client.call(SetBool, "asked/deer_vla/hold", SetBool.Request(data=True))
    rig.await_hold()
    assert ask("guard.leash_m", 0.15).successful
    clear(client, "asked")
    rig.await_steps(3)


# --- Other nodes.


def test_a_second_node_holds_without_disturbing_the_first_and_goes_on_when_it_may(client, diagnostics):
    rig = Rig(client, "doubled/")
    with node("doubled") as first, rig.running():
        await_moving(client, first, rig, "doubled")
        with node("doubled", "autostart:=true") as second:
            wait_until(
                lambda: "another node commands the arm too" in second.output(),
                START_TIMEOUT,
                "the second to say so",
            )
            begin = len(rig.twists)
            # The first one itself may hold for a moment, if a busy machine delays its frames.
            wait_until(
                lambda: sum(map(moves, rig.twists[begin:][-20:])) > 15,
                START_TIMEOUT,
                "20 commands with at least 16 motions: the second one's holds would be every other command",
            )
            assert "controlling" not in second.output()
            assert first.stop() == 0
            wait_until(lambda: "another node" in holding(second), what="still a hold")
            begin = len(rig.twists)
            wait_until(lambda: len(rig.twists) >= begin + 3, what="holds, now that the arm is its own")
            assert not any(map(moves, rig.twists[begin:]))
            clear(client, "doubled")
            rig.await_steps(3)


def test_a_node_that_nobody_listens_to_waits_and_one_that_lost_its_listener_needs_a_person(client):
    rig = Rig(client, "unheard/", hears_commands=False)
    with node("unheard") as process, rig.running():
        client.await_active(process, "unheard/deer_vla")
        rig.instruct("open the drawer")
        wait_until(lambda: holding(process).startswith("nobody listens"), what="the reason")
        assert not rig.steps
        rig.hear_commands()
        rig.await_steps(5)
        before = process.output()
        rig.stop_hearing_commands()
        wait_until(lambda: "nobody listens" in process.output()[len(before) :], what="the reason")
        rig.hear_commands()
        rig.await_hold()
        clear(client, "unheard")
        rig.await_steps(3)


# --- The arm and the clock.


def test_a_frozen_pose_with_fresh_stamps_is_a_hold_that_a_person_clears(client, busy, diagnostics):
    process, rig = busy
    rig.await_steps(1)
    rig.follows = False
    wait_until(lambda: "the arm does not follow its targets" in holding(process), 30.0, "the reason")
    rig.await_hold()
    wait_until(
        lambda: any(
            status.level == DiagnosticStatus.ERROR
            and "does not follow" in status.message
            and "~/hold" in status.message
            for array in diagnostics
            for status in array.status
        ),
        what="an error in /diagnostics",
    )
    rig.follows = True
    steps = len(rig.steps)
    rig.await_hold()
    assert len(rig.steps) == steps
    clear(client, "asked")
    rig.await_steps(3)


def test_the_arm_moves_only_while_enable_says_true_and_is_refreshed(client):
    rig = Rig(client, "deadman/")
    with node("deadman", "control.enable_timeout_s:=0.5") as process, rig.running():
        client.await_active(process, "deadman/deer_vla")
        rig.instruct("open the drawer")
        wait_until(lambda: holding(process).startswith("the topic `enable`"), what="the reason")
        enable = client.publisher(Bool, "deadman/enable")
        timer = client.node.create_timer(0.05, lambda: enable.publish(Bool(data=pressed)))
        pressed = True
        rig.await_steps(5)
        pressed = False
        rig.await_hold()
        pressed = True
        rig.await_steps(3)
        client.node.destroy_timer(timer)
        rig.await_hold()


class ClockedRig(Rig):
    """A robot with a clock of its own, which a test can stop."""

    seconds, runs = 100.0, True

    def now(self) -> Time:
        self.seconds += 0.1 if self.runs else 0.0
        self.clock.publish(Clock(clock=Time(seconds=self.seconds).to_msg()))
        return Time(seconds=self.seconds)


def test_a_clock_that_stands_still_is_a_hold_that_is_repeated(client):
    rig = ClockedRig(client, "paused/")
    rig.clock = client.node.create_publisher(Clock, "/clock", 10)
    with node("paused", "use_sim_time:=true") as process, rig.running():
        await_moving(client, process, rig, "paused")
        rig.follows = rig.runs = False
        wait_until(lambda: "the clock stands still" in holding(process), what="the reason")
        rig.await_hold()
        begin = len(rig.twists)
        wait_until(lambda: len(rig.twists) >= begin + 5, what="repeats by the steady clock")
        rig.follows = rig.runs = True
        rig.await_steps(3)


def test_an_arm_led_by_hand_during_a_hold_is_never_far_from_its_target(client, busy):
    _, rig = busy
    client.call(SetBool, "asked/deer_vla/hold", SetBool.Request(data=True))
    rig.await_hold()
    start, begin = rig.position, len(rig.targets)
    for i in range(20):
        rig.position = start + np.array([0.0, 0.0125 * (i + 1), 0.0])
        sent = rig.poses_sent
        wait_until(lambda sent=sent: rig.poses_sent > sent, what="the pose")
    wait_until(
        lambda: abs(rig.targets[-1].pose.position.y - rig.position[1]) <= 0.06,
        what="a target that is with the arm",
    )
    ys = [target.pose.position.y for target in rig.targets[begin:]]
    assert ys == sorted(ys) and len(set(ys)) <= 7, "taken anew when it has to be, not at every moment"
    clear(client, "asked")
    rig.await_steps(3)


# --- Examples of the README.


def test_an_instruction_published_as_the_readme_says_arrives_though_others_listen_too(client):
    text = (ROOT / "README.md").read_text()
    (times,) = set(re.findall(r"ros2 topic pub --times (\d) /instruction", text))
    assert "--once /instruction" not in text
    client.listen(String, "told/instruction")  # Like the simulated table, this subscriber matches at once.
    rig = Rig(client, "told/")
    with node("told") as process, rig.running():
        client.await_active(process, "told/deer_vla")
        # `ros2 topic pub --times N` does the same: it waits for one subscription, and publishes at 1 Hz.
        publisher = client.publisher(String, "told/instruction", 1)
        for _ in range(int(times)):
            publisher.publish(String(data="open the drawer"))
            time.sleep(1.0)
        client.node.destroy_publisher(publisher)
        assert {step.instruction for step in rig.await_steps(3)} == {"open the drawer"}
