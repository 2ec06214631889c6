"""Shards of demonstrations: arrays on disk that are mapped into memory, with images at the network's size.

Each shard is a folder with `meta.json` and one `.npy` file per array of `ARRAYS`. Reading a batch needs no
decoding. Every frame holds the scripted expert's action for every task, not only for the given one
(counterfactual labels). One frame then teaches many instructions, and a policy must read the instruction to
choose the right action.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deer_vla_ros.bag.calvin_files import ANNOTATIONS
from deer_vla_ros.bag.folder_kinds import what_to_do_with
from deer_vla_ros.errors import UserError, cause, shown
from deer_vla_ros.files import whole_folder
from deer_vla_ros.untrusted import map_array, read_json

FORMAT = 6
MOST_PIXELS = 4096
"""The largest image size of a shard."""
THINGS = 7
"""Number of things on the table, in the order of sim.things.NAMES."""
POSE, GRIPPER = slice(0, 6), 6

ARRAYS = {
    "images": np.uint8,  # (N, 2, size, size, 3): static and gripper camera
    "tcp": np.float32,  # (N, 7): measured pose, position [m] and quaternion xyzw, base frame
    "task": np.int16,  # (N,): index of the given task in meta's tasks
    "episode": np.int32,  # (N,): number of the episode within the shard, ascending
    "actions": np.float32,  # (N, tasks, 7): pose in -1..1 and gripper, 1 open, -1 closed
    "valid": np.bool_,  # (N, tasks): whether the task is possible in this frame
    "points": np.float32,  # (N, THINGS, 3): positions of the things [m], base frame; NaN if not visible
    "yaws": np.float32,  # (N, THINGS): their rotation about z [rad]; quarter turns are equivalent
    # (N, THINGS, 2, 2): x and y of the things in each camera's image; 0..1 inside it, other values or NaN
    # outside
    "pixels": np.float32,
}


@dataclass
class ShardWriter:
    """Collects the frames of one shard; `close` writes them all, or nothing if it fails."""

    folder: Path
    tasks: tuple[str, ...]
    image_size: int
    about: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._rows: dict[str, list[np.ndarray]] = {name: [] for name in ARRAYS}
        self._episodes = 0

    @property
    def episodes(self) -> int:
        return self._episodes

    def add_episode(self, frames: Iterable[dict[str, np.ndarray]]) -> None:
        """Adds the frames of one episode. Each is a dict with the names of ARRAYS except `episode`."""
        for frame in frames:
            for name in ARRAYS:
                self._rows[name].append(
                    np.asarray(self._episodes if name == "episode" else frame[name], ARRAYS[name])
                )
        self._episodes += 1

    def close(self) -> None:
        """Writes the shard and gives it its final name in one step."""
        with whole_folder(self.folder) as scratch:
            scratch.mkdir()
            self._write(scratch)

    def _write(self, folder: Path) -> None:
        for name, rows in self._rows.items():
            np.save(folder / f"{name}.npy", np.stack(rows))
        meta = {
            "format": FORMAT,
            "tasks": self.tasks,
            "image_size": self.image_size,
            "episodes": self._episodes,
            **self.about,
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


class Frames:
    """All shards of some folders as one sequence of frames. The arrays stay on disk until they are read."""

    def __init__(self, folders: Iterable[Path]):
        """Raises UserError for a folder without shards and for shards that do not fit together."""
        folders = list(folders)
        shards = [shard for folder in folders for shard in sorted(folder.glob("shard-*")) if shard.is_dir()]
        for folder in folders:
            if not any(shard.parent == folder for shard in shards):
                remedy = what_to_do_with(folder) if folder.is_dir() else ""
                if (folder / ANNOTATIONS).is_file():
                    remedy = "it is in CALVIN's format: give `format: calvin` in the recipe"
                remedy = remedy or f"record some with `python -m deer_vla_ros record-demos --out {folder}`"
                raise UserError(f"{folder}: no shard-* folders: {remedy}")
        metas = [_read_meta(shard) for shard in shards]
        self.tasks = tuple(metas[0]["tasks"])
        self.image_size = int(metas[0]["image_size"])
        self.phrasings: dict[str, list[str]] = metas[0]["phrasings"]
        for shard, meta in zip(shards, metas):
            if tuple(meta["tasks"]) != self.tasks or meta["image_size"] != self.image_size:
                raise UserError(
                    f"{shard}: other tasks or image size than {shards[0]}: train on one kind of recording"
                )
        self._shards = [_arrays(shard, meta) for shard, meta in zip(shards, metas)]
        lengths = [len(shard["task"]) for shard in self._shards]
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        offsets = np.concatenate([[0], np.cumsum([meta["episodes"] for meta in metas])])
        self.task = np.concatenate([shard["task"] for shard in self._shards]).astype(np.int64)
        self.episode = np.concatenate(
            [shard["episode"] + offset for shard, offset in zip(self._shards, offsets)]
        )
        self.valid = np.concatenate([shard["valid"] for shard in self._shards])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def episodes(self) -> int:
        return int(self.episode[-1]) + 1

    def all_phrasings(self) -> list[str]:
        """Returns the phrasings for training, ordered by task."""
        return [text for task in self.tasks for text in self.phrasings[task]]

    def gather(self, name: str, frames: np.ndarray) -> np.ndarray:
        """Returns the rows of an array of ARRAYS for frame numbers of any shape."""
        flat = np.asarray(frames).ravel()
        shard_of = np.searchsorted(self._starts, flat, side="right") - 1
        result = np.empty((len(flat), *self._shards[0][name].shape[1:]), ARRAYS[name])
        for shard in np.unique(shard_of):
            mine = shard_of == shard
            result[mine] = self._shards[shard][name][flat[mine] - self._starts[shard]]
        return result.reshape(*np.shape(frames), *result.shape[1:])


def _read_meta(shard: Path) -> dict:
    """The facts on a shard. Raises UserError for a file that says other things."""
    meta = read_json(shard / "meta.json", "record this shard again")
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else None
        raise UserError(f"{shard}: format {shown(found)}, this version reads {FORMAT}: record it again")
    missing = [name for name in ("tasks", "image_size", "episodes", "phrasings") if name not in meta]
    if missing:
        raise UserError(
            f"{shard}: meta.json says nothing of {', '.join(missing)}: an older version recorded it, "
            "record it again"
        )
    tasks, size, episodes, phrasings = (
        meta[name] for name in ("tasks", "image_size", "episodes", "phrasings")
    )
    if not _is_texts(tasks) or len(set(tasks)) < len(tasks):
        raise UserError(f"{shard}: meta.json has the tasks {shown(tasks)}: record this shard again")
    if (
        type(size) is not int
        or not 1 <= size <= MOST_PIXELS
        or type(episodes) is not int
        or not 1 <= episodes < 10**9
    ):
        raise UserError(
            f"{shard}: meta.json has {shown(episodes)} episodes of {shown(size)} pixels: record it again"
        )
    if not isinstance(phrasings, dict) or not all(_is_texts(phrasings.get(task)) for task in tasks):
        raise UserError(f"{shard}: meta.json lacks phrasings of some tasks: record this shard again")
    return meta


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(text, str) for text in value)


def _arrays(shard: Path, meta: dict) -> dict[str, np.ndarray]:
    """The arrays of a shard, on disk. UserError if one is missing or damaged, or does not fit `meta`."""
    size, tasks = meta["image_size"], len(meta["tasks"])
    shapes = {
        "images": (2, size, size, 3),
        "tcp": (7,),
        "task": (),
        "episode": (),
        "actions": (tasks, 7),
        "valid": (tasks,),
        "points": (THINGS, 3),
        "yaws": (THINGS,),
        "pixels": (THINGS, 2, 2),
    }
    arrays = {}
    for name, kind in ARRAYS.items():
        path = shard / f"{name}.npy"
        try:
            arrays[name] = map_array(path)
            frames = len(arrays["images"])
            if arrays[name].dtype != kind or arrays[name].shape != (frames, *shapes[name]) or not frames:
                raise ValueError(f"shape {arrays[name].shape} and type {arrays[name].dtype}")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not such an array ({cause(error)}): record this shard again") from error
    task, episode = arrays["task"], arrays["episode"]
    if task.min() < 0 or task.max() >= tasks:
        raise UserError(f"{shard}: task.npy has numbers that no task has: record this shard again")
    if episode[0] < 0 or episode[-1] >= meta["episodes"] or (np.diff(episode) < 0).any():
        raise UserError(f"{shard}: episode.npy does not number {meta['episodes']} episodes: record it again")
    return arrays
