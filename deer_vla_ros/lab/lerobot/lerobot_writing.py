"""Writes a LeRobotDataset of format v3.0: videos or image columns of two cameras, TCP pose, action, tasks.

observation.images.static, .gripper  H.264 (`video`), or PNG without loss (`image`)
observation.state (7,)               TCP position [m], XYZ Euler angles about fixed axes [rad], gripper
                                     before the step: 1 open, -1 closed
action (7,)                          the TCP pose that the step leads to, gripper: 1 open, -1 closed
"""

from __future__ import annotations

import io
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from deer_vla_ros.bag.calvin_files import CalvinStep
from deer_vla_ros.errors import UserError
from deer_vla_ros.files import write_json
from deer_vla_ros.model.action_space import ActionSpace

CAMERAS = {"observation.images.static": "rgb_static", "observation.images.gripper": "rgb_gripper"}
AXES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
FILES_PER_CHUNK = 1000
DATA_MB, VIDEO_MB = 100, 200
"""A file that has grown beyond this size gets no further episode."""
MB = 1 << 20
ENCODER = "libx264"
ENCODER_OPTIONS = {"crf": "18", "preset": "veryfast", "g": "2"}
"""Nearly without visible loss. Every second frame is a key frame, so that a reader finds any frame fast."""
THINNED = 4
"""Statistics of images use every 4th pixel of every 4th row."""


class LerobotWriter:
    """An EpisodeWriter. dtype: "video" or "image". Only one episode is in memory, without its
    frames of videos."""

    def __init__(
        self, folder: Path, space: ActionSpace, *, rate_hz: float, dtype: str = "video", **about: Any
    ):
        self._folder, self._rate_hz, self._dtype = folder, rate_hz, dtype
        self._steps: list[dict[str, Any]] = []
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._total = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._statistics: dict[str, _Statistics] = {}
        self._data = _DataFiles(folder)
        self._videos = {key: _VideoFiles(folder, key, rate_hz) for key in CAMERAS} if dtype == "video" else {}
        folder.mkdir(parents=True)

    def add(self, step: CalvinStep) -> None:
        """Writes the next step of the present episode. Raises UserError if an image changes its size."""
        row: dict[str, Any] = {
            "observation.state": np.append(step.robot_obs[:6], step.robot_obs[14]).astype(np.float32),
            "action": step.actions.astype(np.float32),
        }
        for key, name in CAMERAS.items():
            image = getattr(step, name)
            if self._shapes.setdefault(key, image.shape) != image.shape:
                raise UserError(
                    f"{name} has {image.shape[1]}x{image.shape[0]} pixels after frames of "
                    f"{self._shapes[key][1]}x{self._shapes[key][0]}: convert these recordings one by one"
                )
            self._count(key, image[::THINNED, ::THINNED].reshape(-1, 3) / 255)
            if self._videos:
                self._videos[key].add(image)
            else:
                row[key] = {"bytes": _png(image), "path": None}
        for key in ("observation.state", "action"):
            self._count(key, row[key][None].astype(np.float64))
        self._steps.append(row)

    def end_episode(self, text: str) -> None:
        """The steps since the last call are one episode, which carries out the instruction `text`."""
        count, index = len(self._steps), len(self._episodes)
        task = self._tasks.setdefault(text, len(self._tasks))
        columns = {
            "timestamp": np.arange(count) / self._rate_hz,
            "frame_index": np.arange(count),
            "episode_index": np.full(count, index),
            "index": self._total + np.arange(count),
            "task_index": np.full(count, task),
        }
        for key, values in columns.items():
            self._count(key, values[:, None].astype(np.float64))
        columns |= {key: [row[key] for row in self._steps] for key in self._steps[0]}
        place = self._data.write(
            pa.table(
                {field.name: pa.array(list(columns[field.name]), field.type) for field in self._schema()}
            )
        )
        episode = {
            "episode_index": index,
            "tasks": [text],
            "length": count,
            "dataset_from_index": self._total,
            "dataset_to_index": self._total + count,
            **_place("data", place),
        }
        for key, video in self._videos.items():
            start, end, place = video.end_episode()
            episode |= _place(f"videos/{key}", place)
            episode |= {f"videos/{key}/from_timestamp": start, f"videos/{key}/to_timestamp": end}
        self._episodes.append(episode | _place("meta/episodes", (0, 0)))
        self._total += count
        self._steps = []

    def close(self) -> None:
        """Completes the dataset with its metadata."""
        self._data.close()
        for video in self._videos.values():
            video.close()
        meta = self._folder / "meta"
        episodes = meta / "episodes" / "chunk-000" / "file-000.parquet"
        episodes.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self._episodes), episodes)
        pq.write_table(_task_table(self._tasks), meta / "tasks.parquet")
        write_json(
            meta / "stats.json",
            {key: each.summary(key in CAMERAS, self._total) for key, each in self._statistics.items()},
        )
        write_json(meta / "info.json", self._info())

    def _count(self, key: str, values: np.ndarray) -> None:
        self._statistics.setdefault(key, _Statistics()).add(values)

    def _schema(self) -> pa.Schema:
        image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        types = {
            "observation.state": pa.list_(pa.float32(), len(AXES)),
            "action": pa.list_(pa.float32(), len(AXES)),
            **({} if self._videos else dict.fromkeys(CAMERAS, image)),
            "timestamp": pa.float32(),
            **dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), pa.int64()),
        }
        return pa.schema(types)

    def _info(self) -> dict[str, Any]:
        rate = int(self._rate_hz) if self._rate_hz == int(self._rate_hz) else self._rate_hz
        numbers = {"dtype": "float32", "shape": [len(AXES)], "names": list(AXES)}
        features: dict[str, Any] = {"observation.state": numbers, "action": numbers}
        for key, shape in self._shapes.items():
            features[key] = {
                "dtype": self._dtype,
                "shape": list(shape),
                "names": ["height", "width", "channels"],
            }
            if self._videos:
                features[key]["info"] = {
                    "video.height": shape[0],
                    "video.width": shape[1],
                    "video.codec": "h264",
                    "video.pix_fmt": _pixel_format(shape),
                    "video.is_depth_map": False,
                    "video.fps": rate,
                    "video.channels": 3,
                    "has_audio": False,
                }
        features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
        for key in ("frame_index", "episode_index", "index", "task_index"):
            features[key] = {"dtype": "int64", "shape": [1], "names": None}
        return {
            "codebase_version": "v3.0",
            "robot_type": None,
            "total_episodes": len(self._episodes),
            "total_frames": self._total,
            "total_tasks": len(self._tasks),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": DATA_MB,
            "video_files_size_in_mb": VIDEO_MB,
            "fps": rate,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": DATA,
            "video_path": VIDEO if self._videos else None,
            "features": features,
        }


class _DataFiles:
    """The files of rows, one row group per episode."""

    def __init__(self, folder: Path):
        self._folder, self._number = folder, -1
        self._writer: pq.ParquetWriter | None = None
        self._path = folder

    def write(self, table: pa.Table) -> tuple[int, int]:
        """Writes an episode, and returns the numbers of the chunk and of the file that it is in."""
        if self._writer is None or self._path.stat().st_size > DATA_MB * MB:
            self.close()
            self._number += 1
            self._path = _made(self._folder, DATA, self._number)
            self._writer = pq.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)
        return divmod(self._number, FILES_PER_CHUNK)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _VideoFiles:
    """The videos of one camera, many episodes in a file."""

    def __init__(self, folder: Path, key: str, rate_hz: float):
        self._folder, self._key, self._rate = folder, key, Fraction(rate_hz).limit_denominator(1000)
        self._number, self._begun, self._frames, self._bytes = -1, 0, 0, 0
        self._container: av.container.OutputContainer | None = None

    def add(self, image: np.ndarray) -> None:
        """Encodes the next frame, (H, W, 3) uint8."""
        starts = self._begun == self._frames
        if self._container is None or (starts and self._bytes > VIDEO_MB * MB):
            self._start(image.shape)
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts, frame.time_base = self._frames, 1 / self._rate
        packets = self._stream.encode(frame)
        self._container.mux(packets)
        self._bytes += sum(packet.size for packet in packets)
        self._frames += 1

    def end_episode(self) -> tuple[float, float, tuple[int, int]]:
        """The times [s] at which the frames since the last call begin and end, and the numbers of chunk and
        file."""
        bounds = float(self._begun / self._rate), float(self._frames / self._rate)
        self._begun = self._frames
        return *bounds, divmod(self._number, FILES_PER_CHUNK)

    def close(self) -> None:
        if self._container is not None:
            self._container.mux(self._stream.encode())
            self._container.close()
            self._container = None

    def _start(self, shape: tuple[int, ...]) -> None:
        self.close()
        self._number, self._begun, self._frames, self._bytes = self._number + 1, 0, 0, 0
        path = _made(self._folder, VIDEO, self._number, video_key=self._key)
        self._container = av.open(str(path), "w")
        self._stream = self._container.add_stream(ENCODER, rate=self._rate, options=ENCODER_OPTIONS)
        self._stream.height, self._stream.width = shape[:2]
        self._stream.pix_fmt = _pixel_format(shape)


class _Statistics:
    """Smallest and largest value, mean and standard deviation of each column of arrays (n, columns)."""

    def __init__(self) -> None:
        self._count, self._sum, self._squares = 0, 0.0, 0.0
        self._low, self._high = np.inf, -np.inf

    def add(self, values: np.ndarray) -> None:
        self._count += len(values)
        self._sum = self._sum + values.sum(0)
        self._squares = self._squares + (values**2).sum(0)
        self._low, self._high = np.minimum(self._low, values.min(0)), np.maximum(self._high, values.max(0))

    def summary(self, of_image: bool, rows: int) -> dict[str, Any]:
        """As stats.json has it. rows: of the dataset."""
        mean = self._sum / self._count
        found = {
            "min": self._low,
            "max": self._high,
            "mean": mean,
            "std": np.sqrt(np.maximum(self._squares / self._count - mean**2, 0)),
        }
        shape = (3, 1, 1) if of_image else (-1,)
        return {name: each.reshape(shape).tolist() for name, each in found.items()} | {"count": [rows]}


def _place(what: str, place: tuple[int, int]) -> dict[str, int]:
    return {f"{what}/chunk_index": place[0], f"{what}/file_index": place[1]}


def _made(folder: Path, template: str, number: int, **names: str) -> Path:
    chunk, file = divmod(number, FILES_PER_CHUNK)
    path = folder / template.format(chunk_index=chunk, file_index=file, **names)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _pixel_format(shape: tuple[int, ...]) -> str:
    """Half the resolution of colours needs even sizes."""
    return "yuv420p" if shape[0] % 2 == 0 and shape[1] % 2 == 0 else "yuv444p"


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _task_table(tasks: dict[str, int]) -> pa.Table:
    """The table of tasks as pandas writes one whose index is the text: lerobot reads it with pandas."""
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
        for name, kind, numpy in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
    ]
    about = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
    table = pa.table({"task_index": pa.array(list(tasks.values()), pa.int64()), "task": list(tasks)})
    return table.replace_schema_metadata({"pandas": json.dumps(about)})
