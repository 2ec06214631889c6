"""What an evaluation needs of a benchmark: its tasks, and scenes on which chains of instructions run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from deer_vla_ros.lab.scoring.chain_run import Attempt, Chain, Driver
from deer_vla_ros.lab.scoring.sentences import Sentence
from deer_vla_ros.model.action_space import ActionSpace


@dataclass(frozen=True)
class Group:
    """Chains that always run together.

    single: the sentence of instructions that are given alone; None for chains. If its text is empty, the
    benchmark gives the task in words of its own. indices: the numbers of the chains or trials.
    """

    single: Sentence | None
    indices: tuple[int, ...]

    @property
    def key(self) -> str:
        """The group's key in the file of finished parts."""
        if self.single is None:
            return f"chains {self.indices[0]}"
        words = f" in {self.single.wording}: {self.single.text}" if self.single.text else ""
        return f"{self.single.task}{words} {self.indices[0]}"


class ChainScenes(Protocol):
    """The scenes of one process."""

    def chains(self, group: Group) -> list[Chain]:
        """The chains of a group: the same ones in every process."""

    def run(
        self, chains: Sequence[Chain], driver: Driver, step_limit: int, on_chain_end: Callable[[], None]
    ) -> list[tuple[Attempt, ...]]:
        """Runs at most as many chains as there are scenes, as chain_run.run_chains does."""


class Benchmark(Protocol):
    """Where the chains come from and where they run. It is a frozen dataclass that can be pickled.

    tasks: the names of the tasks that are evaluated, in the report's order.
    """

    tasks: tuple[str, ...]

    def identity(self) -> dict[str, Any]:
        """Everything that the figures depend on beside the checkpoint, ready for JSON."""

    def singles(self) -> Sequence[Sentence]:
        """The instructions that can be given alone."""

    def cores_of(self, lanes: int) -> int:
        """The cores that one process with this many scenes keeps busy, its simulators included."""

    def open(self, lanes: int, space: ActionSpace) -> ChainScenes:
        """Makes `lanes` scenes in this process. space: the units of the checkpoint's actions."""
