"""How does a trainer not wait for its data? The next batches are made in another thread while it learns from this one."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from deer_vla_ros.lab.training.batches import Batch, BatchSource, Share


class Prefetched:
    """A BatchSource whose batches, asked for in order, are already there; another order is as right, and slower.

    One thread makes them, so a source need not know of threads. An error is raised where its batch is asked for.
    """

    def __init__(self, source: BatchSource, micro_batches: int, ahead: int = 2):
        """micro_batches: of an optimiser step. ahead: how many batches are made before they are asked for."""
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
