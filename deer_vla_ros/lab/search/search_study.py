"""A search's study, shared fairly between processes and machines, any of which may die at any moment.

Optuna keeps the trials in a journal; who may take which of them, and who still lives, is decided here.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.search.search_task import Outcome, SearchTask

FIRST_TRIALS = 5
"""Complete trials, the start among them, before the Gaussian process proposes. Those after the start lie around it."""

BEAT_SECONDS = 15.0
SILENT_SECONDS = 60.0
"""A trial of a process on another machine tells that it lives every BEAT_SECONDS; unheard for SILENT_SECONDS, it is dead."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class CompleteTrial:
    """A complete trial."""

    number: int
    thresholds: tuple[float, ...]
    outcome: Outcome


class SharedStudy:
    """Optuna's study, shared fairly: who takes which trial, who still lives, and what is complete.

    Between `with` and its end it keeps telling the other machines that this process lives. At the end it gives back the trials
    that it has not finished.
    """

    def __init__(self, task: SearchTask, path: str | Path | None, name: str):
        self._optuna, self._task = _import_optuna(), task
        self._states = self._optuna.trial.TrialState
        self._run = {
            "run": uuid.uuid4().hex,
            "machine": _machine(),
            "process": os.getpid(),
            "started": _started(os.getpid()),
        }
        self._mine: dict[int, Any] = {}
        self._heard: dict[int, tuple[Any, float]] = {}
        self._ended = threading.Event()
        self._beating = None if path is None else threading.Thread(target=self._beat, daemon=True)
        self._path = None if path is None else Path(path).resolve()
        self._storage = self._optuna.storages.InMemoryStorage() if path is None else self._open()
        with self._turn():
            self._study = self._optuna.create_study(
                storage=self._storage, study_name=name, direction="maximize", load_if_exists=True
            )
            self._agree(name)
        self._id = self._storage.get_study_id_from_name(name)

    def __enter__(self) -> SharedStudy:
        if self._beating:
            self._beating.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._beating:
            self._beating.join()
        for number in self._mine:
            self._set_waiting(number)

    def complete(self) -> list[CompleteTrial]:
        return [
            CompleteTrial(t.number, tuple(t.user_attrs["thresholds"]), Outcome(t.value, t.user_attrs["cost"]))
            for t in self._known(self._states.COMPLETE)
        ]

    def take(self, trials: int) -> tuple[int, tuple[float, ...]] | None:
        """Number and thresholds of a trial for this process to evaluate; None while the others' suffice for `trials`."""
        with self._turn():
            for trial in self._known(self._states.RUNNING):
                if self._is_dead(trial):
                    self._set_waiting(trial.number)
            if len(self._known(self._states.COMPLETE, self._states.RUNNING)) >= trials:
                return None
            self._queue_first_trials()
            waiting = self._known(self._states.WAITING)
            number = waiting[0].number if waiting else len(self._known())
            # A new one for each trial, seeded by its number: what is proposed then depends on the study alone, and neither a
            # search that was killed nor a second process repeats the draws of the first.
            self._study.sampler = self._optuna.samplers.GPSampler(
                seed=int(np.random.SeedSequence([self._task.seed, number]).generate_state(1)[0]),
                n_startup_trials=FIRST_TRIALS,
            )
            trial = self._study.ask(
                {name: self._optuna.distributions.FloatDistribution(0, 1) for name in self._task.names}
            )
            trial.set_user_attr("owner", self._run)
            is_start = trial.user_attrs.get("start", False)
            quantiles = [trial.params[name] for name in self._task.names]
            thresholds = self._task.start if is_start else self._task.thresholds(quantiles)
            trial.set_user_attr("thresholds", list(thresholds))
            self._mine[trial.number] = trial
            return trial.number, thresholds

    def finish(self, number: int, outcome: Outcome | None) -> None:
        """Records the outcome of a trial taken before, None that it failed; nothing where others took this process for dead."""
        with self._turn():
            trial = self._mine.pop(number)
            now = self._known()[number]
            if now.state != self._states.RUNNING or now.user_attrs["owner"] != self._run:
                logger.warning(
                    "search: trial %d was given to another process meanwhile; its outcome here is dropped",
                    number,
                )
            elif outcome is None:
                self._study.tell(trial, state=self._states.FAIL)
            else:
                trial.set_user_attr("cost", outcome.cost)
                trial.set_constraint("cost", outcome.cost - self._task.budget)
                self._study.tell(trial, outcome.score)

    def _known(self, *states: Any) -> list[Any]:
        """Trials in any of `states`, or all, by number."""
        return self._study.get_trials(deepcopy=False, states=states or None)

    def _queue_first_trials(self) -> None:
        """Has the start evaluated, unless it is or will be; then, before the Gaussian process can propose, points around it."""
        known = self._known()
        if not any(t.user_attrs.get("start") and t.state != self._states.FAIL for t in known):
            self._enqueue(self._task.start_quantiles(), {"start": True})
        elif not any(t.state == self._states.WAITING for t in known):
            if len(self._known(self._states.COMPLETE)) < FIRST_TRIALS:
                self._enqueue(self._task.near_start(len(known)), {})

    def _enqueue(self, quantiles: list[float], attributes: dict[str, Any]) -> None:
        self._study.enqueue_trial(dict(zip(self._task.names, quantiles)), user_attrs=attributes)

    def _set_waiting(self, number: int) -> None:
        """Lets anyone take a trial; it keeps its number and its quantiles."""
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._id, number)
        with contextlib.suppress(self._optuna.exceptions.UpdateFinishedTrialError):
            self._storage.set_trial_state_values(trial_id, self._states.WAITING)

    def _is_dead(self, trial: Any) -> bool:
        """Whether nobody evaluates a running trial any more."""
        owner = trial.user_attrs.get("owner")
        if owner is None:  # killed within its turn, which is now ours
            return True
        if owner["run"] == self._run["run"]:
            return False
        if owner["machine"] == self._run["machine"]:
            return _started(owner["process"]) != owner["started"]
        beat = (owner["run"], trial.user_attrs.get("beat"))
        if trial.number not in self._heard or self._heard[trial.number][0] != beat:
            self._heard[trial.number] = (beat, time.monotonic())
        return time.monotonic() - self._heard[trial.number][1] > SILENT_SECONDS

    def _beat(self) -> None:
        beats = 0
        while not self._ended.wait(BEAT_SECONDS):
            beats += 1
            for number in list(self._mine):
                trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._id, number)
                with contextlib.suppress(self._optuna.exceptions.UpdateFinishedTrialError):
                    self._storage.set_trial_user_attr(trial_id, "beat", beats)

    def _agree(self, name: str) -> None:
        """Writes into a new study what it is of; refuses a study of something else."""
        begun = self._study.user_attrs
        for key, value in self._task.identity().items():
            if key not in begun:
                self._study.set_user_attr(key, value)
            elif begun[key] != value:
                raise UserError(
                    f"search: study '{name}' in {self._path} was begun with {key} {begun[key]}, not {value}: "
                    f"use another name or storage, or the same {key}"
                )

    def _open(self) -> Any:
        """The journal at the path, after cutting a last line that a killed process left unfinished."""
        journal = self._optuna.storages.journal
        head = b'{"op_code"'
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Not Optuna's default lock, a symbolic link: where two machines mount the file differently it dangles, and then
            # no process ever takes over the lock of a killed one. This one ends 30 s after its process was killed.
            lock = journal.JournalFileOpenLock(str(self._path))
            lock.acquire()
            try:
                with open(self._path, "ab+") as file:
                    file.seek(0)
                    content = file.read()
                    if not head.startswith(content[: len(head)]):
                        raise UserError(
                            f"search: {self._path} is not a study's journal: give another path, or a new one"
                        )
                    if not content.endswith(b"\n"):
                        file.truncate(content.rfind(b"\n") + 1)
            finally:
                lock.release()
            return journal.JournalStorage(journal.JournalFileBackend(str(self._path), lock))
        except OSError as error:
            raise UserError(
                f"search: {self._path} cannot be written ({error.strerror}): give a path in a writable folder"
            ) from error
        except (ValueError, KeyError) as error:
            raise UserError(
                f"search: {self._path} is damaged ({error}): move it away, and the search begins anew"
            ) from error

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Only one process at a time chooses or finishes a trial; the kernel ends the turn of a killed one.

        Where a file system does not know this lock, a trial too many may be evaluated; the journal has another, and stays whole.
        """
        if self._path is None:
            yield
            return
        with open(self._path, "ab") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _import_optuna() -> Any:
    try:
        import optuna
        import optuna.storages.journal
    except ImportError as error:
        raise UserError(
            f"search needs optuna 5 or newer, which cannot be imported ({error}): `pip install optuna`"
        ) from error
    if not hasattr(optuna.Trial, "set_constraint"):
        raise UserError(
            f"search needs optuna 5 or newer, and {optuna.__version__} is installed: `pip install --upgrade optuna`"
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _machine() -> str:
    """Names what process numbers count in: this start of this machine, and this container."""
    return (
        Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    )


def _started(process: int) -> str | None:
    """When process number `process` started, in ticks since boot; None where it does not run. Numbers are used again, with
    another start. Source: proc(5), /proc/pid/stat."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]
