"""Recording of demonstrations on all cores or machines, in shards with their own seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.demonstrations.demonstrations import Demonstration, demonstrations
from deer_vla_ros.lab.demonstrations.record_store import (
    CALVIN_SHARDS,
    CalvinStore,
    Files,
    FrameStore,
    Settings,
    Store,
    packed,
)
from deer_vla_ros.lab.sim.tasks import TASKS
from deer_vla_ros.lab.training.frames import FORMAT
from deer_vla_ros.lab.workers import Work, progress_bar, spread

DEMOS_PER_SHARD = 100
SEEDS_PER_RUN = 1_000
FIRST_FOREIGN_SEED = 1_000_000
"""Evaluation uses the seeds from here on."""


@dataclass(frozen=True)
class DemoRequest:
    """The demonstrations to record.

    image_size: pixels; None for CALVIN's format. policy: checkpoint whose network acts first; None for the
    expert alone.
    """

    folder: Path
    demos: int
    seed: int
    image_size: int | None
    policy: Path | None = None
    demos_per_shard: int = DEMOS_PER_SHARD

    def __post_init__(self) -> None:
        if self.image_size is None and len(self.shard_sizes) > CALVIN_SHARDS:
            most = CALVIN_SHARDS * self.demos_per_shard
            raise UserError(
                f"record-demos: --demos is {self.demos}, but CALVIN's seven digits number {most} at most: "
                "give fewer"
            )
        last = self.seed * SEEDS_PER_RUN + len(self.shard_sizes) - 1
        if (
            not 0 <= self.seed * SEEDS_PER_RUN <= last < FIRST_FOREIGN_SEED
            or len(self.shard_sizes) > SEEDS_PER_RUN
        ):
            raise UserError(
                f"record-demos: --seed {self.seed} with --demos {self.demos} needs seeds "
                f"{self.seed * SEEDS_PER_RUN} to {last}: give --seed 0 to "
                f"{FIRST_FOREIGN_SEED // SEEDS_PER_RUN - 1} and at most "
                f"{SEEDS_PER_RUN * self.demos_per_shard} --demos, "
                f"since seeds from {FIRST_FOREIGN_SEED} on are for evaluation"
            )

    @property
    def shard_sizes(self) -> list[int]:
        """The number of demonstrations in each shard; the last shard can be smaller."""
        whole, rest = divmod(self.demos, self.demos_per_shard)
        return [self.demos_per_shard] * whole + [rest] * (rest > 0)

    def store(self) -> Store:
        return (
            CalvinStore(self.folder) if self.image_size is None else FrameStore(self.folder, self.image_size)
        )

    def settings(self) -> Settings:
        """Returns what every shard depends on, except its own seed."""
        return {
            "format": None if self.image_size is None else FORMAT,
            "image_size": self.image_size,
            "policy": None if self.policy is None else _policy_driver().fingerprint(self.policy),
            "tasks": [task.name for task in TASKS],
            "phrasings": {task.name: list(task.phrasings) for task in TASKS},
        }


@dataclass(frozen=True)
class Shard:
    """Demonstrations that one process makes together. settings: including the shard's own seed."""

    number: int
    demos: int
    settings: Settings


def record(request: DemoRequest, jobs: int, cluster: str | None = None) -> tuple[int, int]:
    """Records what is missing. Returns the number of new frames and of demonstrations that existed before.

    cluster: address of a Dask scheduler, whose workers record in place of `jobs` processes. They send the
    files, and this process writes them, so that the folder need not be on a disk of all machines.

    Raises UserError for a folder with other content.
    """
    store, settings = request.store(), request.settings()
    shards = [
        Shard(number, demos, {"seed": request.seed * SEEDS_PER_RUN + number, **settings})
        for number, demos in enumerate(request.shard_sizes)
    ]
    try:
        request.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"record-demos: {request.folder} cannot be made ({error.strerror}): give another --out"
        ) from error
    found = store.found()
    _check(request, shards, found)
    missing = [shard for shard in shards if found.get(shard.number, {}).get("episodes") != shard.demos]
    kept, frames = request.demos - sum(shard.demos for shard in missing), 0
    with progress_bar() as progress:
        bar = progress.add_task("recording", total=request.demos, completed=kept)
        policy = None if request.policy is None else request.policy.absolute()
        arguments = (store, policy, cluster is not None)
        needed = () if policy is None else _policy_driver().network_files(policy)
        for _, (recorded, files) in spread(
            _worker, arguments, missing, jobs, lambda: progress.advance(bar), cluster, needed
        ):
            frames += recorded
            if files is not None:
                store.put(files)
    store.finish()
    return frames, kept


def _check(request: DemoRequest, shards: list[Shard], found: dict[int, Settings]) -> None:
    """Raises UserError if the folder holds shards that do not belong to this request."""
    remedy = f"give another --out, or remove {request.folder}"
    for number, settings in sorted(found.items()):
        if number >= len(shards) or settings["episodes"] > shards[number].demos:
            raise UserError(
                f"{request.folder} holds more than {request.demos} demonstrations: {remedy}, "
                "or give a larger --demos"
            )
        for name, wanted in shards[number].settings.items():
            if settings.get(name) != wanted:
                short = isinstance(wanted, str | int | None)
                both = f": {json.dumps(settings.get(name))}, and now {json.dumps(wanted)}" if short else ""
                raise UserError(
                    f"{request.folder}: shard {number} was recorded with another {name}{both}: {remedy}"
                )


def _worker(store: Store, policy: Path | None, sends_files: bool) -> Work:
    """Returns the function that records shards in this process. sends_files: the result has a shard's files,
    which this process does not write into the store, since that can be on another machine."""
    torch.set_num_threads(1)
    new_driver = None if policy is None else _policy_driver().new_driver(policy)

    def work(shard: Shard, on_episode: Callable[[], None]) -> tuple[int, Files | None]:
        episodes = _reported(demonstrations(shard.demos, shard.settings["seed"], new_driver), on_episode)
        if sends_files:
            return packed(store, shard.number, shard.settings, episodes)
        return store.write(shard.number, shard.settings, episodes), None

    return work


def _reported(episodes: Iterator[Demonstration], on_episode: Callable[[], None]) -> Iterator[Demonstration]:
    """Yields the episodes and calls `on_episode` after each."""
    for episode in episodes:
        yield episode
        on_episode()


def _policy_driver() -> ModuleType:
    """Imports the module of the policy only if it is needed, because the network's imports take seconds."""
    from deer_vla_ros.lab.demonstrations import policy_driver

    return policy_driver
