"""Did the arm do what it was told? Watches the table's state from an instruction on."""

from __future__ import annotations

from deer_vla_ros.lab.sim.state import TableState
from deer_vla_ros.lab.sim.tasks import TASKS, Task

_BY_WORDING: dict[str, Task] = {text: task for task in TASKS for text in (*task.phrasings, *task.held_out)}


def task_called(instruction: str) -> Task | None:
    """The task that an instruction asks for, in one of its wordings; None for other words."""
    return _BY_WORDING.get(" ".join(instruction.split()).lower())


class Referee:
    """One instruction at a time; another one, or the same again, starts anew."""

    def __init__(self) -> None:
        self._task: Task | None = None
        self._before: TableState | None = None

    def begin(self, instruction: str, state: TableState) -> str:
        """The instruction is given in `state`. Returns why it is not judged: it names no task, or none that makes sense in this state,
        as opening an open drawer; empty where it is."""
        task = task_called(instruction)
        self._task, self._before = None, state
        if task is None:
            return f"'{instruction}' is no task of this table"
        if not task.possible(state):
            return f"'{instruction}' ({task.name}) makes no sense in the table's present state"
        self._task = task
        return ""

    def succeeded(self, state: TableState) -> bool:
        """Whether the task is done in `state`; True once for each instruction."""
        if self._task is None or not self._task.succeeded(self._before, state):
            return False
        self._task = None
        return True
