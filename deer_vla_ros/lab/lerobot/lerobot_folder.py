"""The metadata of a LeRobotDataset folder, formats v2.1 and v3.0: its columns, tasks and episodes.

Source: https://github.com/huggingface/lerobot, src/lerobot/datasets and
src/lerobot/scripts/convert_dataset_v21_to_v30.py.

    meta/info.json             fps, features (columns: dtype, shape, names), templates of the other paths
    meta/tasks.jsonl           v2.1: task_index and task, one JSON object per line
    meta/tasks.parquet         v3.0: the same; the text is the column `task` or the index of pandas
    meta/episodes.jsonl        v2.1: episode_index, tasks, length
    meta/episodes/*/*.parquet  v3.0: the same, and in which files an episode lies, and when its videos start
    data/...parquet            v2.1: one file per episode; v3.0: many episodes per file, one after another
    videos/...mp4              the same, for each camera of dtype `video`; images of dtype `image` are PNG
                               or JPEG files in the columns of data/
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deer_vla_ros.errors import UserError, cause
from deer_vla_ros.untrusted import check_fetched

FORMATS = ("v2.1", "v3.0")
LONGEST_TEXT = 64_000_000
"""Bytes of info.json, or of one line of a .jsonl file."""
LONGEST_S = 1e7
"""The longest video [s]."""
BUFFER = 1 << 20
"""Bytes of a column that are read at a time."""
ROWS = 64
INDICES = ("timestamp", "frame_index", "episode_index", "index", "task_index")
"""Columns that every dataset has beside its data."""
DAMAGED = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What reading metadata raises whose values are not of the kind that they should be."""
TEMPLATE = re.compile(
    r"(?!/)(?!.*\.\.)"  # it stays below the dataset's folder
    r"(?:[\w.\-/]|\{(?:episode_chunk|episode_index|video_key|chunk_index|file_index)(?::0?\d{1,2}d)?\})+"
)


@dataclass(frozen=True)
class LerobotFeature:
    """A column. names: of its numbers, as far as info.json has them."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    is_depth: bool

    @property
    def is_image(self) -> bool:
        return self.dtype in ("video", "image") and not self.is_depth

    @property
    def is_numbers(self) -> bool:
        return self.dtype not in ("video", "image", "string") and self.key not in INDICES

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def names_of_all(self) -> tuple[str, ...]:
        """The name of each number; empty if info.json does not name them all."""
        return self.names if len(self.names) == self.numbers else ()

    def __str__(self) -> str:
        names = f" [{' '.join(self.names)}]" if self.names and self.dtype not in ("video", "image") else ""
        return _one_line(f"{self.key} ({self.dtype} {'x'.join(map(str, self.shape))}{names})")[:300]


@dataclass(frozen=True)
class VideoSpan:
    """Where an episode's frames of one camera are: the file, and the time [s] of the first one."""

    path: Path
    start_s: float


@dataclass(frozen=True)
class LerobotEpisode:
    """An episode: the file with its rows, its video of each camera, its task texts."""

    index: int
    tasks: tuple[str, ...]
    rows: Path
    videos: dict[str, VideoSpan]


class LerobotFolder:
    """A dataset folder. Raises UserError where it is none, of another format, or damaged."""

    def __init__(self, path: Path):
        self.path = path
        info_path = path / "meta" / "info.json"
        if not info_path.is_file():
            raise UserError(
                f"{path}: no LeRobotDataset: it has no meta/info.json: give the folder above meta/"
            )
        info = _json(info_path, _start_of(info_path, LONGEST_TEXT))
        self.format = _one_line(info.get("codebase_version")) or "(none)"
        if self.format not in FORMATS:
            raise UserError(
                f"{path}: LeRobotDataset of format {self.format[:20]}: {' and '.join(FORMATS)} are read; "
                "convert it with lerobot's scripts (convert_dataset_v20_to_v21, convert_dataset_v21_to_v30)"
            )
        try:
            self.fps = float(info["fps"])
            self.total = max(int(info.get("total_episodes") or 0), 0)
            self._chunk = int(info.get("chunks_size") or 1000)
            self._data, self._video = str(info["data_path"]), str(info.get("video_path") or "")
            self.features = {key: _feature(key, each) for key, each in info["features"].items()}
        except DAMAGED as error:
            raise UserError(f"{info_path}: damaged ({error!r:.200}): copy the dataset again") from error
        if not 0 < self.fps <= 1000 or self._chunk < 1:
            raise UserError(
                f"{info_path}: fps is {self.fps:g}, chunks_size {self._chunk}: damaged: copy it again"
            )
        for template in (self._data, self._video):
            if template and not (TEMPLATE.fullmatch(template) and len(template) < 200):
                raise UserError(f"{info_path}: {template[:80]!r} is no path in the folder: copy it again")
        self.tasks = self._read_tasks()

    def feature(self, option: str, key: str, image: bool) -> LerobotFeature:
        """The column `key` that `option` names. Raises UserError that lists all that there are."""
        images = {name: each for name, each in self.features.items() if each.is_image}
        numbers = {name: each for name, each in self.features.items() if each.is_numbers}
        wanted, others = (images, numbers) if image else (numbers, images)
        if key not in wanted:
            kind, other = ("images", "numbers") if image else ("numbers", "images")
            raise UserError(
                f"{option} is {key}: {self.path} has no such column of {kind}: give one of "
                f"{_listed(wanted)}; the columns of {other} are {_listed(others)}"
            )
        return wanted[key]

    def episodes(self, cameras: tuple[str, ...]) -> Iterator[LerobotEpisode]:
        """The episodes in the order of the metadata, one at a time. cameras: keys of dtype `video`."""
        if self.format == "v2.1":
            path = self.path / "meta" / "episodes.jsonl"
            rows = _json_lines(path)
        else:
            path = self.path / "meta" / "episodes"
            rows = self._episode_rows(path, cameras)
        try:
            for row in rows:
                yield self._episode(row, cameras)
        except DAMAGED as error:
            raise UserError(f"{path}: damaged ({error!r:.200}): copy the dataset again") from error

    def _episode_rows(self, folder: Path, cameras: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        files = sorted(folder.glob("*/*.parquet"))
        if not files:
            raise UserError(f"{folder} has no parquet file: copy the dataset again")
        videos = [
            f"videos/{key}/{name}"
            for key in cameras
            for name in ("chunk_index", "file_index", "from_timestamp")
        ]
        columns = ["episode_index", "data/chunk_index", "data/file_index", *videos]
        for file in files:
            for batch in batches(file, columns, ["tasks"]):
                yield from batch.to_pylist()

    def _episode(self, row: dict[str, Any], cameras: tuple[str, ...]) -> LerobotEpisode:
        index = int(row["episode_index"])
        if self.format == "v2.1":
            place = {"episode_index": index, "episode_chunk": index // self._chunk}
            places = {key: place for key in cameras}
            starts = dict.fromkeys(cameras, 0.0)
        else:
            place = {name: int(row[f"data/{name}"]) for name in ("chunk_index", "file_index")}
            places = {
                key: {name: int(row[f"videos/{key}/{name}"]) for name in ("chunk_index", "file_index")}
                for key in cameras
            }
            starts = {key: float(row[f"videos/{key}/from_timestamp"]) for key in cameras}
            if not all(0 <= start < LONGEST_S for start in starts.values()):
                raise ValueError(f"videos begin at {starts} s")
        return LerobotEpisode(
            index,
            tuple(_one_line(task) for task in row.get("tasks") or ()),
            self.path / self._data.format(**place),
            {
                key: VideoSpan(self.path / self._video.format(video_key=key, **places[key]), starts[key])
                for key in cameras
            },
        )

    def _read_tasks(self) -> dict[int, str]:
        path = self.path / "meta" / "tasks.parquet"
        if self.format == "v2.1" or not path.is_file():
            path = path.with_suffix(".jsonl")
            rows = _json_lines(path)
        else:
            rows = (
                {"task": row.get("task", row.get("__index_level_0__")), "task_index": row.get("task_index")}
                for batch in batches(path, ["task_index"], ["task", "__index_level_0__"])
                for row in batch.to_pylist()
            )
        try:
            return {int(row["task_index"]): _one_line(row["task"]) for row in rows}
        except DAMAGED as error:
            raise UserError(f"{path}: damaged ({error!r:.200}): copy the dataset again") from error


def batches(path: Path, columns: Iterable[str], optional: Iterable[str] = ()) -> Iterator[pa.RecordBatch]:
    """The columns of a parquet file, and those of `optional` that it has, ROWS rows at a time.

    Raises UserError where the file is missing or damaged, or lacks a column.
    """
    check_file(path)
    try:
        with pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:
            there = file.schema_arrow.names
            for name in columns:
                if name not in there:
                    listed = _one_line(", ".join(there))[:500]
                    raise UserError(f"{path}: has no column {name}, it has {listed}: copy it again")
            wanted = [*columns, *(name for name in optional if name in there)]
            yield from file.iter_batches(batch_size=ROWS, columns=wanted)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged or cut off ({cause(error)}): copy it again") from error


def check_file(path: Path) -> None:
    """Raises UserError where a file of the dataset is missing or empty, or something stands in its place."""
    if not _start_of(path, 64):
        raise UserError(f"{path} is empty: download it again")
    check_fetched(path)


def _feature(key: str, values: dict[str, Any]) -> LerobotFeature:
    details = values.get("info") or values.get("video_info") or {}
    is_depth = bool(details.get("is_depth_map") or details.get("video.is_depth_map"))
    shape = tuple(int(each) for each in values.get("shape") or (1,))
    return LerobotFeature(key, str(values["dtype"]), shape, tuple(_flat(values.get("names"))), is_depth)


def _listed(features: dict[str, LerobotFeature]) -> str:
    return ", ".join(map(str, features.values())) or "(there is none)"


def _one_line(text: Any) -> str:
    """The text without line breaks; empty if there is none."""
    return " ".join(str(text or "").split())


def _flat(names: Any) -> Iterator[str]:
    """Names stand in lists, lists of lists, or dicts of lists."""
    if isinstance(names, dict):
        names = list(names.values())
    for each in names if isinstance(names, list) else ():
        if isinstance(each, list):
            yield from _flat(each)
        else:
            yield str(each)


def _start_of(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: download the whole dataset") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): download the dataset again") from error


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        check_file(path)
    with path.open("rb") as file:  # it may be empty: no episode has a task then
        while line := file.readline(LONGEST_TEXT):
            if line.strip():
                yield _json(path, line)


def _json(path: Path, text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        check_file(path)
        raise UserError(f"{path}: no JSON ({cause(error)}): copy it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: no JSON object: copy it again")
    return found
