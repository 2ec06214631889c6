"""Which thresholds score best in closed loop under an average budget? Bayesian optimisation, about 20 evaluations.

The paper's online variant. The surrogate is a Gaussian process of the score and another of the cost, and the point proposed next
maximises expected improvement times the probability of keeping the budget (Gardner et al. 2014, Bayesian Optimization with
Inequality Constraints; Optuna's GPSampler): the budget is a constraint here, not a penalty to be weighed against the score.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import math
import multiprocessing
import os
import pickle
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from deer_vla_ros.budget.families import ALWAYS, NEVER
from deer_vla_ros.errors import UserError

FIRST_TRIALS = 5
"""Complete trials, the start among them, before the Gaussian process proposes. Those after the start lie around it."""

FIRST_SPREAD = 0.1
"""Standard deviation of their quantiles about the start's."""

POLL_SECONDS = 0.5
BEAT_SECONDS = 15.0
SILENT_SECONDS = 60.0
"""A trial of a process on another machine tells that it lives every BEAT_SECONDS; unheard for SILENT_SECONDS, it is dead."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What one closed-loop evaluation gave.

    score: larger is better, say the average successful length; cost: mean per step, in the unit of the budget.
    """

    score: float
    cost: float


@dataclass(frozen=True)
class Found:
    """The best trial that keeps the budget.

    thresholds: one per exit; trial: its number, 0 is the start; trials: complete ones in the study, feasible or not.
    """

    thresholds: tuple[float, ...]
    outcome: Outcome
    trial: int
    trials: int


def threshold_at(quantile: float, values: np.ndarray) -> float:
    """The threshold that about the share `quantile` of calibrated deltas `values` (samples,), sorted, does not exceed.

    Quantiles are counted in steps of 1 / (samples + 1): 0 is NEVER, 1 is ALWAYS, between them each delta has one.
    """
    taken = round(quantile * (len(values) + 1))
    if taken == 0:
        return NEVER
    return ALWAYS if taken > len(values) else float(values[taken - 1])


def quantile_of(threshold: float, values: np.ndarray) -> float:
    """The quantile of `threshold` among deltas `values` (samples,), sorted: `threshold_at` gives the threshold back exactly
    where it is one of them, NEVER or ALWAYS, and the next lower of these where it is not. Equal deltas share the highest."""
    if threshold >= ALWAYS:
        return 1.0
    return int(np.searchsorted(values, threshold, side="right")) / (len(values) + 1)


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
    workers: int = 1,
) -> Found:
    """The thresholds of the best score whose cost keeps `budget`, after `trials` complete evaluations of `score`.

    start: one threshold per exit, solved from calibration; evaluated first, as it is. Its last is not searched.
    budget: in the unit of Outcome.cost. candidates: per searched exit the calibrated deltas (samples,), sorted.
    storage: a file that keeps the study `name`; without one it ends with this call. The same call again, after a kill, from
    another process or from another machine that shares the file, joins the study and only makes up what is missing to `trials`.
    A trial whose process died is evaluated again at the same thresholds.
    seed: one process gives the same trials for the same seed, also when it was killed and called again in between.
    on_trial: gets the number and outcome of every complete trial once, in this process; those of earlier calls and of other
    processes too.
    workers: processes on this machine; then `score` has to be picklable and `storage` a path.

    An evaluation that raises, or whose outcome is not finite, is recorded as failed and logged in one line; others are made in
    its place until `trials` have failed in this call. Raises UserError where arguments do not fit, the study was begun with other
    ones, no trial keeps the budget, or every evaluation failed.
    """
    optuna = _import_optuna()
    task = _Task(
        tuple(map(float, start)), float(budget), tuple(np.asarray(values, dtype=np.float64) for values in candidates), seed
    )
    task.check()
    _check_run(score, trials, storage, workers)
    study = _Study(optuna, task, storage, name)
    scorer = _Here(score) if workers == 1 else _Processes(score, workers)
    with study, scorer:
        failures = _evaluate_missing(study, scorer, trials, workers, on_trial)
    return _best(study.complete(), budget, failures)


@dataclass(frozen=True, eq=False)
class _Task:
    """What is searched; a study is of one task."""

    start: tuple[float, ...]
    budget: float
    candidates: tuple[np.ndarray, ...]
    seed: int

    def check(self) -> None:
        if any(math.isnan(threshold) for threshold in self.start):
            raise UserError(f"search: start {self.start} contains NaN: use {NEVER:g} for never, {ALWAYS:g} for always")
        if len(self.start) < 2:
            raise UserError(
                f"search: {len(self.start)} exits leave nothing to search, as the last is always taken: give two or more"
            )
        if len(self.candidates) != len(self.start) - 1:
            raise UserError(
                f"search: candidates are of {len(self.candidates)} exits, but start has {len(self.start)} thresholds: "
                f"give candidates for the {len(self.start) - 1} exits before the last"
            )
        for i, values in enumerate(self.candidates):
            if (
                values.ndim != 1
                or not len(values)
                or not np.all((values > NEVER) & (values < ALWAYS))
                or np.any(np.diff(values) < 0)
            ):
                raise UserError(
                    f"search: candidates of exit {i} have shape {values.shape}, and are to be one or more ascending deltas "
                    f"between {NEVER:g} and {ALWAYS:g}: calibrate again, or sort them"
                )
        if not math.isfinite(self.budget):
            raise UserError(f"search: budget is {self.budget}, which no cost can be held against: give a finite one")
        if self.seed < 0:
            raise UserError(f"search: seed is {self.seed}: use 0 or more")

    def identity(self) -> dict[str, Any]:
        """What a later call on the same study has to repeat."""
        content = hashlib.sha256()
        for values in self.candidates:
            content.update(f"{len(values)} ".encode() + values.tobytes())
        return {"budget": self.budget, "start": list(self.start), "candidates": content.hexdigest()[:16]}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the searched exits, as the study calls their quantiles."""
        return tuple(f"exit {i}" for i in range(len(self.candidates)))

    def start_quantiles(self) -> list[float]:
        return [quantile_of(threshold, values) for threshold, values in zip(self.start, self.candidates)]

    def near_start(self, number: int) -> list[float]:
        """Quantiles for trial `number`, drawn around the start's."""
        drawn = np.random.default_rng([self.seed, number]).normal(self.start_quantiles(), FIRST_SPREAD)
        return np.clip(drawn, 0, 1).tolist()

    def thresholds(self, quantiles: Sequence[float]) -> tuple[float, ...]:
        return (*(threshold_at(quantile, values) for quantile, values in zip(quantiles, self.candidates)), self.start[-1])


@dataclass(frozen=True, eq=False)
class _Complete:
    """A complete trial."""

    number: int
    thresholds: tuple[float, ...]
    outcome: Outcome


class _Study:
    """Optuna's study, shared fairly: who takes which trial, who still lives, and what is complete.

    Between `with` and its end it keeps telling the other machines that this process lives. At the end it gives back the trials
    that it has not finished.
    """

    def __init__(self, optuna: Any, task: _Task, path: str | Path | None, name: str):
        self._optuna, self._task = optuna, task
        self._states = optuna.trial.TrialState
        self._run = {"run": uuid.uuid4().hex, "machine": _machine(), "process": os.getpid(), "started": _started(os.getpid())}
        self._mine: dict[int, Any] = {}
        self._heard: dict[int, tuple[Any, float]] = {}
        self._ended = threading.Event()
        self._beating = None if path is None else threading.Thread(target=self._beat, daemon=True)
        self._path = None if path is None else Path(path).resolve()
        self._storage = optuna.storages.InMemoryStorage() if path is None else self._open()
        with self._turn():
            self._study = optuna.create_study(storage=self._storage, study_name=name, direction="maximize", load_if_exists=True)
            self._agree(name)
        self._id = self._storage.get_study_id_from_name(name)

    def __enter__(self) -> _Study:
        if self._beating:
            self._beating.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._beating:
            self._beating.join()
        for number in self._mine:
            self._set_waiting(number)

    def complete(self) -> list[_Complete]:
        return [
            _Complete(t.number, tuple(t.user_attrs["thresholds"]), Outcome(t.value, t.user_attrs["cost"]))
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
                seed=int(np.random.SeedSequence([self._task.seed, number]).generate_state(1)[0]), n_startup_trials=FIRST_TRIALS
            )
            trial = self._study.ask({name: self._optuna.distributions.FloatDistribution(0, 1) for name in self._task.names})
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
                logger.warning("search: trial %d was given to another process meanwhile; its outcome here is dropped", number)
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
                        raise UserError(f"search: {self._path} is not a study's journal: give another path, or a new one")
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
            raise UserError(f"search: {self._path} is damaged ({error}): move it away, and the search begins anew") from error

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


class _Here:
    """Evaluates in this process, at once."""

    def __init__(self, score: Callable[[tuple[float, ...]], Outcome]):
        self._score = score

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, thresholds: tuple[float, ...]) -> Future:
        future: Future = Future()
        future.set_result(_evaluate(self._score, thresholds))
        return future


class _Processes:
    """Evaluates in processes of their own, which end with this one, however it ends."""

    def __init__(self, score: Callable[[tuple[float, ...]], Outcome], workers: int):
        self._score, self._workers = score, workers

    def __enter__(self) -> _Processes:
        # Spawned, not forked: a fork may not use CUDA, nor the threads of torch.
        self._context = multiprocessing.get_context("spawn")
        self._parent_lives, self._held_here = self._context.Pipe(duplex=False)
        self._pool = self._new_pool()
        return self

    def __exit__(self, *_: object) -> None:
        self._held_here.close()
        self._pool.shutdown()
        self._parent_lives.close()

    def submit(self, thresholds: tuple[float, ...]) -> Future:
        try:
            return self._pool.submit(_evaluate_in_process, thresholds)
        except BrokenProcessPool:
            self._pool.shutdown()
            self._pool = self._new_pool()
            return self._pool.submit(_evaluate_in_process, thresholds)

    def _new_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._workers, self._context, _begin_process, (self._score, self._parent_lives))


_score_of_process: Callable[[tuple[float, ...]], Outcome] | None = None


def _begin_process(score: Callable[[tuple[float, ...]], Outcome], parent_lives: Connection) -> None:
    """First in a process of the pool. The other end of `parent_lives` closes when the parent ends its search or dies."""
    global _score_of_process
    _score_of_process = score
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        parent_lives.poll(None)
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _evaluate_in_process(thresholds: tuple[float, ...]) -> Outcome | str:
    return _evaluate(_score_of_process, thresholds)


def _evaluate(score: Callable[[tuple[float, ...]], Outcome], thresholds: tuple[float, ...]) -> Outcome | str:
    """The outcome, or in one line why there is none: exceptions do not always survive the way between processes."""
    try:
        outcome = score(thresholds)
        outcome = Outcome(float(outcome.score), float(outcome.cost))
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    if not (math.isfinite(outcome.score) and math.isfinite(outcome.cost)):
        return f"score {outcome.score} and cost {outcome.cost} are to be finite"
    return outcome


def _evaluate_missing(
    study: _Study, scorer: _Here | _Processes, trials: int, workers: int, on_trial: Callable[[int, Outcome], None] | None
) -> list[str]:
    """Returns once `trials` are complete, or as many failed here; why they failed, in order."""
    failures: list[str] = []
    flying: dict[Future, int] = {}
    told: set[int] = set()
    while True:
        while len(flying) < workers and len(failures) < trials and (taken := study.take(trials)):
            number, thresholds = taken
            flying[scorer.submit(thresholds)] = number
        idle = not flying
        for future in wait(flying, POLL_SECONDS, FIRST_COMPLETED).done:
            number = flying.pop(future)
            try:
                result = future.result()
            except BrokenProcessPool as error:
                result = f"its process died: {error}"
            study.finish(number, result if isinstance(result, Outcome) else None)
            if isinstance(result, str):
                failures.append(result)
                logger.warning("search: trial %d failed: %s", number, result)
        complete = study.complete()
        for trial in complete:
            if on_trial and trial.number not in told:
                told.add(trial.number)
                on_trial(trial.number, trial.outcome)
        if not flying and (len(complete) >= trials or len(failures) >= trials):
            return failures
        if idle:
            time.sleep(POLL_SECONDS)  # the others evaluate what is missing


def _best(complete: list[_Complete], budget: float, failures: list[str]) -> Found:
    if not complete:
        raise UserError(
            f"search: all {len(failures)} evaluations failed, the last with '{failures[-1]}': put that right and search again"
        )
    feasible = [trial for trial in complete if trial.outcome.cost <= budget]
    if not feasible:
        smallest = min(trial.outcome.cost for trial in complete)
        raise UserError(
            f"search: none of {len(complete)} trials keeps the budget of {budget:g}; the smallest cost seen is {smallest:.6g}: "
            "allow at least that, or start from thresholds solved for a smaller budget"
        )
    best = max(feasible, key=lambda trial: (trial.outcome.score, -trial.outcome.cost, -trial.number))
    return Found(best.thresholds, best.outcome, best.number, len(complete))


def _check_run(score: Callable[[tuple[float, ...]], Outcome], trials: int, storage: str | Path | None, workers: int) -> None:
    if trials < 1:
        raise UserError(f"search: trials is {trials}: use 1 or more, about 20")
    if workers < 1:
        raise UserError(f"search: workers is {workers}: use 1 or more")
    if workers == 1:
        return
    if storage is None:
        raise UserError(
            f"search: {workers} workers share a study through its file, and storage is not given: give a path, or 1 worker"
        )
    try:
        pickle.dumps(score)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(
            f"search: the score cannot be sent to {workers} workers ({error}): use 1 worker, or a function of a module"
        ) from error


def _import_optuna() -> Any:
    try:
        import optuna
        import optuna.storages.journal
    except ImportError as error:
        raise UserError(f"search needs optuna 5 or newer, which cannot be imported ({error}): `pip install optuna`") from error
    if not hasattr(optuna.Trial, "set_constraint"):
        raise UserError(f"search needs optuna 5 or newer, and {optuna.__version__} is installed: `pip install --upgrade optuna`")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _machine() -> str:
    """Names what process numbers count in: this start of this machine, and this container."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")


def _started(process: int) -> str | None:
    """When process number `process` started, in ticks since boot; None where it does not run. Numbers are used again, with
    another start. Source: proc(5), /proc/pid/stat."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]
