"""The faults of the inference, and of processes that are stopped or killed."""

from __future__ import annotations

import os
import resource
import signal
import time
from typing import Any

from deer_vla_ros.lab.soak.arena import Arena
from deer_vla_ros.lab.soak.fault import HOLD_WITHIN_S, Act, Clearing, Door, Fault, nothing
from deer_vla_ros.lab.soak.part import wait_until

SECOND_START_S = 60.0
"""The most time until a second node logs that it holds."""
LOCKED_S = 2.9
"""The arm must hold for this time while the interpreter's lock is kept, which lasts slightly longer."""


def _mood(name: str) -> Act:
    def act(arena: Arena) -> int:
        arena.node.say(inference=name)
        return time.time_ns()

    return act


def _inference(name: str, about: str, seconds: float, clearing: Clearing, **options: Any) -> Fault:
    options = {"holds_after_s": HOLD_WITHIN_S} | options
    return Fault(
        name, about, Door.INFERENCE, seconds, _mood(name), _mood("good"), clearing=clearing, **options
    )


def _signal_node(number: int) -> Act:
    def act(arena: Arena) -> int:
        arena.node.signal(number)
        return time.time_ns()

    return act


def _signal_watchdog(number: int) -> Act:
    def act(arena: Arena) -> int:
        pid = arena.watchdog_pid()
        if pid is not None:
            os.kill(pid, number)
        arena.promise(pid is not None, "the node has no watchdog process")
        return time.time_ns()

    return act


def _kill_node(arena: Arena) -> int:
    arena.node.kill()
    return time.time_ns()


def _kill_robot(arena: Arena) -> int:
    arena.robot.kill()
    arena.observer.say(do="robot_gone")
    return time.time_ns()


def _start_second(arena: Arena) -> int:
    """Starts a second node and waits until it holds.

    It must log that, with the reason, and never that it controls.
    """
    begin_ns = time.time_ns()
    second = arena.start_second_node()
    size = second.log.stat().st_size if second.log.exists() else 0

    def log() -> str:
        return second.log.read_bytes()[size:].decode(errors="replace")

    wait_until(lambda: "holding: " in log() or "controlling" in log(), SECOND_START_S, 0.1)
    time.sleep(1.0)
    told = log()
    arena.promise("controlling" not in told, "a second node controls the arm beside the first")
    holds = [line for line in told.splitlines() if "holding: " in line]
    named = any("command" in line for line in holds)
    arena.promise(named, f"a second node does not say that another one commands the arm: {holds[-1:]}")
    return begin_ns


def _end_second(arena: Arena) -> int:
    arena.second.end()
    arena.second = None
    return time.time_ns()


def _limit_files(size: int) -> Act:
    """Limits the size of files that the node and its watchdog write. 0 is like a full disk; -1 ends it."""

    def act(arena: Arena) -> int:
        for pid in filter(None, (arena.node.pid, arena.watchdog_pid())):
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard if size < 0 else size, hard))
        return time.time_ns()

    return act


def _fault(name: str, about: str, seconds: float, begin: Act, end: Act, **options: Any) -> Fault:
    return Fault(name, about, Door.PROCESSES, seconds, begin, end, **options)


FAULTS = (
    _inference("inference_raises", "the inference raises an error", 1.6, Clearing.ASKED),
    _inference("inference_nan", "the network's action is NaN", 1.6, Clearing.ASKED),
    _inference("inference_panics", "the inference raises what is no Exception", 1.6, Clearing.ASKED),
    _inference("inference_slow", "an inference takes 1 s", 2.6, Clearing.ITSELF),
    _inference(
        "inference_keeps_lock",
        "an inference keeps the interpreter's lock for 3 s",
        3.4,
        Clearing.EITHER,
        holds_for_s=LOCKED_S,
    ),
    _fault(
        "node_stopped_shortly",
        "the node's process is stopped for 0.6 s",
        0.6,
        _signal_node(signal.SIGSTOP),
        _signal_node(signal.SIGCONT),
        clearing=Clearing.EITHER,
    ),
    _fault(
        "node_stopped",
        "the node's process is stopped for 2.8 s",
        2.8,
        _signal_node(signal.SIGSTOP),
        _signal_node(signal.SIGCONT),
        holds_after_s=HOLD_WITHIN_S,
        clearing=Clearing.EITHER,
    ),
    _fault(
        "node_killed",
        "the node's process is killed, and started again after 1.5 s",
        1.5,
        _kill_node,
        Arena.revive_node,
        holds_after_s=HOLD_WITHIN_S,
        clearing=Clearing.EITHER,
        is_silent=True,
        restarts=True,
    ),
    _fault(
        "watchdog_killed",
        "the node's watchdog process is killed",
        1.5,
        _signal_watchdog(signal.SIGKILL),
        nothing,
        clearing=Clearing.EITHER,
    ),
    _fault(
        "watchdog_stopped",
        "the node's watchdog process is stopped for 2 s",
        2.0,
        _signal_watchdog(signal.SIGSTOP),
        _signal_watchdog(signal.SIGCONT),
        clearing=Clearing.EITHER,
    ),
    _fault(
        "robot_killed",
        "the robot's process is killed, and started again after 1.5 s",
        1.5,
        _kill_robot,
        Arena.restart_robot,
        holds_after_s=HOLD_WITHIN_S,
        clearing=Clearing.EITHER,
    ),
    _fault(
        "second_node",
        "the same node is started a second time",
        1.0,
        _start_second,
        _end_second,
        clearing=Clearing.EITHER,
    ),
    _fault(
        "disk_full",
        "the node can write to no file",
        2.0,
        _limit_files(0),
        _limit_files(-1),
    ),
)
