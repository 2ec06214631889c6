"""Prefetching: another thread makes the next batches while the trainer uses the current one."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from deer_vla_ros.lab.training.batches import Batch, BatchSource, Share


class Prefetched:
    """A BatchSource that makes the next batches in advance.

    Requests in another order are correct, but slower. Only one thread uses the source. An error of the source
    is raised when its batch is requested.
    """

    def __init__(self, source: BatchSource, micro_batches: int, ahead: int = 2):
        """micro_batches: per optimiser step. ahead: number of batches that are made in advance."""
        self._source, self._micro_batches, self._ahead = source, micro_batches, ahead
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._coming: dict[tuple[int, int, Share], Future[Batch]] = {}

    def batch(self, step: int, micro: int, share: Share) -> Batch:
        number = step * self._micro_batches + micro
        wanted = [
            (*divmod(later, self._micro_batches), share) for later in range(number, number + 1 + self._ahead)
        ]
        for key in wanted:
            if key not in self._coming:
                self._coming[key] = self._thread.submit(self._source.batch, *key)
        for key in self._coming.keys() - set(wanted):
            self._coming.pop(key).cancel()
        return self._coming.pop(wanted[0]).result()
