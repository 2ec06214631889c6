"""Tests of the threshold search: its result, its study file, killed processes and failing evaluations."""

import json
import multiprocessing.pool
import os
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from deer_vla_ros.budget.path import ALWAYS, NEVER
from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.search.search import SearchResult, _Study, search
from deer_vla_ros.lab.search.search_task import Outcome, quantile_of, threshold_at

EXITS = 4
SAMPLES = 300


def steps(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns deltas and true errors, (exits, steps) each.

    The deltas of exit 0 are too small and those of exit 2 too large, so thresholds from deltas alone are not
    the best.
    """
    rng = np.random.default_rng(seed)
    errors = (
        rng.gamma(2, 0.5, SAMPLES)
        * np.exp(-0.5 * np.arange(EXITS))[:, None]
        * rng.lognormal(0, 0.3, (EXITS, SAMPLES))
    )
    return errors * np.array([[0.3], [1], [3], [1]]) * rng.lognormal(0, 0.3, (EXITS, SAMPLES)), errors


DELTAS, ERRORS = steps()
CANDIDATES = [np.sort(deltas) for deltas in DELTAS[:-1]]
START = tuple(threshold_at(0.3, values) for values in CANDIDATES) + (ALWAYS,)


def closed_loop(thresholds: tuple[float, ...]) -> Outcome:
    """Returns a simulated score of at most 5, and a cost of 2 GMAC per exit run."""
    stops = np.asarray(thresholds)[:, None] >= DELTAS
    stops[-1] = True
    taken = stops.argmax(0)
    return Outcome(
        float(5 * np.exp(-1.5 * ERRORS[taken, np.arange(SAMPLES)] ** 2).mean()), float(2 * (taken + 1).mean())
    )


BUDGET = closed_loop(START).cost * 1.02


@dataclass
class Recorded:
    """The closed loop; it writes a line to `file` for each call, waits, and fails at the given calls."""

    file: Path
    seconds: float = 0.0
    fails_at: tuple[int, ...] = ()

    def __call__(self, thresholds):
        with open(self.file, "a") as file:
            print(json.dumps([os.getpid(), thresholds]), file=file)
        time.sleep(self.seconds)
        if len(self.calls()) in self.fails_at:
            raise ValueError("the simulator\nfell over")
        return closed_loop(thresholds)

    def calls(self) -> list[tuple[int, tuple[float, ...]]]:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [(process, tuple(thresholds)) for process, thresholds in map(json.loads, lines)]


def started(score: Recorded, journal: Path, *, trials: int, seconds: float) -> subprocess.Popen:
    """Starts the same search in another process, which prints the thresholds that it found."""
    program = (
        "from test_search import *\n"
        f"score = Recorded(Path({str(score.file)!r}), {seconds})\n"
        f"found = search(score, START, BUDGET, CANDIDATES, {trials}, {str(journal)!r})\n"
        "print(json.dumps(found.thresholds))"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
    )


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


deltas = arrays.arrays(np.float64, st.integers(1, 40), elements=st.floats(0, 1e6, width=32)).map(np.sort)


@given(deltas, st.data())
def test_quantile_and_threshold_are_inverses_on_the_grid(values, data):
    for threshold in (NEVER, ALWAYS, *values.tolist()):
        assert threshold_at(quantile_of(threshold, values), values) == threshold
    taken = data.draw(st.integers(0, len(values) + 1))
    if not (1 <= taken < len(values) and values[taken - 1] == values[taken]):
        quantile = taken / (len(values) + 1)
        assert quantile_of(threshold_at(quantile, values), values) == quantile


@given(deltas, st.floats(0, 1), st.floats(0, 1))
def test_a_larger_quantile_never_has_a_smaller_threshold(values, one, other):
    assert threshold_at(min(one, other), values) <= threshold_at(max(one, other), values)


def test_a_threshold_between_two_deltas_has_the_quantile_of_the_lower():
    values = np.array([1.0, 2.0, 2.0, 5.0])
    assert quantile_of(3, values) == quantile_of(2, values) == 3 / 5
    assert [threshold_at(quantile, values) for quantile in (0, 1 / 5, 3 / 5, 1)] == [NEVER, 1, 2, ALWAYS]
    assert quantile_of(0.5, values) == 0 and quantile_of(9, values) == 4 / 5


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_the_search_improves_on_the_start_and_keeps_the_budget(seed, capfd):
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = search(
            closed_loop, START, BUDGET, CANDIDATES, seed=seed, on_trial=lambda *told: seen.append(told)
        )
    assert seen[0] == (0, closed_loop(START))
    assert [number for number, _ in seen] == list(range(20))
    assert found.outcome.cost <= BUDGET and found.outcome.score > closed_loop(START).score + 0.02
    assert found.outcome == closed_loop(found.thresholds) == dict(seen)[found.trial] and found.trials == 20
    assert found.thresholds[-1] == ALWAYS
    # The best score of all is beyond the budget, and trials did pass it.
    assert closed_loop((NEVER,) * 3 + (ALWAYS,)).score > found.outcome.score
    assert any(outcome.cost > BUDGET for _, outcome in seen)
    assert capfd.readouterr() == ("", "")


def test_an_exhaustive_search_is_nearly_reached():
    grid = [[threshold_at(quantile, values) for quantile in np.linspace(0, 1, 21)] for values in CANDIDATES]
    outcomes = [closed_loop((a, b, c, ALWAYS)) for a in grid[0] for b in grid[1] for c in grid[2]]
    best = max(outcome.score for outcome in outcomes if outcome.cost <= BUDGET)
    found = search(closed_loop, START, BUDGET, CANDIDATES, trials=25).outcome.score
    start = closed_loop(START).score
    assert found - start > 0.5 * (best - start)


def test_a_start_that_passes_the_budget_is_replaced_by_one_that_keeps_it():
    found = search(closed_loop, START, BUDGET * 0.9, CANDIDATES)
    assert found.trial != 0 and found.outcome.cost <= BUDGET * 0.9


def test_the_start_is_evaluated_as_it_is_given():
    start = (CANDIDATES[0][7] + 1e-9, -1.0, 1e7, ALWAYS)
    found = search(closed_loop, start, 100, CANDIDATES, trials=1)
    assert found == SearchResult(start, closed_loop(start), trial=0, trials=1)


def test_the_same_seed_gives_the_same_trials(tmp_path):
    runs = [Recorded(tmp_path / str(i)) for i in range(3)]
    for run, seed, journal in zip(runs, (1, 1, 2), (None, tmp_path / "journal", None)):
        search(run, START, BUDGET, CANDIDATES, trials=9, seed=seed, storage=journal)
    first, same, other = ([thresholds for _, thresholds in run.calls()] for run in runs)
    assert first == same != other
    assert len(set(first)) == 9


@pytest.mark.parametrize("evaluations", [1, pytest.param(4, marks=pytest.mark.long)])
def test_a_killed_search_is_taken_up_again_as_if_nothing_had_been(tmp_path, evaluations):
    score, journal = Recorded(tmp_path / "calls"), tmp_path / "journal"
    killed = started(score, journal, trials=9, seconds=0.3)
    wait_for(lambda: len(score.calls()) == evaluations)
    killed.kill()
    os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    seen = []
    found = search(
        score, START, BUDGET, CANDIDATES, 9, journal, on_trial=lambda number, _: seen.append(number)
    )
    killed.communicate()
    assert seen == list(range(9)) and found.trials == 9
    assert len(score.calls()) == 9 + 1, "only the evaluation that was killed is made twice"
    whole = Recorded(tmp_path / "whole")
    assert search(whole, START, BUDGET, CANDIDATES, 9) == found
    assert {thresholds for _, thresholds in score.calls()} == {thresholds for _, thresholds in whole.calls()}
    # A third call has nothing left to do, a fourth asks for one more.
    assert search(score, START, BUDGET, CANDIDATES, 9, journal) == found and len(score.calls()) == 10
    assert search(score, START, BUDGET, CANDIDATES, 10, journal).trials == 10 and len(score.calls()) == 11


def test_a_line_that_a_killed_process_left_unfinished_does_no_harm(tmp_path):
    score, journal = Recorded(tmp_path / "calls"), tmp_path / "journal"
    search(score, START, BUDGET, CANDIDATES, 3, journal)
    with open(journal, "a") as file:
        file.write('{"op_code":4,"worker_id":"ab')
    assert search(score, START, BUDGET, CANDIDATES, 5, journal).trials == 5
    assert len(score.calls()) == 5


def test_two_processes_share_the_work(tmp_path):
    score, journal = Recorded(tmp_path / "calls"), tmp_path / "journal"
    both = [started(score, journal, trials=6, seconds=0.5) for _ in range(2)]
    results = [process.communicate(timeout=30)[0] for process in both]
    calls = score.calls()
    assert results[0] == results[1] != ""
    assert len(calls) == len({thresholds for _, thresholds in calls}) == 6
    assert calls[0][1] == START
    assert all(sum(process == each.pid for process, _ in calls) >= 2 for each in both)


def test_a_trial_of_another_process_is_waited_for_until_that_process_ends(tmp_path):
    score, journal = Recorded(tmp_path / "calls"), tmp_path / "journal"
    other = started(score, journal, trials=1, seconds=60)
    wait_for(lambda: len(score.calls()) == 1)
    with multiprocessing.pool.ThreadPool(1) as pool:
        found = pool.apply_async(search, (score, START, BUDGET, CANDIDATES, 1, journal))
        time.sleep(1.5)
        assert not found.ready() and len(score.calls()) == 1
        other.kill()
        assert found.get(20).trials == 1
    other.communicate()
    assert score.calls() == [(other.pid, START), (os.getpid(), START)]


def test_two_searches_in_one_process_do_not_take_the_same_trial(tmp_path):
    score, journal = Recorded(tmp_path / "calls", seconds=1.5), tmp_path / "journal"
    with multiprocessing.pool.ThreadPool(1) as pool:
        first = pool.apply_async(search, (score, START, BUDGET, CANDIDATES, 1, journal))
        wait_for(lambda: len(score.calls()) == 1)
        assert search(score, START, BUDGET, CANDIDATES, 1, journal) == first.get(10)
    assert len(score.calls()) == 1


def test_where_the_file_server_drops_a_lock_the_second_outcome_of_a_trial_is_dropped(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(_Study, "_set_lock", lambda *_: None)
    score, journal = Recorded(tmp_path / "calls", seconds=1), tmp_path / "journal"
    with multiprocessing.pool.ThreadPool(1) as pool:
        first = pool.apply_async(search, (score, START, BUDGET, CANDIDATES, 1, journal))
        wait_for(lambda: len(score.calls()) == 1)
        assert search(score, START, BUDGET, CANDIDATES, 1, journal) == first.get(10)
    assert caplog.messages == [
        "search: trial 0 was given to another process meanwhile; its outcome here is dropped"
    ]


def test_a_study_of_an_earlier_version_is_continued(tmp_path):
    """That version was killed during trial 2. It went on with the same thresholds."""
    journal = tmp_path / "journal"
    shutil.copy(Path(__file__).parent / "old_study.journal", journal)
    evaluated, seen = [], []

    def score(thresholds):
        evaluated.append(thresholds[0])
        return Outcome(thresholds[0], thresholds[0] / 10)

    candidates = [np.arange(1.0, 101.0)]
    found = search(
        score, (30.0, ALWAYS), 4, candidates, 5, journal, "old", on_trial=lambda *told: seen.append(told)
    )
    assert evaluated == [24, 27, 31]
    assert [(number, outcome.score) for number, outcome in seen] == [
        (0, 30),
        (1, 31),
        (2, 24),
        (3, 27),
        (4, 31),
    ]
    assert found == SearchResult((31.0, ALWAYS), Outcome(31.0, 3.1), trial=1, trials=5)


def test_failing_evaluations_are_survived(tmp_path, caplog):
    score = Recorded(tmp_path / "calls", fails_at=(2, 4))
    found = search(score, START, BUDGET, CANDIDATES, 6, tmp_path / "journal")
    assert found.trials == 6 and len(score.calls()) == 8
    assert caplog.messages == [
        f"search: trial {number} failed: ValueError: the simulator fell over" for number in (1, 3)
    ]


def test_an_outcome_that_is_not_finite_is_a_failure(caplog):
    outcomes = iter([Outcome(1.0, float("nan")), Outcome(float("inf"), 1.0), *[Outcome(1.0, 1.0)] * 3])
    assert search(lambda _: next(outcomes), START, 10, CANDIDATES, 3).outcome == Outcome(1.0, 1.0)
    assert caplog.messages[0] == "search: trial 0 failed: score 1.0 and cost nan are to be finite"


def test_when_all_evaluations_fail_the_last_reason_is_told_and_a_later_call_begins_with_the_start(tmp_path):
    score = Recorded(tmp_path / "calls", fails_at=(1, 2, 3))
    with pytest.raises(
        UserError, match="all 3 evaluations failed, the last with 'ValueError: the simulator fell over'"
    ):
        search(score, START, BUDGET, CANDIDATES, 3, tmp_path / "journal")
    seen = []
    search(
        score, START, BUDGET, CANDIDATES, 3, tmp_path / "journal", on_trial=lambda *told: seen.append(told)
    )
    assert len(seen) == 3 and seen[0][1] == closed_loop(START)


def test_an_interrupted_evaluation_is_made_again(tmp_path):
    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(interrupted, START, BUDGET, CANDIDATES, 2, tmp_path / "journal")
    seen = []
    search(
        closed_loop,
        START,
        BUDGET,
        CANDIDATES,
        2,
        tmp_path / "journal",
        on_trial=lambda number, _: seen.append(number),
    )
    assert seen == [0, 1]


def test_where_no_trial_keeps_the_budget_the_smallest_cost_is_told():
    with pytest.raises(
        UserError,
        match="none of 3 trials keeps the budget of 1; the smallest cost seen is 2.5: allow at least",
    ):
        search(lambda _: Outcome(1.0, 2.5), START, 1, CANDIDATES, 3)


def test_a_study_of_something_else_is_refused(tmp_path):
    journal = tmp_path / "folder" / "journal"
    search(closed_loop, START, BUDGET, CANDIDATES, 1, journal)
    for key, start, budget, candidates in (
        ("budget", START, BUDGET + 1, CANDIDATES),
        ("candidates", START, BUDGET, [values + 1 for values in CANDIDATES]),
        ("start", (0.0, *START[1:]), BUDGET, CANDIDATES),
    ):
        with pytest.raises(
            UserError, match=f"study 'thresholds' in {journal} was begun with {key} .*: use another name"
        ):
            search(closed_loop, start, budget, candidates, 1, journal)
        assert (
            search(closed_loop, start, budget + 10, candidates, 1, journal, name=f"other {key}").trials == 1
        )


def test_a_file_of_something_else_is_left_alone(tmp_path):
    file = tmp_path / "thresholds.yaml"
    file.write_text("exits: [0, 1]")
    with pytest.raises(UserError, match="thresholds.yaml is not a study's journal"):
        search(closed_loop, START, BUDGET, CANDIDATES, 1, file)
    assert file.read_text() == "exits: [0, 1]"
    (tmp_path / "damaged").write_text('{"op_code"}\n' * 3)
    with pytest.raises(UserError, match="is damaged"):
        search(closed_loop, START, BUDGET, CANDIDATES, 1, tmp_path / "damaged")
    with pytest.raises(UserError, match="cannot be written"):
        search(closed_loop, START, BUDGET, CANDIDATES, 1, file / "journal")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"start": (1.0,), "candidates": []}, "1 exits leave nothing to search"),
        ({"start": (*START[:-2], float("nan"), ALWAYS)}, "contains NaN"),
        ({"candidates": CANDIDATES[1:]}, "candidates are of 2 exits, but start has 4 thresholds"),
        ({"candidates": [*CANDIDATES[:2], CANDIDATES[2][::-1]]}, "candidates of exit 2 .* ascending"),
        ({"candidates": [np.array([]), *CANDIDATES[1:]]}, "candidates of exit 0"),
        ({"candidates": [np.array([np.nan]), *CANDIDATES[1:]]}, "candidates of exit 0"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"trials": 0}, "trials is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changed, message):
    arguments = {"score": closed_loop, "start": START, "budget": BUDGET, "candidates": CANDIDATES}
    with pytest.raises(UserError, match=message):
        search(**{**arguments, **changed})


def test_without_optuna_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match="`pip install optuna`"):
        search(closed_loop, START, BUDGET, CANDIDATES, 1)
