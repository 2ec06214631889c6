"""The threshold search: Bayesian optimisation of a closed-loop score under an average budget.

This is the paper's online variant; about 20 evaluations are enough. One Gaussian process models the score and
another one models the cost. The next point maximises the expected improvement times the probability that it
keeps the budget (Gardner et al. 2014, Bayesian Optimization with Inequality Constraints; Optuna's GPSampler).
The budget is therefore a constraint, not a penalty that is weighed against the score.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from deer_vla_ros.errors import UserError, cause, shown
from deer_vla_ros.files import writing
from deer_vla_ros.lab.search.search_task import Outcome, SearchTask

FIRST_TRIALS = 5
"""Number of complete trials before the Gaussian process proposes: the start, and points around the start."""

POLL_SECONDS = 0.5
"""Time between two looks at the study while other processes evaluate all missing trials."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchResult:
    """The best trial that keeps the budget.

    thresholds: one per exit. trial: its number; trial 0 is the start. trials: number of complete trials in
    the study.
    """

    thresholds: tuple[float, ...]
    outcome: Outcome
    trial: int
    trials: int


def search(
    score: Callable[[tuple[float, ...]], Outcome],
    start: tuple[float, ...],
    budget: float,
    candidates: Sequence[np.ndarray],
    trials: int = 20,
    storage: str | Path | None = None,
    name: str = "thresholds",
    seed: int = 0,
    on_trial: Callable[[int, Outcome], None] | None = None,
) -> SearchResult:
    """Returns the thresholds of the best score within `budget`, after `trials` evaluations of `score`.

    start: one threshold per exit, solved from calibration. It is evaluated first and unchanged. Its last
    threshold is not searched.
    budget: in the unit of Outcome.cost. candidates: for each searched exit the calibrated deltas (samples,),
    sorted.
    storage: a file that keeps the study `name`; without it the study ends with this call. If the same call is
    made again, after a kill, in another process or on another machine that shares the file, it joins the
    study and evaluates only what is missing to `trials`. If a process dies, its trial is evaluated again at
    the same thresholds.
    seed: one process gives the same trials for the same seed, also if it was killed and called again.
    on_trial: receives the number and the outcome of every complete trial of the study once.

    An evaluation that raises, or whose outcome is not finite, is recorded as failed, logged in one line and
    replaced by another one, until `trials` evaluations have failed in this call. Raises UserError if the
    arguments do not fit, if the study was begun with other arguments, if no trial keeps the budget, or if
    every evaluation failed.
    """
    if trials < 1:
        raise UserError(f"search: trials is {trials}: use 1 or more, about 20")
    deltas = tuple(np.asarray(values, dtype=np.float64) for values in candidates)
    task = SearchTask(tuple(map(float, start)), float(budget), deltas, seed)
    task.check()
    with contextlib.ExitStack() as stack:
        file = None if storage is None else stack.enter_context(_open_journal(Path(storage).resolve()))
        study = _Study(task, file, name)
        failures = _evaluate_missing(study, score, trials, on_trial)
        return _best(study.complete(), budget, failures)


def _evaluate_missing(
    study: _Study,
    score: Callable[[tuple[float, ...]], Outcome],
    trials: int,
    on_trial: Callable[[int, Outcome], None] | None,
) -> list[str]:
    """Returns the failures in this call, after `trials` trials are complete or after as many failed."""
    failures: list[str] = []
    reported: set[int] = set()
    while True:
        complete = study.complete()
        for trial in complete:
            if on_trial and trial.number not in reported:
                reported.add(trial.number)
                on_trial(trial.number, trial.outcome)
        if len(complete) >= trials or len(failures) >= trials:
            return failures
        if (taken := study.take(trials)) is None:
            time.sleep(POLL_SECONDS)
            continue
        result = _evaluate(score, tuple(taken.user_attrs["thresholds"]))
        study.finish(taken, result if isinstance(result, Outcome) else None)
        if isinstance(result, str):
            failures.append(result)
            logger.warning("search: trial %d failed: %s", taken.number, result)


def _evaluate(score: Callable[[tuple[float, ...]], Outcome], thresholds: tuple[float, ...]) -> Outcome | str:
    """Returns the outcome, or one line that says why there is no outcome."""
    try:
        outcome = score(thresholds)
        outcome = Outcome(float(outcome.score), float(outcome.cost))
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    if not (math.isfinite(outcome.score) and math.isfinite(outcome.cost)):
        return f"score {outcome.score} and cost {outcome.cost} are to be finite"
    return outcome


def _best(complete: list[_CompleteTrial], budget: float, failures: list[str]) -> SearchResult:
    if not complete:
        raise UserError(
            f"search: all {len(failures)} evaluations failed, the last with '{failures[-1]}': "
            "put that right and search again"
        )
    feasible = [trial for trial in complete if trial.outcome.cost <= budget]
    if not feasible:
        smallest = min(trial.outcome.cost for trial in complete)
        raise UserError(
            f"search: none of {len(complete)} trials keeps the budget of {budget:g}; the smallest cost seen "
            f"is {smallest:.6g}: allow at least that, or start from thresholds solved for a smaller budget"
        )
    best = max(feasible, key=lambda trial: (trial.outcome.score, -trial.outcome.cost, -trial.number))
    return SearchResult(best.thresholds, best.outcome, best.number, len(complete))


@dataclass(frozen=True)
class _CompleteTrial:
    number: int
    thresholds: tuple[float, ...]
    outcome: Outcome


class _Study:
    """Optuna's study of one task, which several processes can share through a journal file.

    Optuna's heartbeat and its RetryHeartbeatStaleTrialCallback are not used. They need RDBStorage, which
    cannot read the journals of earlier searches and which is not safe as an SQLite file on a network file
    system. They retry a trial only after a grace period and under a new number. Optuna also lets two
    processes together evaluate more than `trials` trials.

    Two kinds of locks on bytes of the journal are used instead. A process holds byte 0 while it takes or
    finishes a trial, and byte N + 1 while it evaluates trial N. The kernel (on a network file system: the
    server) releases the locks of a process however it ends.
    """

    def __init__(self, task: SearchTask, file: BinaryIO | None, name: str):
        self._optuna, self._task, self._file = _import_optuna(), task, file
        self._states = self._optuna.trial.TrialState
        try:
            with self._turn():
                self._storage = (
                    self._optuna.storages.InMemoryStorage() if file is None else self._read_journal()
                )
                self._study = self._optuna.create_study(
                    storage=self._storage, study_name=name, direction="maximize", load_if_exists=True
                )
                self._check_identity(name)
        except UserError:
            raise
        except Exception as error:  # for a changed journal, Optuna may raise anything
            raise self._damaged(error) from error

    def complete(self) -> list[_CompleteTrial]:
        """The complete trials. Raises UserError if the journal says other things of them than `finish`."""
        try:
            return [
                _CompleteTrial(
                    t.number, self._thresholds_of(t), Outcome(float(t.value), float(t.user_attrs["cost"]))
                )
                for t in self._trials(self._states.COMPLETE)
            ]
        except UserError:
            raise
        except Exception as error:  # for a changed journal, Optuna may raise anything
            raise self._damaged(error) from error

    def _thresholds_of(self, trial: Any) -> tuple[float, ...]:
        found = tuple(map(float, trial.user_attrs["thresholds"]))
        if len(found) != len(self._task.start):
            raise ValueError(f"{len(found)} thresholds")
        return found

    def _damaged(self, error: Exception) -> Exception:
        if self._file is None:
            return error
        return UserError(
            f"search: {self._file.name} is damaged ({cause(error)}): move it away, and the search begins anew"
        )

    def take(self, trials: int) -> Any:
        """Returns the Optuna trial that this process evaluates next; its attribute "thresholds" says where.

        Returns None while other processes evaluate all that is missing to `trials`.
        """
        with self._turn():
            for trial in self._trials(self._states.RUNNING):
                if self._lock(trial.number + 1):  # the process that evaluated this trial has ended
                    self._unlock(trial.number + 1)
                    self._storage.set_trial_state_values(trial._trial_id, self._states.WAITING)
            if len(self._trials(self._states.COMPLETE, self._states.RUNNING)) >= trials:
                return None
            self._queue_first_trials()
            waiting = self._trials(self._states.WAITING)
            number = waiting[0].number if waiting else len(self._trials())
            # Every trial has a sampler of its own, whose seed depends on the trial's number. A search that
            # was killed and a second process then propose what one uninterrupted process proposes.
            self._study.sampler = self._optuna.samplers.GPSampler(
                seed=int(np.random.SeedSequence([self._task.seed, number]).generate_state(1)[0]),
                n_startup_trials=FIRST_TRIALS,
            )
            trial = self._study.ask(
                {name: self._optuna.distributions.FloatDistribution(0, 1) for name in self._task.names}
            )
            quantiles = [trial.params[name] for name in self._task.names]
            is_start = trial.user_attrs.get("start", False)
            thresholds = self._task.start if is_start else self._task.thresholds(quantiles)
            trial.set_user_attr("thresholds", list(thresholds))
            self._lock(trial.number + 1)
            return trial

    def finish(self, trial: Any, outcome: Outcome | None) -> None:
        """Records the outcome of a trial that `take` returned; None records that it failed."""
        with self._turn():
            if self._trials()[trial.number].state != self._states.RUNNING:
                # A network file system can drop the locks of a process that it could not reach for a while.
                logger.warning(
                    "search: trial %d was given to another process meanwhile; its outcome here is dropped",
                    trial.number,
                )
            elif outcome is None:
                self._study.tell(trial, state=self._states.FAIL)
            else:
                trial.set_user_attr("cost", outcome.cost)
                trial.set_constraint("cost", outcome.cost - self._task.budget)
                self._study.tell(trial, outcome.score)
            self._unlock(trial.number + 1)

    def _trials(self, *states: Any) -> list[Any]:
        """Returns the trials in any of `states`, or all trials, by number."""
        return self._study.get_trials(deepcopy=False, states=states or None)

    def _queue_first_trials(self) -> None:
        """Queues the start if it is missing, or a point around it while FIRST_TRIALS are not complete."""
        known, waiting = self._trials(), self._trials(self._states.WAITING)
        if not any(t.user_attrs.get("start") and t.state != self._states.FAIL for t in known):
            quantiles, attributes = self._task.start_quantiles(), {"start": True}
        elif not waiting and len(self._trials(self._states.COMPLETE)) < FIRST_TRIALS:
            quantiles, attributes = self._task.near_start(len(known)), {}
        else:
            return
        self._study.enqueue_trial(dict(zip(self._task.names, quantiles)), user_attrs=attributes)

    def _check_identity(self, name: str) -> None:
        """Writes into a new study what its task is. Raises UserError if the study is of another task."""
        begun = self._study.user_attrs
        for key, value in self._task.identity().items():
            if key not in begun:
                self._study.set_user_attr(key, value)
            elif begun[key] != value:
                raise UserError(
                    f"search: study '{name}' in {self._file.name} was begun with {key} {shown(begun[key])}, "
                    f"not {value}: use another name or storage, or the same {key}"
                )

    def _read_journal(self) -> Any:
        journal, path = self._optuna.storages.journal, self._file.name
        # Optuna's default lock is a symbolic link. It dangles where two machines mount the file at different
        # paths, and then no process ever takes over the lock of a killed process. This lock is taken over
        # after 30 s.
        return journal.JournalStorage(journal.JournalFileBackend(path, journal.JournalFileOpenLock(path)))

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Lets only one process at a time take or finish a trial."""
        self._lock(0, wait=True)
        try:
            with contextlib.ExitStack() as stack:
                if self._file:
                    path = Path(self._file.name)
                    stack.enter_context(writing(path))
                    _cut_unfinished_line(path)
                yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                if self._file and os.path.getsize(self._file.name) == 0:  # the disk is full
                    os.unlink(self._file.name)
            self._unlock(0)

    def _lock(self, byte: int, wait: bool = False) -> bool:
        """Returns whether this study now holds the lock. A study in memory always does."""
        try:
            self._set_lock(byte, fcntl.F_WRLCK, wait)
        except BlockingIOError:
            return False
        return True

    def _unlock(self, byte: int) -> None:
        self._set_lock(byte, fcntl.F_UNLCK)

    def _set_lock(self, byte: int, kind: int, wait: bool = False) -> None:
        """Uses "open file description locks" (fcntl(2)): two searches in one process do not share them."""
        if self._file:
            request = struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)  # struct flock
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, request)


def _open_journal(path: Path) -> BinaryIO:
    """Opens or creates the journal. Raises UserError if it cannot be written or is something else."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab+")
    file.seek(0)
    head = b'{"op_code"'
    if not head.startswith(file.read(len(head))):
        file.close()
        raise UserError(f"search: {path} is not a study's journal: give another path, or a new one")
    return file


def _cut_unfinished_line(path: Path) -> None:
    """Removes a last line that a killed process left incomplete; Optuna would append to it."""
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


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
            f"search needs optuna 5 or newer, and {optuna.__version__} is installed: "
            "`pip install --upgrade optuna`"
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
