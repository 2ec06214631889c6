"""One evaluation: groups of chains in lock step in several processes. Finished groups are kept on disk."""

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

from deer_vla_ros.budget.calibration import CALIBRATION
from deer_vla_ros.errors import UserError, cause
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
from deer_vla_ros.lab.workers import Work, progress_bar, spread
from deer_vla_ros.model.checkpoint import CONFIG, TOKENIZER, WEIGHTS, load_as

Results = list[tuple[Attempt, ...]]
LANES = 8
"""Chains that run in lock step in one process. The same chains always run together, so that every run gives
the same numbers."""


@dataclass(frozen=True)
class Evaluation:
    """The settings of an evaluation.

    folder: the checkpoint's folder. choice: what decides how many layers run. chains: the number of chains of
    five instructions. trials: the number of single instructions per task. seed: selects the set of chains.
    steps: the most steps per instruction. phrasings: "training", "held-out" or "both". jobs: the number of
    processes; None: one per core. dtype: of the weights, as the parameter `model.dtype`. cluster: address
    of a Dask scheduler, whose workers run the chains in place of `jobs` processes.
    """

    folder: Path
    choice: ExitChoice
    chains: int
    trials: int = 0
    seed: int = 0
    steps: int = 80
    phrasings: str = "training"
    jobs: int | None = None
    dtype: str = "float32"
    cluster: str | None = None

    def check(self) -> None:
        """Raises UserError if a number is out of range, or if there is nothing to evaluate."""
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
        """Everything that the figures depend on, ready for JSON."""
        return {
            "budget": self.choice.to_json(),
            "dtype": self.dtype,
            **files_of(self.folder),
            "tasks_sha256": tasks_sha256(),
            "seed": self.seed,
            "chains_asked_for": self.chains,
            "trials_per_task": self.trials,
            "steps_per_instruction": self.steps,
            "phrasings": self.phrasings,
        }


def report_of(asked: Evaluation, json_file: Path | None = None) -> dict[str, Any]:
    """Runs the evaluation. Returns its figures (chain_report.summary) and everything that they depend on.

    json_file: the report is written there. Until then, a file beside it holds the finished parts, so that the
    next run continues an interrupted one. Raises UserError if the checkpoint cannot follow the choice, or if
    the file beside is of another evaluation.
    """
    checkpoint = load_as(asked.dtype, asked.folder)
    asked.choice.rule_of(checkpoint)  # An error is raised here, before any process starts.
    about = asked.identity()
    resume = None
    if json_file is not None:
        resume = ResumeFile(json_file.with_name(f"{json_file.name}.partial.jsonl"), about)
        if resume.done:
            print(f"{json_file}: going on from an interrupted run")
    groups = groups_of(asked.chains, asked.trials, LANES)
    jobs = asked.jobs or len(os.sched_getaffinity(0))
    chains, singles = evaluate(
        asked.folder,
        asked.choice,
        asked.seed,
        asked.phrasings,
        asked.steps,
        groups,
        jobs,
        resume,
        asked.dtype,
        asked.cluster,
    )
    report = {**summary(checkpoint.info.model, chains, singles), **about}
    if resume is not None:
        write_json(json_file, report)
        resume.remove()
    return report


def files_of(folder: Path) -> dict[str, Any]:
    """The SHA-256 sums of a checkpoint's files, by which checkpoints differ; None for a missing file."""
    names = (CONFIG, TOKENIZER, CALIBRATION)
    return {
        "checkpoint_sha256": _sha256(folder / WEIGHTS),
        "other_files_sha256": {name: _sha256(folder / name) for name in names},
    }


def tasks_sha256() -> str:
    """The SHA-256 sum of all tasks and their phrasings.

    It covers neither the simulation nor the criteria of success.
    """
    wordings = [[task.name, task.phrasings, task.held_out] for task in TASKS]
    return hashlib.sha256(json.dumps(wordings).encode()).hexdigest()


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


@dataclass(frozen=True)
class Group:
    """Chains that always run together.

    task: the task of single instructions; empty for chains. indices: the numbers of the chains or trials.
    """

    task: str
    indices: tuple[int, ...]

    @property
    def key(self) -> str:
        """The group's key in the file of finished parts."""
        return f"{self.task or 'chains'} {self.indices[0]}"


_drawn: dict[tuple[int, str, Group], list[Chain]] = {}
"""The chains that were drawn in this process, by seed, phrasings and group. A search runs the same chains
many times, and the draw takes a quarter of the time."""


def groups_of(chains: int, trials: int, lanes: int) -> list[Group]:
    """All chains and all trials of every task, in groups of at most `lanes`."""
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
    dtype: str = "float32",
    cluster: str | None = None,
) -> tuple[Results, Results]:
    """Runs all groups. Returns the attempts of every chain, and those of every single instruction.

    Both lists have the order of `groups`, for any number of processes. resume: has the groups that are
    finished already, which are not run again, and gets every newly finished one.
    """
    known = resume.done if resume else {}
    done = {group.key: _results_of(group, known[group.key]) for group in groups if group.key in known}
    left = [group for group in groups if group.key not in done]
    lanes = max(len(group.indices) for group in groups)
    with progress_bar() as progress:
        bar = progress.add_task("evaluating", total=sum(len(group.indices) for group in groups))
        progress.advance(bar, sum(len(group.indices) for group in groups if group.key in done))
        folder = folder.absolute()  # The workers of a cluster have other working directories.
        files = [folder / name for name in (CONFIG, WEIGHTS, TOKENIZER, CALIBRATION)]
        arguments = (folder, choice, seed, phrasings, step_limit, lanes, dtype)
        jobs = [(group, _drawn.get((seed, phrasings, group))) for group in left]
        for (group, _), (drawn, results) in spread(
            _worker, arguments, jobs, processes, lambda: progress.advance(bar), cluster, files
        ):
            _drawn[seed, phrasings, group] = drawn
            done[group.key] = results
            if resume:
                resume.add(
                    group.key, [[dataclasses.asdict(each) for each in attempts] for attempts in results]
                )
    found = {group: done[group.key] for group in groups}
    chains = [attempts for group, results in found.items() if not group.task for attempts in results]
    return chains, [attempts for group, results in found.items() if group.task for attempts in results]


def _results_of(group: Group, values: Any) -> Results:
    """The results of a group that an interrupted run has written. Raises UserError if they are others."""
    if not isinstance(values, list) or len(values) != len(group.indices):
        raise _damaged(group, "other numbers of chains")
    try:
        return [tuple(map(Attempt.read, attempts)) for attempts in values]
    except (TypeError, UserError) as error:
        raise _damaged(group, cause(error)) from error


def _damaged(group: Group, why: str) -> UserError:
    return UserError(
        f"evaluate: the file of the interrupted run is damaged in '{group.key}' ({why}): delete the file "
        "*.partial.jsonl beside the report, and everything is run again"
    )


def _worker(
    folder: Path, choice: ExitChoice, seed: int, phrasings: str, step_limit: int, lanes: int, dtype: str
) -> Work:
    """Returns the function that runs one group in this process. The tables are made once, for all groups."""
    torch.set_num_threads(1)
    checkpoint = load_as(dtype, folder)
    driver = NetworkDriver(checkpoint, choice.rule_of(checkpoint), lanes)
    tables = [Table() for _ in range(lanes)]

    def work(
        job: tuple[Group, list[Chain] | None], on_progress: Callable[[], None]
    ) -> tuple[list[Chain], Results]:
        group, chains = job
        own = tables[: len(group.indices)]
        if chains is None:
            chains = [
                _draw(table, seed, group.task, index, phrasings) for table, index in zip(own, group.indices)
            ]
        return chains, run_chains(chains, own, driver, step_limit, on_progress)

    return work


def _draw(table: Table, seed: int, task: str, index: int, phrasings: str) -> Chain:
    if not task:
        return draw_chain(table, chain_seed(seed, index), phrasings)
    return draw_single(table, task, single_seed(seed, task, index), phrasings)
