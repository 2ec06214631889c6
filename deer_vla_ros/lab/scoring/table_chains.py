"""The chains of instructions on the simulated table, drawn from seeds. The scripted expert has carried out
each of them once.

A chain has five instructions (CALVIN's LH-MTLC protocol, Mees et al. 2022, arXiv 2112.03227).
A single instruction follows a few tasks that the expert carries out first.
Each task is drawn from those that are possible in the table's state at that time. CALVIN's own sequences
differ: they take their tasks from five different categories.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.demonstrations.demonstrations import STEP_LIMIT
from deer_vla_ros.lab.scoring.chain_run import CHAIN_LENGTH, Chain
from deer_vla_ros.lab.scoring.sentences import Sentence
from deer_vla_ros.lab.sim.expert import act
from deer_vla_ros.lab.sim.table import Table
from deer_vla_ros.lab.sim.table_arm import TableArm
from deer_vla_ros.lab.sim.tasks import BY_NAME, NEEDS_HELD_BLOCK, TASKS, Task

LONGEST_PREFIX = 3
FIRST_SEED = 1_000_000
"""Smaller seeds belong to training, calibration and search."""
SEEDS_PER_RUN = 100_000
SINGLES_FROM = 50_000
"""A run's seeds from this number on belong to single instructions, the smaller ones to chains."""
MOST_TRIALS = 1_000
"""The number of seeds, and so the most trials, of each single task."""

_ATTEMPTS = 64
_TABLE_SEEDS = 2**32
"""Evaluations arrange the table by seeds from this number on; recordings use smaller ones."""
_WEIGHTS = {
    "place_in_drawer": 7.0,
    "stack_block": 2.7,
    "take_out_of_drawer": 6.0,
    "unstack_block": 1.3,
    **{task.name: 1.6 for task in TASKS if task.name.startswith("push_")},
    **{task.name: 12.0 for task in TASKS if task.name.startswith(("lift_nearest", "lift_farthest"))},
}
"""The weight of a possible task in the draw; others have weight 1. All tasks then occur about equally
often."""


Words = Callable[[Sequence[str], np.random.Generator], Sequence[Sentence]]
"""Draws a sentence for each task."""


@dataclass(frozen=True)
class TableStart:
    """The state in which a chain begins.

    table_seed: the argument of `Table.reset(table_seed, varied=True)`. prefix: tasks that the expert carries
    out first.
    """

    table_seed: int
    prefix: tuple[str, ...] = ()


@dataclass(frozen=True)
class Draw:
    """Tasks that the expert has carried out one after the other, and the state in which they begin.

    seed, attempt: of the draw. Earlier attempts failed.
    """

    seed: int
    attempt: int
    start: TableStart
    tasks: tuple[str, ...]

    def worded(self, words: Words) -> Chain:
        """The chain with its sentences.

        They have a random stream of their own, so that other words leave the tasks as they are.
        """
        given = words(self.tasks, np.random.default_rng([self.seed, self.attempt, 1]))
        return Chain(
            self.start, self.tasks, tuple(each.text for each in given), tuple(each.wording for each in given)
        )


def phrasings(kind: str) -> Words:
    """The table's own phrasings. kind: "training", "held-out" or "both", which is half of each."""

    def words(tasks: Sequence[str], random: np.random.Generator) -> list[Sentence]:
        held_out = [kind == "held-out" or (kind == "both" and bool(random.integers(2))) for _ in tasks]
        return [
            Sentence(
                name,
                str(random.choice(BY_NAME[name].held_out if new else BY_NAME[name].phrasings)),
                "held-out" if new else "training",
            )
            for name, new in zip(tasks, held_out)
        ]

    return words


def drawn_from(sentences: Sequence[Sentence]) -> Words:
    """Words that are drawn from `sentences`, which have to contain at least one for each task."""
    by_task = {name: [each for each in sentences if each.task == name] for name in BY_NAME}

    def words(tasks: Sequence[str], random: np.random.Generator) -> list[Sentence]:
        return [by_task[name][random.integers(len(by_task[name]))] for name in tasks]

    return words


def chain_seed(run: int, index: int) -> int:
    """The seed of chain number `index` of the evaluation with `--seed run`."""
    return FIRST_SEED + run * SEEDS_PER_RUN + index


def single_seed(run: int, task: str, trial: int) -> int:
    """The seed of a task's trial number `trial` of the evaluation with `--seed run`."""
    return FIRST_SEED + run * SEEDS_PER_RUN + SINGLES_FROM + TASKS.index(BY_NAME[task]) * MOST_TRIALS + trial


def draw_chain(table: Table, seed: int, tasks: Collection[str] = BY_NAME.keys()) -> Draw:
    """Five of `tasks` that the expert has just carried out on `table`. If the expert fails, others are drawn.

    Raises UserError if the expert fails too often.
    """
    for attempt in range(_ATTEMPTS):
        random, table_seed = _begin(table, seed, attempt)
        done = _carry_out_some(TableArm(table), CHAIN_LENGTH, random, tasks)
        if len(done) == CHAIN_LENGTH:
            return Draw(seed, attempt, TableStart(table_seed), done)
    raise UserError(
        f"chain of seed {seed}: in {_ATTEMPTS} attempts no chain of {CHAIN_LENGTH} was found among the tasks "
        f"{', '.join(tasks)}: none of them may follow itself, so give more tasks, or --chains 0 and --trials"
    )


def draw_single(table: Table, task: str, seed: int) -> Draw:
    """One task, which the expert has just carried out after up to LONGEST_PREFIX other tasks.

    Raises UserError if no state is found in which the expert succeeds.
    """
    for attempt in range(_ATTEMPTS):
        random, table_seed = _begin(table, seed, attempt)
        arm, needs_block = TableArm(table), task in NEEDS_HELD_BLOCK
        count = int(random.integers(LONGEST_PREFIX + 1 - needs_block))
        prefix = _carry_out_some(arm, count, random)
        if needs_block:
            lifts = [name for name in BY_NAME if name.startswith("lift_")]
            prefix += _carry_out_some(arm, 1, random, lifts, prefix)
        is_complete = len(prefix) == count + needs_block
        if is_complete and BY_NAME[task].possible(table.state()) and carry_out(arm, task):
            return Draw(seed, attempt, TableStart(table_seed, prefix), (task,))
    raise UserError(f"{task} of seed {seed}: found in none of {_ATTEMPTS} states: it has become infeasible")


def carry_out(arm: TableArm, name: str) -> bool:
    """Lets the expert carry out a task. Returns whether it succeeded within STEP_LIMIT steps."""
    task, before = BY_NAME[name], arm.table.state()
    for _ in range(STEP_LIMIT):
        intent = act(name, arm.table.state())
        arm.step(intent.pose, intent.open)
        if task.succeeded(before, arm.table.state()):
            return True
    return False


def set_up(start: TableStart, table: Table) -> TableArm:
    """Brings the table into the state in which a chain begins; the same start always gives the same state.

    Raises RuntimeError if the expert fails in the prefix.
    """
    table.reset(start.table_seed, varied=True)
    arm = TableArm(table)
    for name in start.prefix:
        if not carry_out(arm, name):
            raise RuntimeError(
                f"the expert fails {name} of the prefix {start.prefix}, which it did when the chain was drawn"
            )
    return arm


def _begin(table: Table, seed: int, attempt: int) -> tuple[np.random.Generator, int]:
    table_seed = _TABLE_SEEDS + seed * _ATTEMPTS + attempt
    table.reset(table_seed, varied=True)
    return np.random.default_rng([seed, attempt]), table_seed


def _carry_out_some(
    arm: TableArm,
    count: int,
    random: np.random.Generator,
    tasks: Collection[str] = BY_NAME.keys(),
    done: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """Lets the expert carry out up to `count` tasks that are drawn from `tasks`, none twice in a row.

    done: the tasks before. Returns fewer tasks if none is possible or if the expert fails.
    """
    names: tuple[str, ...] = ()
    while len(names) < count:
        last = (*done, *names)[-1:]
        state = arm.table.state()
        possible = [
            task for task in TASKS if task.name in tasks and task.name not in last and task.possible(state)
        ]
        if not possible:
            break
        name = _drawn(possible, random).name
        if not carry_out(arm, name):
            break
        names += (name,)
    return names


def _drawn(tasks: list[Task], random: np.random.Generator) -> Task:
    weights = np.array([_WEIGHTS.get(task.name, 1.0) for task in tasks])
    return tasks[random.choice(len(tasks), p=weights / weights.sum())]
