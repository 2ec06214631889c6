"""Training windows from data in CALVIN's format, decoded by threads and kept in a cache of limited size."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from deer_vla_ros.bag.calvin_files import IMAGES, read_annotations, read_step
from deer_vla_ros.inference.preprocess import resize_and_crop
from deer_vla_ros.lab.training.dataset import WindowBatch, window_rows

THREADS = min(8, os.cpu_count() or 1)
CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class _Key:
    """A step at an image size in pixels. folder: number of its folder in the data set."""

    folder: int
    number: int
    size: int


@dataclass(frozen=True, eq=False)
class _Step:
    """A decoded step: images (cameras, size, size, 3) uint8, rel_actions (7,), robot_obs (15,)."""

    images: np.ndarray
    rel_actions: np.ndarray
    robot_obs: np.ndarray


class CalvinWindows:
    """The annotated intervals of folders in CALVIN's format, as dataset.Windows. Use it from one thread only.

    The instruction of a window is the annotation of its interval. Intervals can overlap.
    """

    def __init__(self, folders: Iterable[Path], threads: int = THREADS, cache_bytes: int = CACHE_BYTES):
        """cache_bytes: memory for decoded steps. Raises UserError for a folder without annotations."""
        self._folders = list(folders)
        annotations = [
            (i, each) for i, folder in enumerate(self._folders) for each in read_annotations(folder)
        ]
        lengths = [each.end - each.first for _, each in annotations]
        self._interval = np.repeat(np.arange(len(annotations)), lengths)
        self._folder = np.array([folder for folder, _ in annotations])
        self._number = np.concatenate([np.arange(each.first, each.end) for _, each in annotations])
        self._texts = [each.text for _, each in annotations]
        self._pool = ThreadPoolExecutor(threads, "decode")
        self._cache: OrderedDict[_Key, _Step] = OrderedDict()
        self._cache_bytes = cache_bytes

    @property
    def texts(self) -> list[str]:
        return list(dict.fromkeys(self._texts))

    def __len__(self) -> int:
        return len(self._number)

    def valid_steps(self, indices: np.ndarray, window: int) -> int:
        return int(window_rows(self._interval, indices, window)[1].sum())

    def batch(self, indices: np.ndarray, window: int, size: int, random: np.random.Generator) -> WindowBatch:
        """Returns the windows of these numbers. Raises UserError if a step is missing or damaged."""
        rows, valid = window_rows(self._interval, indices, window)
        folders = self._folder[self._interval[rows]]
        keys = [
            _Key(int(folder), int(number), size)
            for folder, number in zip(folders.flat, self._number[rows].flat)
        ]
        steps = self._steps(keys)

        def stacked(name: str) -> np.ndarray:
            arrays = np.stack([getattr(step, name) for step in steps])
            return arrays.reshape(*rows.shape, *arrays.shape[1:])

        return WindowBatch(
            images=stacked("images"),
            tcp=_tcp(stacked("robot_obs")),
            actions=stacked("rel_actions").astype(np.float32),
            valid=valid,
            instructions=[self._texts[interval] for interval in self._interval[indices]],
        )

    def _steps(self, keys: Sequence[_Key]) -> list[_Step]:
        """Returns the steps of `keys`; it decodes only those that are not in the cache."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._cache]
        self._cache.update(zip(missing, self._pool.map(self._decode, missing)))
        steps = []
        for key in keys:
            self._cache.move_to_end(key)
            steps.append(self._cache[key])
        room = self._cache_bytes // (steps[0].images.nbytes + 512)
        while len(self._cache) > room:
            self._cache.popitem(last=False)
        return steps

    def _decode(self, key: _Key) -> _Step:
        arrays = read_step(self._folders[key.folder], key.number, (*IMAGES, "rel_actions", "robot_obs"))
        images = np.stack([resize_and_crop(arrays[name], key.size) for name in IMAGES])
        return _Step(images, arrays["rel_actions"], arrays["robot_obs"])


def _tcp(robot_obs: np.ndarray) -> np.ndarray:
    """Returns position and quaternion xyzw of the TCP, (..., 15) -> (..., 7)."""
    quaternions = Rotation.from_euler("xyz", robot_obs[..., 3:6].reshape(-1, 3)).as_quat()
    return np.concatenate(
        [robot_obs[..., :3], quaternions.reshape(*robot_obs.shape[:-1], 4)], axis=-1
    ).astype(np.float32)
