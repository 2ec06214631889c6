"""Windows of consecutive steps of demonstrations, independent of the file format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.training.frames import Frames


@dataclass(frozen=True, eq=False)
class WindowBatch:
    """B windows of T consecutive steps, each window of one instruction.

    images (B, T, cameras, size, size, 3) uint8: static and gripper camera.
    tcp (B, T, 7) float32: measured pose, position [m] and quaternion xyzw; None if it is not known.
    actions (B, T, 7) float32: pose in -1..1 and gripper, 1 open, -1 closed.
    valid (B, T) bool: False after the end of the demonstration, where the last step is repeated.
    instructions: B texts.
    """

    images: np.ndarray
    tcp: np.ndarray | None
    actions: np.ndarray
    valid: np.ndarray
    instructions: list[str]


class Windows(Protocol):
    """The windows of a data set; one window begins at every step.

    The reference uses only windows that do not pass the end of a demonstration. It therefore sees the ends
    less often.
    """

    @property
    def texts(self) -> list[str]:
        """Every instruction that can occur in a batch."""

    def __len__(self) -> int:
        """The number of windows."""

    def valid_steps(self, indices: np.ndarray, window: int) -> int:
        """Returns the number of steps of these windows that are not padding."""

    def batch(self, indices: np.ndarray, window: int, size: int, random: np.random.Generator) -> WindowBatch:
        """Returns the windows of these numbers, with images of `size` pixels.

        The draws from `random` do not depend on the number of windows, so processes that share a batch agree
        on its content.
        """


class FrameWindows:
    """Windows over shards. The phrasing of the given task is drawn anew for every window."""

    def __init__(self, frames: Frames):
        self._frames = frames

    @property
    def texts(self) -> list[str]:
        return self._frames.all_phrasings()

    def __len__(self) -> int:
        return len(self._frames)

    def valid_steps(self, indices: np.ndarray, window: int) -> int:
        return int(window_rows(self._frames.episode, indices, window)[1].sum())

    def batch(self, indices: np.ndarray, window: int, size: int, random: np.random.Generator) -> WindowBatch:
        """Returns the windows of these numbers. Raises UserError for another size than the recorded one."""
        frames = self._frames
        if size != frames.image_size:
            raise UserError(
                f"the network takes images of {size} pixels, the demonstrations have {frames.image_size}: "
                f"record them again with `record-demos --image-size {size}`"
            )
        rows, valid = window_rows(frames.episode, indices, window)
        tasks = frames.task[indices]
        actions = np.take_along_axis(frames.gather("actions", rows), tasks[:, None, None, None], 2)[:, :, 0]
        return WindowBatch(
            frames.gather("images", rows),
            frames.gather("tcp", rows),
            actions,
            valid,
            self._words(indices, random),
        )

    def _words(self, indices: np.ndarray, random: np.random.Generator) -> list[str]:
        key = int(random.integers(2**62))
        phrasings = [self._frames.phrasings[self._frames.tasks[task]] for task in self._frames.task[indices]]
        draws = (np.random.default_rng([key, int(index)]) for index in indices)
        return [texts[draw.integers(len(texts))] for texts, draw in zip(phrasings, draws)]


def window_rows(episode: np.ndarray, starts: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of windows, (B, window), and whether each row (bool) is valid.

    episode: the episode of every row. starts (B,): the first row of each window. A row after the end of the
    start's episode is not valid; it repeats the last valid row.
    """
    rows = np.minimum(starts[:, None] + np.arange(window), len(episode) - 1)
    valid = episode[rows] == episode[starts][:, None]
    valid[:, 1:] &= rows[:, 1:] > rows[:, :-1]
    last = starts + valid.sum(1) - 1
    return np.where(valid, rows, last[:, None]), valid
