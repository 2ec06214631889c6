"""This file holds all processes of a soak, and what can be done to them."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.soak.heard import Limits
from deer_vla_ros.lab.soak.news import News
from deer_vla_ros.lab.soak.part import Part, children_of, command_of

START_S = 90.0
"""How long the node may take from its start to its first motion on a busy machine."""
INSTRUCTION = "lift the red block"
WATCHDOG = "deer_vla_ros.ros.watchdog"
"""Part of the command line of the node's watchdog."""


class Arena:
    """Use `opened`. node, robot, observer and caller are the processes that run now; the first two may be
    replaced."""

    def __init__(self, out: Path, with_table: bool, table_parameters: Path):
        self.news = News()
        self.with_table = with_table
        self.node_ends: list[str] = []  # how node processes ended when nobody had killed them
        self.broken: list[dict[str, Any]] = []  # promises that are not about one command
        self.count = 0  # of displacements, so that they take turns
        self._out = out
        self._table_parameters = table_parameters
        self._sim_time = False
        self._stack = ExitStack()
        self.second: Part | None = None

    # --- begin and end

    def open(self, limits: Limits) -> None:
        """Starts everything; raises UserError where something does not come up."""
        self.node = self._start_node()  # first: it takes longest
        self.observer = self._part("observer", "deer_vla_ros.lab.soak.observer", [], hear=self.news.hear)
        self.caller = self._part("operator", "deer_vla_ros.lab.soak.caller", [])
        self.robot = self._start_robot()
        for part in (self.observer, self.caller):
            part.await_ready()
        self._await_robot()
        self.observer.say(do="limits", limits=dataclasses.asdict(limits))
        self.caller.ask(do="instruct", **{"with": {"text": INSTRUCTION}})
        self.await_motion("at the start")

    def await_motion(self, when: str) -> None:
        """Until the node moves the arm; raises UserError."""
        if self.news.motion_after(time.time_ns(), START_S) is None:
            self.check()
            raise UserError(f"no motion came within {START_S:g} s {when}: see {self.node.log}")

    def close(self) -> None:
        """Ends everything: first who commands, then who obeys. Nothing is left, whatever state it is in."""
        if self.second is not None:
            self.second.end()
        if not self.node.killed:
            self._note_end(self.node, self.node.end())
        self._stack.close()

    # --- processes

    def check(self) -> None:
        """Raises UserError where a process that is not under attack is gone."""
        for part in (self.observer, self.caller):
            if not part.is_running():
                raise UserError(f"the {part.name} ended before it was to: see {part.log}")

    def watchdog_pid(self) -> int | None:
        """Of the node's watchdog process; None where it has none."""
        return next((pid for pid in children_of(self.node.pid) if WATCHDOG in command_of(pid)), None)

    def revive_node(self) -> int:
        """Starts the node anew, as a supervisor does, whether it has ended or hangs; when it did."""
        if self.node.is_running():
            self.node.kill()
        elif not self.node.killed:
            self._note_end(self.node, self.node.end())
        return self._replace_node()

    def use_simulated_time(self) -> int:
        """From now on the robot publishes /clock, and a new node lives by it."""
        self._note_end(self.node, self.node.end())
        self.robot.end()
        self.observer.say(do="robot_gone")
        self._sim_time = True
        self.robot = self._start_robot()
        self._await_robot()
        return self._replace_node()

    def restart_robot(self) -> int:
        """After it was killed."""
        self.robot = self._start_robot()
        self._await_robot()
        return time.time_ns()

    def start_second_node(self) -> Part:
        """The same node once more, on the same topics."""
        self.second = self._start_node("second")
        return self.second

    def promise(self, kept: bool, what: str) -> None:
        """Notes a promise that was broken, in a sentence."""
        if not kept:
            self.broken.append({"at_ns": time.time_ns(), "message": what})

    def _replace_node(self) -> int:
        at_ns = time.time_ns()
        self.node = self._start_node()
        self.observer.say(do="restarted")
        return at_ns

    def _note_end(self, part: Part, status: int | None) -> None:
        if status != 0:
            told = "had to be killed" if status is None else f"ended with status {status}"
            self.node_ends.append(f"the {part.name} {told}: see {part.log}")

    def _start_node(self, name: str = "node") -> Part:
        arguments = ["--ros-args"]
        if self._sim_time:
            arguments += ["-p", "use_sim_time:=true"]
        if self.with_table:
            arguments += ["--params-file", str(self._table_parameters)]
        return self._part(name, "deer_vla_ros.lab.soak.node_with_faults", arguments, talks=False)

    def _start_robot(self) -> Part:
        if self.with_table:
            return self._part("table", "deer_vla_ros", ["sim"], talks=False)
        return self._part("robot", "deer_vla_ros.lab.soak.robot", ["--clock"] if self._sim_time else [])

    def _await_robot(self) -> None:
        if not self.with_table:
            self.robot.await_ready()

    def _part(self, name: str, module: str, arguments: list[str], **options: Any) -> Part:
        part = Part(name, module, arguments, self._out / f"{name}.log", **options)
        self._stack.callback(part.end_group)
        if not options.get("talks", True) and name != "table":
            return part
        self._stack.callback(part.end)
        return part


@contextmanager
def opened(out: Path, limits: Limits, with_table: bool, table_parameters: Path) -> Iterator[Arena]:
    """An arena in which the node moves the arm. No process outlives it."""
    os.environ["ROS_LOG_DIR"] = str(out / "ros")
    arena = Arena(out, with_table, table_parameters)
    try:
        arena.open(limits)
        yield arena
    finally:
        arena.close()
