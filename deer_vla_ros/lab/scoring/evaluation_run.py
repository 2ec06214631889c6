"""One evaluation: groups of chains in lock step in several processes. Finished groups are kept on disk."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deer_vla_ros.budget.calibration import CALIBRATION
from deer_vla_ros.errors import UserError, cause
from deer_vla_ros.files import write_json
from deer_vla_ros.lab.checksums import file_sha256
from deer_vla_ros.lab.scoring.benchmark import Benchmark, Group
from deer_vla_ros.lab.scoring.chain_report import summary
from deer_vla_ros.lab.scoring.chain_run import Attempt, Chain
from deer_vla_ros.lab.scoring.network_driver import ExitChoice, NetworkDriver
from deer_vla_ros.lab.scoring.resume_file import ResumeFile
from deer_vla_ros.lab.scoring.sentences import Sentence
from deer_vla_ros.lab.scoring.table_benchmark import TableBenchmark
from deer_vla_ros.lab.scoring.table_chains import MOST_TRIALS, SINGLES_FROM
from deer_vla_ros.lab.workers import Work, progress_bar, spread
from deer_vla_ros.model.checkpoint import CONFIG, TOKENIZER, WEIGHTS, load, load_as
from deer_vla_ros.model.quantisation import types_of

Results = list[tuple[Attempt, ...]]
LANES = 8
"""Chains that run in lock step in one process. The same chains always run together, so that every run gives
the same numbers."""
LIMITS = {
    "chains": (0, SINGLES_FROM),
    "trials": (0, MOST_TRIALS),
    "steps": (1, None),
    "jobs": (1, None),
    "lanes": (1, 1024),
}
"""The least and the most of each number; None: no limit."""


@dataclass(frozen=True)
class Evaluation:
    """The settings of an evaluation.

    folder: the checkpoint's folder. choice: what decides how many layers run. chains: the number of chains of
    five instructions. benchmark: where they come from. trials: the number of single instructions per task, or
    per sentence. steps: the most steps per instruction. jobs: the number of processes; None: as many as keep
    the cores busy. dtype, device: as the parameters `model.dtype` and `model.device`. lanes: chains that run
    in lock step. cluster: address of a Dask scheduler, whose workers run the chains in place of `jobs`
    processes.
    """

    folder: Path
    choice: ExitChoice
    chains: int
    benchmark: Benchmark = field(default_factory=TableBenchmark)
    trials: int = 0
    steps: int = 80
    jobs: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    lanes: int = LANES
    cluster: str | None = None

    def check(self) -> None:
        """Raises UserError if a number is out of range, or if there is nothing to evaluate."""
        check_numbers({name: getattr(self, name) for name in LIMITS})

    def identity(self) -> dict[str, Any]:
        """Everything that the figures depend on, ready for JSON."""
        return {
            "budget": self.choice.to_json(),
            "dtype": self.dtype,
            "device": self.device,
            **files_of(self.folder),
            **self.benchmark.identity(),
            "chains_asked_for": self.chains,
            "trials_per_task": self.trials,
            "steps_per_instruction": self.steps,
            "lanes": self.lanes,
        }

    def groups(self) -> list[Group]:
        """All chains, and all trials of every single instruction."""
        return groups_of(
            self.chains, self.benchmark.singles() if self.trials else [], self.trials, self.lanes
        )


def check_numbers(values: Mapping[str, int | None]) -> None:
    """Raises UserError if one of `values`, by the names of LIMITS, is out of range, or if neither chains nor
    trials are asked for. None is no number yet, and accepted."""
    for name, (low, high) in LIMITS.items():
        value = values[name]
        if value is not None and (value < low or (high is not None and value > high)):
            wanted = f"{low} {f'to {high}' if high else 'or more'}"
            raise UserError(f"evaluate: --{name} is {value}: give {wanted}")
    if values["chains"] == 0 and not values["trials"]:
        raise UserError("evaluate: neither --chains nor --trials asks for anything: give one of them")


def report_of(asked: Evaluation, json_file: Path | None = None) -> dict[str, Any]:
    """Runs the evaluation. Returns its figures (chain_report.summary) and everything that they depend on.

    json_file: the report is written there. Until then, a file beside it holds the finished parts, so that the
    next run continues an interrupted one. Raises UserError if the checkpoint cannot follow the choice, or if
    the file beside is of another evaluation.
    """
    if asked.cluster is None:
        _check_device(asked.device)
    # With one layer in memory, an error is raised before any process starts and loads the others.
    dtype, bits = types_of(asked.dtype, asked.device)
    checkpoint = load(asked.folder, "cpu", dtype, layers=1, bits=bits)
    asked.choice.rule_of(checkpoint)
    about = asked.identity()
    resume = None
    if json_file is not None:
        resume = ResumeFile(json_file.with_name(f"{json_file.name}.partial.jsonl"), about)
        if resume.done:
            print(f"{json_file}: going on from an interrupted run")
    chains, singles = evaluate(asked, resume)
    report = {**summary(checkpoint.info.model, chains, singles, asked.benchmark.tasks), **about}
    if resume is not None:
        write_json(json_file, report)
        resume.remove()
    return report


def files_of(folder: Path) -> dict[str, Any]:
    """The SHA-256 sums of a checkpoint's files, by which checkpoints differ; None for a missing file."""
    names = (CONFIG, TOKENIZER, CALIBRATION)
    return {
        "checkpoint_sha256": file_sha256(folder / WEIGHTS),
        "other_files_sha256": {name: file_sha256(folder / name) for name in names},
    }


_drawn: dict[tuple[Benchmark, Group], list[Chain]] = {}
"""The chains that were drawn for this process. A search runs the same chains many times, and on the table the
draw takes a quarter of the time."""


def groups_of(chains: int, singles: Sequence[Sentence], trials: int, lanes: int) -> list[Group]:
    """All chains and all trials of every single instruction, in groups of at most `lanes`."""
    counts = [(None, chains), *((single, trials) for single in singles)]
    return [
        Group(single, tuple(range(first, min(first + lanes, count))))
        for single, count in counts
        for first in range(0, count, lanes)
    ]


def evaluate(asked: Evaluation, resume: ResumeFile | None = None) -> tuple[Results, Results]:
    """Runs all groups. Returns the attempts of every chain, and those of every single instruction.

    Both lists have the order of the groups, for any number of processes. resume: has the groups that are
    finished already, which are not run again, and gets every newly finished one.
    """
    groups = asked.groups()
    known = resume.done if resume else {}
    done = {group.key: _results_of(group, known[group.key]) for group in groups if group.key in known}
    left = [group for group in groups if group.key not in done]
    with progress_bar() as progress:
        bar = progress.add_task("evaluating", total=sum(len(group.indices) for group in groups))
        progress.advance(bar, sum(len(group.indices) for group in groups if group.key in done))
        jobs = [(group, _drawn.get((asked.benchmark, group))) for group in left]
        # The workers of a cluster have other working directories.
        at_worker = dataclasses.replace(asked, folder=asked.folder.absolute())
        for (group, _), (drawn, results) in spread(
            _worker,
            (at_worker,),
            jobs,
            asked.jobs or _processes(asked),
            lambda: progress.advance(bar),
            asked.cluster,
            [at_worker.folder / name for name in (CONFIG, WEIGHTS, TOKENIZER, CALIBRATION)],
        ):
            _drawn[asked.benchmark, group] = drawn
            done[group.key] = results
            if resume:
                resume.add(
                    group.key, [[dataclasses.asdict(each) for each in attempts] for attempts in results]
                )
    found = {group: done[group.key] for group in groups}
    chains = [attempts for group, results in found.items() if group.single is None for attempts in results]
    singles = [attempts for group, results in found.items() if group.single for attempts in results]
    return chains, singles


def _processes(asked: Evaluation) -> int:
    """As many processes as keep the cores busy; one on a GPU, since each loads the whole network."""
    if asked.device == "cuda":
        return 1
    return max(1, len(os.sched_getaffinity(0)) // asked.benchmark.cores_of(asked.lanes))


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


def _check_device(device: str) -> None:
    """Raises UserError if this process cannot use the device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"evaluate: --device is cuda, but torch sees no GPU on {platform.node()}: use cpu, or install a "
            "CUDA build of torch"
        )


def _worker(asked: Evaluation) -> Work:
    """Returns the function that runs one group in this process. The scenes are made once, for all groups."""
    _check_device(asked.device)
    torch.set_num_threads(1)
    checkpoint = load_as(asked.dtype, asked.folder, asked.device)
    lanes = min(asked.lanes, max(asked.chains, asked.trials))
    driver = NetworkDriver(checkpoint, asked.choice.rule_of(checkpoint), lanes)
    scenes = asked.benchmark.open(lanes, checkpoint.info.action_space)

    def work(
        job: tuple[Group, list[Chain] | None], on_progress: Callable[[], None]
    ) -> tuple[list[Chain], Results]:
        group, chains = job
        chains = chains or scenes.chains(group)
        return chains, scenes.run(chains, driver, asked.steps, on_progress)

    return work
