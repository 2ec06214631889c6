"""The simulated table as a benchmark (benchmark.Benchmark)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from deer_vla_ros.lab.checksums import json_sha256
from deer_vla_ros.lab.scoring.benchmark import Group
from deer_vla_ros.lab.scoring.chain_run import Attempt, Chain, Driver, run_chains
from deer_vla_ros.lab.scoring.sentences import Sentence, sentences_sha256
from deer_vla_ros.lab.scoring.table_chains import (
    Draw,
    chain_seed,
    draw_chain,
    draw_single,
    drawn_from,
    phrasings,
    single_seed,
)
from deer_vla_ros.lab.scoring.table_scene import TableScene
from deer_vla_ros.lab.sim.tasks import TASKS
from deer_vla_ros.model.action_space import ActionSpace

ALL_TASKS = tuple(task.name for task in TASKS)


@dataclass(frozen=True)
class TableBenchmark:
    """Chains that the scripted expert has carried out on the table.

    seed: selects the set of chains. phrasings: the table's own wordings, "training", "held-out" or "both".
    tasks: those that are evaluated. sentences: replace the table's own wordings.
    """

    seed: int = 0
    phrasings: str = "training"
    tasks: tuple[str, ...] = ALL_TASKS
    sentences: tuple[Sentence, ...] = ()

    def identity(self) -> dict[str, Any]:
        return {
            "benchmark": "table",
            "tasks_sha256": tasks_sha256(),
            "seed": self.seed,
            "phrasings": self.phrasings,
            "tasks_asked_for": list(self.tasks),
            "sentences_sha256": sentences_sha256(self.sentences),
        }

    def singles(self) -> list[Sentence]:
        return list(self.sentences) or [Sentence(task, "", "") for task in self.tasks]

    def cores_of(self, lanes: int) -> int:
        return 1

    def open(self, lanes: int, space: ActionSpace) -> TableScenes:
        return TableScenes(self, lanes)


class TableScenes:
    """Tables in one process. See benchmark.ChainScenes."""

    def __init__(self, benchmark: TableBenchmark, lanes: int):
        self._benchmark = benchmark
        self._scenes = [TableScene() for _ in range(lanes)]
        self._words = (
            drawn_from(benchmark.sentences) if benchmark.sentences else phrasings(benchmark.phrasings)
        )
        self._single = cache(self._draw_single)  # Many sentences are given in the same states.

    def chains(self, group: Group) -> list[Chain]:
        asked, single = self._benchmark, group.single
        if single is None:
            table = self._scenes[0].table
            draws = [draw_chain(table, chain_seed(asked.seed, index), asked.tasks) for index in group.indices]
            return [draw.worded(self._words) for draw in draws]
        words = (lambda tasks, random: [single]) if single.text else self._words
        return [self._single(single.task, index).worded(words) for index in group.indices]

    def _draw_single(self, task: str, trial: int) -> Draw:
        return draw_single(self._scenes[0].table, task, single_seed(self._benchmark.seed, task, trial))

    def run(
        self, chains: Sequence[Chain], driver: Driver, step_limit: int, on_chain_end: Callable[[], None]
    ) -> list[tuple[Attempt, ...]]:
        return run_chains(chains, self._scenes[: len(chains)], driver, step_limit, on_chain_end)


def tasks_sha256() -> str:
    """The SHA-256 sum of all tasks and their phrasings.

    It covers neither the simulation nor the criteria of success.
    """
    return json_sha256([[task.name, task.phrasings, task.held_out] for task in TASKS])
