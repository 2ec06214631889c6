"""The referee decides from the state of the table whether an instruction was carried out."""

from __future__ import annotations

from deer_vla_ros.lab.sim.state import TableState
from deer_vla_ros.lab.sim.tasks import TASKS, Task

_BY_WORDING: dict[str, Task] = {text: task for task in TASKS for text in (*task.phrasings, *task.held_out)}


def task_called(instruction: str) -> Task | None:
    """Returns the task with this phrasing, or None for other words."""
    return _BY_WORDING.get(" ".join(instruction.split()).lower())


class Referee:
    """Judges one instruction at a time; every new instruction starts again, also the same one."""

    def __init__(self) -> None:
        self._task: Task | None = None
        self._before: TableState | None = None

    def begin(self, instruction: str, state: TableState) -> str:
        """Starts to judge an instruction that is given in `state`.

        Returns the reason if it is not judged, and otherwise an empty text. An instruction is not judged if
        it names no task, or a task that is impossible, such as to open an open drawer.
        """
        task = task_called(instruction)
        self._task, self._before = None, state
        if task is None:
            return f"'{instruction}' is no task of this table"
        if not task.possible(state):
            return f"'{instruction}' ({task.name}) makes no sense in the table's present state"
        self._task = task
        return ""

    def succeeded(self, state: TableState) -> bool:
        """Returns whether the task is done in `state`. It returns True once for each instruction."""
        if self._task is None or not self._task.succeeded(self._before, state):
            return False
        self._task = None
        return True
