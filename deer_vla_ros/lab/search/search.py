"""Which thresholds score best in closed loop under an average budget? Bayesian optimisation, about 20 evaluations.

The paper's online variant. The surrogate is a Gaussian process of the score and another of the cost, and the point proposed next
maximises expected improvement times the probability of keeping the budget (Gardner et al. 2014, Bayesian Optimization with
Inequality Constraints; Optuna's GPSampler): the budget is a constraint here, not a penalty to be weighed against the score.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.search.search_scorers import InProcesses, InThisProcess
from deer_vla_ros.lab.search.search_study import CompleteTrial, SharedStudy
from deer_vla_ros.lab.search.search_task import Outcome, SearchTask

POLL_SECONDS = 0.5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """The best trial that keeps the budget.

    thresholds: one per exit; trial: its number, 0 is the start; trials: complete ones in the study, feasible or not.
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
    task = SearchTask(
        tuple(map(float, start)),
        float(budget),
        tuple(np.asarray(values, dtype=np.float64) for values in candidates),
        seed,
    )
    task.check()
    _check_run(score, trials, storage, workers)
    study = SharedStudy(task, storage, name)
    scorer = InThisProcess(score) if workers == 1 else InProcesses(score, workers)
    with study, scorer:
        failures = _evaluate_missing(study, scorer, trials, workers, on_trial)
    return _best(study.complete(), budget, failures)


def _evaluate_missing(
    study: SharedStudy,
    scorer: InThisProcess | InProcesses,
    trials: int,
    workers: int,
    on_trial: Callable[[int, Outcome], None] | None,
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


def _best(complete: list[CompleteTrial], budget: float, failures: list[str]) -> Found:
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


def _check_run(
    score: Callable[[tuple[float, ...]], Outcome], trials: int, storage: str | Path | None, workers: int
) -> None:
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
