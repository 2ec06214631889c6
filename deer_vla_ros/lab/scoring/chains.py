"""The chains of instructions of an evaluation, drawn from seeds. The scripted expert has carried out each of
them once.

A chain has five instructions (CALVIN's LH-MTLC protocol, Mees et al. 2022, arXiv 2112.03227).
A single instruction follows a few tasks that the expert carries out first.
Each task is drawn from those that are possible in the table's state at that time. CALVIN's own sequences
differ: they take their tasks from five different categories.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.demonstrations.demonstrations import STEP_LIMIT
from deer_vla_ros.lab.sim.expert import act
from deer_vla_ros.lab.sim.table import Table
from deer_vla_ros.lab.sim.table_arm import TableArm
from deer_vla_ros.lab.sim.tasks import BY_NAME, NEEDS_HELD_BLOCK, TASKS, Task

CHAIN_LENGTH = 5
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


@dataclass(frozen=True)
class Chain:
    """Instructions to follow one after the other, and the state in which they begin.

    seed: the seed of the draw. table_seed: the argument of `Table.reset(table_seed, varied=True)`.
    prefix: tasks that the expert carries out first. tasks, instructions, held_out: one entry per instruction.
    held_out: whether the training never used this phrasing.
    """

    seed: int
    table_seed: int
    prefix: tuple[str, ...]
    tasks: tuple[str, ...]
    instructions: tuple[str, ...]
    held_out: tuple[bool, ...]


def chain_seed(run: int, index: int) -> int:
    """The seed of chain number `index` of the evaluation with `--seed run`."""
    return FIRST_SEED + run * SEEDS_PER_RUN + index


def single_seed(run: int, task: str, trial: int) -> int:
    """The seed of a task's trial number `trial` of the evaluation with `--seed run`."""
    return FIRST_SEED + run * SEEDS_PER_RUN + SINGLES_FROM + TASKS.index(BY_NAME[task]) * MOST_TRIALS + trial


def draw_chain(table: Table, seed: int, phrasings: str) -> Chain:
    """A chain of five tasks that the expert has just carried out on `table`. If the expert fails, other tasks
    are drawn.

    phrasings: "training", "held-out" or "both". Raises UserError if the expert fails too often.
    """
    for attempt in range(_ATTEMPTS):
        random, table_seed = _begin(table, seed, attempt)
        tasks = _carry_out_some(TableArm(table), CHAIN_LENGTH, random)
        if len(tasks) == CHAIN_LENGTH:
            return _worded(seed, attempt, table_seed, (), tasks, phrasings)
    raise UserError(
        f"chain of seed {seed}: the expert failed {_ATTEMPTS} times: the table's tasks have become infeasible"
    )


def draw_single(table: Table, task: str, seed: int, phrasings: str) -> Chain:
    """A chain of one task, which the expert has just carried out after up to LONGEST_PREFIX other tasks.

    phrasings: "training", "held-out" or "both". Raises UserError if no state is found in which the expert
    succeeds.
    """
    for attempt in range(_ATTEMPTS):
        random, table_seed = _begin(table, seed, attempt)
        arm, needs_block = TableArm(table), task in NEEDS_HELD_BLOCK
        count = int(random.integers(LONGEST_PREFIX + 1 - needs_block))
        prefix = _carry_out_some(arm, count, random)
        if needs_block:
            prefix += _carry_out_some(arm, 1, random, "lift_", prefix)
        is_complete = len(prefix) == count + needs_block
        if is_complete and BY_NAME[task].possible(table.state()) and carry_out(arm, task):
            return _worded(seed, attempt, table_seed, prefix, (task,), phrasings)
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


def set_up(chain: Chain, table: Table) -> TableArm:
    """Brings the table into the state in which the chain begins; the same chain always gets the same state.

    Raises RuntimeError if the expert fails in the chain's prefix.
    """
    table.reset(chain.table_seed, varied=True)
    arm = TableArm(table)
    for name in chain.prefix:
        if not carry_out(arm, name):
            raise RuntimeError(
                f"the expert fails {name} of the prefix {chain.prefix}, which it did when the chain was drawn"
            )
    return arm


def _begin(table: Table, seed: int, attempt: int) -> tuple[np.random.Generator, int]:
    table_seed = _TABLE_SEEDS + seed * _ATTEMPTS + attempt
    table.reset(table_seed, varied=True)
    return np.random.default_rng([seed, attempt]), table_seed


def _carry_out_some(
    arm: TableArm, count: int, random: np.random.Generator, kind: str = "", done: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Lets the expert carry out up to `count` drawn tasks whose names begin with `kind`, none twice in a row.

    done: the tasks before. Returns fewer tasks if none is possible or if the expert fails.
    """
    names: tuple[str, ...] = ()
    while len(names) < count:
        last = (*done, *names)[-1:]
        state = arm.table.state()
        possible = [
            task
            for task in TASKS
            if task.name.startswith(kind) and task.name not in last and task.possible(state)
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


def _worded(
    seed: int, attempt: int, table_seed: int, prefix: tuple[str, ...], tasks: tuple[str, ...], phrasings: str
) -> Chain:
    """The chain with its phrasings.

    They have a random stream of their own, so that other phrasings leave the tasks as they are.
    """
    random = np.random.default_rng([seed, attempt, 1])
    held_out = tuple(
        phrasings == "held-out" or (phrasings == "both" and bool(random.integers(2))) for _ in tasks
    )
    choices = [
        BY_NAME[name].held_out if new else BY_NAME[name].phrasings for name, new in zip(tasks, held_out)
    ]
    return Chain(
        seed, table_seed, prefix, tasks, tuple(str(random.choice(words)) for words in choices), held_out
    )
