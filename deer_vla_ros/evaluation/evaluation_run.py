"""How is an evaluation run? Groups of chains in lock step, spread over processes, remembered as they finish."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deer_vla_ros.evaluation.chain_run import Attempt, run_chains
from deer_vla_ros.evaluation.chains import Chain, chain_seed, draw_chain, draw_single, single_seed
from deer_vla_ros.evaluation.network_driver import ExitChoice, NetworkDriver
from deer_vla_ros.evaluation.resume_file import ResumeFile
from deer_vla_ros.evaluation.workers import Work, spread
from deer_vla_ros.model.checkpoint import load
from deer_vla_ros.sim.table import Table
from deer_vla_ros.sim.tasks import TASKS

Results = list[tuple[Attempt, ...]]


@dataclass(frozen=True)
class Group:
    """Chains that always run together. task: empty for chains, else the one of single instructions. indices: of chains or trials."""

    task: str
    indices: tuple[int, ...]

    @property
    def key(self) -> str:
        return f"{self.task or 'chains'} {self.indices[0]}"


_drawn: dict[tuple[int, str, Group], list[Chain]] = {}
"""What this process had drawn, by --seed, phrasings and group: a search or a curve runs the same chains over and over, and drawing them
takes a quarter of the time."""


def groups_of(chains: int, trials: int, lanes: int) -> list[Group]:
    """Every chain and every task's trials, in groups of `lanes`."""
    counts = {"": chains, **{task.name: trials for task in TASKS}}
    return [
        Group(name, tuple(range(first, min(first + lanes, count))))
        for name, count in counts.items()
        for first in range(0, count, lanes)
    ]


def evaluate(
    folder: Path,
    choice: ExitChoice,
    seed: int,
    phrasings: str,
    step_limit: int,
    groups: Sequence[Group],
    processes: int,
    resume: ResumeFile | None,
) -> tuple[Results, Results]:
    """Attempts of every chain and of every single instruction, in the order of `groups`, whatever the number of processes."""
    done = dict(resume.done) if resume else {}
    left = [group for group in groups if group.key not in done]
    lanes = max(len(group.indices) for group in groups)
    with _progress() as progress:
        bar = progress.add_task("evaluating", total=sum(len(group.indices) for group in groups))
        progress.advance(bar, sum(len(group.indices) for group in groups if group.key in done))
        arguments = (folder, choice, seed, phrasings, step_limit, lanes)
        jobs = [(group, _drawn.get((seed, phrasings, group))) for group in left]
        for (group, _), (drawn, results) in spread(_worker, arguments, jobs, processes, lambda: progress.advance(bar)):
            _drawn[seed, phrasings, group] = drawn
            done[group.key] = [[dataclasses.asdict(attempt) for attempt in attempts] for attempts in results]
            if resume:
                resume.add(group.key, done[group.key])
    found = {group: [tuple(map(Attempt.from_json, attempts)) for attempts in done[group.key]] for group in groups}
    chains = [attempts for group, results in found.items() if not group.task for attempts in results]
    return chains, [attempts for group, results in found.items() if group.task for attempts in results]


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )


def _worker(folder: Path, choice: ExitChoice, seed: int, phrasings: str, step_limit: int, lanes: int) -> Work:
    """Runs groups in this process, on tables that are kept from one to the next."""
    torch.set_num_threads(1)
    checkpoint = load(folder)
    driver = NetworkDriver(checkpoint, choice.rule_of(checkpoint), lanes)
    tables = [Table() for _ in range(lanes)]

    def work(job: tuple[Group, list[Chain] | None], tell: Callable[[], None]) -> tuple[list[Chain], Results]:
        group, chains = job
        own = tables[: len(group.indices)]
        if chains is None:
            chains = [_draw(table, seed, group.task, index, phrasings) for table, index in zip(own, group.indices)]
        return chains, run_chains(chains, own, driver, step_limit, tell)

    return work


def _draw(table: Table, seed: int, task: str, index: int, phrasings: str) -> Chain:
    if not task:
        return draw_chain(table, chain_seed(seed, index), phrasings)
    return draw_single(table, task, single_seed(seed, task, index), phrasings)
