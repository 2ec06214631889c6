"""All processes of a soak, and the actions on them."""

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
"""The most time from the node's start to its first motion, on a busy machine."""
INSTRUCTION = "lift the red block"
WATCHDOG = "deer_vla_ros.ros.watchdog"
"""A part of the command line of the node's watchdog, by which the process is found."""


class Arena:
    """The processes of a soak; `opened` makes one. node, robot, observer and caller are the present
    processes.

    node and robot may be replaced by new processes during a soak. Methods that return an int return the time
    at which the change was made [ns, wall clock].
    """

    def __init__(self, out: Path, with_table: bool, table_parameters: Path):
        self.news = News()
        self.with_table = with_table
        self.node_ends: list[str] = []  # Failures of node processes that the soak had not killed.
        self.broken: list[dict[str, Any]] = []  # Broken promises that do not concern a single command.
        self.count = 0  # Number of displacements: they alternate in direction.
        self._out = out
        self._table_parameters = table_parameters
        self._sim_time = False
        self._stack = ExitStack()
        self.second: Part | None = None

    # --- begin and end

    def open(self, limits: Limits) -> None:
        """Starts all processes. Raises UserError if one does not start."""
        self.node = self._start_node()  # The node is started first, because it takes longest.
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
        """Waits until the node moves the arm. Raises UserError if it does not. when: words for the error."""
        if self.news.motion_after(time.time_ns(), START_S) is None:
            self.check()
            raise UserError(f"no motion came within {START_S:g} s {when}: see {self.node.log}")

    def close(self) -> None:
        """Ends all processes, in any state: first those that command the arm, then the robot."""
        if self.second is not None:
            self.second.end()
        if not self.node.killed:
            self._note_end(self.node, self.node.end())
        self._stack.close()

    # --- processes

    def check(self) -> None:
        """Raises UserError if the observer or the operator has ended: no fault concerns them."""
        for part in (self.observer, self.caller):
            if not part.is_running():
                raise UserError(f"the {part.name} ended before it was to: see {part.log}")

    def watchdog_pid(self) -> int | None:
        """The process id of the node's watchdog, or None if it has none."""
        return next((pid for pid in children_of(self.node.pid) if WATCHDOG in command_of(pid)), None)

    def revive_node(self) -> int:
        """Ends the node if it still runs, and starts a new one, as a supervisor does.

        Returns the time of the start.
        """
        if self.node.is_running():
            self.node.kill()
        elif not self.node.killed:
            self._note_end(self.node, self.node.end())
        return self._replace_node()

    def use_simulated_time(self) -> int:
        """Starts a new robot that publishes /clock, and a new node that uses it.

        Returns the time of the node's start.
        """
        self._note_end(self.node, self.node.end())
        self.robot.end()
        self.observer.say(do="robot_gone")
        self._sim_time = True
        self.robot = self._start_robot()
        self._await_robot()
        return self._replace_node()

    def restart_robot(self) -> int:
        """Starts a new robot after the last one was killed. Returns the time at which it was ready."""
        self.robot = self._start_robot()
        self._await_robot()
        return time.time_ns()

    def start_second_node(self) -> Part:
        """Starts a second node on the same topics."""
        self.second = self._start_node("second")
        return self.second

    def promise(self, kept: bool, what: str) -> None:
        """Records a broken promise if `kept` is false. what: a sentence that describes the failure."""
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
    """A context with an arena in which the node already moves the arm. All its processes end with the
    context.

    out: the folder of the logs. table_parameters: the node's parameter file, used if with_table. Raises
    UserError if a process does not start.
    """
    os.environ["ROS_LOG_DIR"] = str(out / "ros")
    arena = Arena(out, with_table, table_parameters)
    try:
        arena.open(limits)
        yield arena
    finally:
        arena.close()
