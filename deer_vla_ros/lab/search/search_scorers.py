"""Where a search's thresholds are evaluated: in this process, or in several of their own."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection

from deer_vla_ros.lab.search.search_task import Outcome


class InThisProcess:
    """Evaluates in this process, at once."""

    def __init__(self, score: Callable[[tuple[float, ...]], Outcome]):
        self._score = score

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, thresholds: tuple[float, ...]) -> Future:
        future: Future = Future()
        future.set_result(_evaluate(self._score, thresholds))
        return future


class InProcesses:
    """Evaluates in processes of their own, which end with this one, however it ends."""

    def __init__(self, score: Callable[[tuple[float, ...]], Outcome], workers: int):
        self._score, self._workers = score, workers

    def __enter__(self) -> InProcesses:
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
        return ProcessPoolExecutor(
            self._workers, self._context, _begin_process, (self._score, self._parent_lives)
        )


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
