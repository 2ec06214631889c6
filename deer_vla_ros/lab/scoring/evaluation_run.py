"""One evaluation: groups of chains in lock step, spread over processes, and remembered as they finish."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from deer_vla_ros.budget.calibration import CALIBRATION
from deer_vla_ros.errors import UserError
from deer_vla_ros.files import write_json
from deer_vla_ros.lab.scoring.chain_report import summary
from deer_vla_ros.lab.scoring.chain_run import Attempt, run_chains
from deer_vla_ros.lab.scoring.chains import (
    MOST_TRIALS,
    SINGLES_FROM,
    Chain,
    chain_seed,
    draw_chain,
    draw_single,
    single_seed,
)
from deer_vla_ros.lab.scoring.network_driver import ExitChoice, NetworkDriver
from deer_vla_ros.lab.scoring.resume_file import ResumeFile
from deer_vla_ros.lab.sim.table import Table
from deer_vla_ros.lab.sim.tasks import TASKS
from deer_vla_ros.lab.workers import Work, spread
from deer_vla_ros.model.checkpoint import CONFIG, TOKENIZER, WEIGHTS, load

Results = list[tuple[Attempt, ...]]
LANES = 8
"""Chains in lock step in one process. The same chains always run together, so every repetition gives the same
numbers."""


@dataclass(frozen=True)
class Evaluation:
    """What is to be evaluated.

    folder: of the checkpoint. choice: what decides how deep the policy thinks. chains: of five instructions.
    trials: of every task alone. seed: which set of chains. steps: the most per instruction. phrasings:
    "training", "held-out" or "both". jobs: processes; None: one per core.
    """

    folder: Path
    choice: ExitChoice
    chains: int
    trials: int = 0
    seed: int = 0
    steps: int = 80
    phrasings: str = "training"
    jobs: int | None = None

    def check(self) -> None:
        """Raises UserError for numbers that make no sense."""
        limits = {
            "chains": (0, SINGLES_FROM),
            "trials": (0, MOST_TRIALS),
            "seed": (0, None),
            "steps": (1, None),
            "jobs": (1, None),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and (value < low or (high is not None and value > high)):
                why = ", since seeds below 1,000,000 belong to training" if name == "seed" else ""
                wanted = f"{low} {f'to {high}' if high else 'or more'}{why}"
                raise UserError(f"evaluate: --{name} is {value}: give {wanted}")
        if not self.chains and not self.trials:
            raise UserError("evaluate: neither --chains nor --trials asks for anything: give one of them")

    def identity(self) -> dict[str, Any]:
        """All that the figures depend on."""
        return {
            "budget": self.choice.to_json(),
            **files_of(self.folder),
            "tasks_sha256": tasks_sha256(),
            "seed": self.seed,
            "chains_asked_for": self.chains,
            "trials_per_task": self.trials,
            "steps_per_instruction": self.steps,
            "phrasings": self.phrasings,
        }


def report_of(asked: Evaluation, json_file: Path | None = None) -> dict[str, Any]:
    """Runs the evaluation; its figures, and what they depend on.

    json_file: where the report is written to. What is done stands beside it meanwhile, so that an interrupted
    run goes on from there.
    """
    checkpoint = load(asked.folder)
    asked.choice.rule_of(checkpoint)  # raises now what every process would raise
    about = asked.identity()
    resume = None
    if json_file is not None:
        resume = ResumeFile(json_file.with_name(f"{json_file.name}.partial.jsonl"), about)
        if resume.done:
            print(f"{json_file}: going on from an interrupted run")
    groups = groups_of(asked.chains, asked.trials, LANES)
    jobs = asked.jobs or len(os.sched_getaffinity(0))
    chains, singles = evaluate(
        asked.folder, asked.choice, asked.seed, asked.phrasings, asked.steps, groups, jobs, resume
    )
    report = {**summary(checkpoint.info.model, chains, singles), **about}
    if resume is not None:
        write_json(json_file, report)
        resume.remove()
    return report


def files_of(folder: Path) -> dict[str, Any]:
    """What tells one checkpoint from another."""
    names = (CONFIG, TOKENIZER, CALIBRATION)
    return {
        "checkpoint_sha256": _sha256(folder / WEIGHTS),
        "other_files_sha256": {name: _sha256(folder / name) for name in names},
    }


def tasks_sha256() -> str:
    """What tells one set of tasks and wordings from another. How the table moves and what counts as done is not
    part of it."""
    wordings = [[task.name, task.phrasings, task.held_out] for task in TASKS]
    return hashlib.sha256(json.dumps(wordings).encode()).hexdigest()


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


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
        for (group, _), (drawn, results) in spread(
            _worker, arguments, jobs, processes, lambda: progress.advance(bar)
        ):
            _drawn[seed, phrasings, group] = drawn
            done[group.key] = [[dataclasses.asdict(attempt) for attempt in attempts] for attempts in results]
            if resume:
                resume.add(group.key, done[group.key])
    found = {
        group: [tuple(map(Attempt.from_json, attempts)) for attempts in done[group.key]] for group in groups
    }
    chains = [attempts for group, results in found.items() if not group.task for attempts in results]
    return chains, [attempts for group, results in found.items() if group.task for attempts in results]


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
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
            chains = [
                _draw(table, seed, group.task, index, phrasings) for table, index in zip(own, group.indices)
            ]
        return chains, run_chains(chains, own, driver, step_limit, tell)

    return work


def _draw(table: Table, seed: int, task: str, index: int, phrasings: str) -> Chain:
    if not task:
        return draw_chain(table, chain_seed(seed, index), phrasings)
    return draw_single(table, task, single_seed(seed, task, index), phrasings)
