"""The run of a demo: wait for the processes, give the instructions one after another, and record."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rclpy.executors import SingleThreadedExecutor

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.demo.demo_recorder import DemoRecorder
from deer_vla_ros.lab.demo.demo_report import InstructionResult, PictureMoment
from deer_vla_ros.lab.demo.demo_view import DemoView
from deer_vla_ros.processes import ChildProcess
from deer_vla_ros.ros.process import ros_process

START_TIMEOUT_S = 120.0
LAST_WORD_TIMEOUT_S = 5.0
"""The most time to wait for the diagnostics after the last step; the node publishes them at 1 Hz."""


@dataclass(frozen=True)
class Recorded:
    """The record of a demo.

    rows, moments: see demo_report. before, after: the node's values in `/diagnostics` when the first
    instruction was given, and after the last step. first_step_s: the time from the demo's begin to the first
    step. seconds: the time from the first step to the end of control. told: the instructions in their order.
    """

    rows: list[dict[str, Any]]
    moments: list[PictureMoment]
    before: dict[str, str]
    after: dict[str, str]
    first_step_s: float
    seconds: float
    told: list[InstructionResult]
    view: DemoView


class _Demo:
    """One demo in progress. All its work happens in the thread that calls `until`."""

    def __init__(
        self,
        recorder: DemoRecorder,
        view: DemoView,
        processes: list[ChildProcess],
        stopped: Callable[[], bool],
        started: float,
    ):
        self._recorder = recorder
        self._view = view
        self._processes = processes
        self._stopped = stopped
        self._started = started
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(recorder)

    def until(self, over: Callable[[], bool], timeout_s: float, what: Callable[[], str]) -> None:
        """Spins the recorder until `over()`. what: names what it waits for.

        Raises UserError after `timeout_s` or if a process ends, and KeyboardInterrupt on a signal.
        """
        deadline = time.monotonic() + timeout_s
        while not over():
            self._executor.spin_once(timeout_sec=0.05)
            if self._stopped():
                raise KeyboardInterrupt
            for process in self._processes:
                process.check()
            if time.monotonic() > deadline:
                raise UserError(
                    f"nothing came from {what()} within {timeout_s:g} s; "
                    f"the node says '{self._recorder.status or 'nothing'}'"
                )
            if self._recorder.first_step_at is None:
                self._view.waiting(what(), time.monotonic() - self._started)
            else:
                self._view.running(self._recorder.rows, time.monotonic() - self._recorder.first_step_at)


def control(
    instructions: list[str],
    seconds: float,
    moment_interval_s: float,
    processes: list[ChildProcess],
    weights: dict[str, Any],
    started: float,
) -> Recorded:
    """Runs at most `seconds` of control from the first step on.

    The next instruction follows when one is done, or when its share of the time is over. moment_interval_s:
    the least time between two moments whose images are kept [s]. weights: the content of the checkpoint's
    `config.json`. started: time.monotonic() at the demo's begin.

    Raises UserError if a process ends or nothing comes in time, and KeyboardInterrupt on SIGINT and SIGTERM.
    """
    with ros_process([]) as stop, DemoView(seconds) as view:
        view.say(f"weights: {weights['weights']}")
        if not weights["trained"]:
            view.say(
                "NOT TRAINED: the arm moves, but it does not do what it is told. "
                "Timing, exits and safety are what this demo shows."
            )
        recorder = DemoRecorder(moment_interval_s)
        demo = _Demo(recorder, view, processes, stop.is_set, started)
        demo.until(recorder.ready, START_TIMEOUT_S, recorder.missing)
        if recorder.policies() > 1:
            raise UserError(
                "another policy node is in this ROS domain: give the demo its own with ROS_DOMAIN_ID"
            )
        before = recorder.figures
        recorder.say(instructions[0])
        demo.until(lambda: recorder.first_step_at is not None, START_TIMEOUT_S, lambda: "the first step")
        began = recorder.first_step_at
        for index, instruction in enumerate(instructions):
            if index:
                recorder.say(instruction)
            now = time.monotonic()
            # The time that is left is shared equally by the instructions that are left.
            end = now + (began + seconds - now) / (len(instructions) - index)
            demo.until(
                lambda end=end: recorder.told[-1].done or time.monotonic() >= end,
                2 * seconds + START_TIMEOUT_S,
                lambda: "the clock",
            )
        ran_s = time.monotonic() - began
        recorder.recording = False
        last_s = time.time()
        demo.until(lambda: recorder.figures_stamp_s > last_s, LAST_WORD_TIMEOUT_S, lambda: "/diagnostics")
        recorder.destroy_node()
    return Recorded(
        recorder.rows, recorder.moments, before, recorder.figures, began - started, ran_s, recorder.told, view
    )
