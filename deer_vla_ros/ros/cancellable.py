"""Work in a thread of its own, which whoever waits for it can give up at any time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from deer_vla_ros.errors import Cancelled

Result = TypeVar("Result")


class Work(threading.Thread, Generic[Result]):
    """Runs `do(check)` in a daemon thread. `do` has to call `check` often, and not to catch what it raises.

    Work that is given up goes on until `do` calls `check` the next time. Nobody has to wait for that, and
    nothing that it made stays in memory afterwards.
    """

    def __init__(self, name: str, do: Callable[[Callable[[], None]], Result]):
        super().__init__(name=name, daemon=True)
        self._do = do
        self._lock = threading.Lock()
        self._given_up = ""
        self._result: Result | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._keep(self._do(self._check), None)
        except BaseException as error:  # of any kind: the waiting thread raises it
            self._keep(None, error)

    def give_up(self, why: str) -> None:
        """Makes the next `check` raise Cancelled(why)."""
        with self._lock:
            self._given_up = why
            self._result = self._error = None

    def take_result(self) -> Result:
        """The result of work that has ended, which this object then forgets. Raises the error of `do`."""
        result, error, self._result, self._error = self._result, self._error, None, None
        if error is None:
            return result
        try:
            raise error
        finally:
            del error  # otherwise the error keeps this frame and itself, and all that `do` had, in memory

    def _keep(self, result: Result | None, error: BaseException | None) -> None:
        with self._lock:
            if not self._given_up:
                self._result, self._error = result, error

    def _check(self) -> None:
        if self._given_up:
            raise Cancelled(self._given_up)
