"""The episodes of a LeRobotDataset as moments at a control rate, with images, pose, gripper and
instruction."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa

from deer_vla_ros.bag.observed import ObservedStep
from deer_vla_ros.control.types import Pose
from deer_vla_ros.errors import UserError, cause
from deer_vla_ros.inference.types import Observation
from deer_vla_ros.lab.lerobot.lerobot_columns import LerobotColumns
from deer_vla_ros.lab.lerobot.lerobot_folder import LONGEST_S, LerobotEpisode, LerobotFolder, batches
from deer_vla_ros.lab.lerobot.video_frames import VideoFrames, decoded_image
from deer_vla_ros.model.action_space import ActionSpace

LARGEST_UNEVENNESS = 0.25
"""The time between two chosen rows may differ from a control period by this share of it."""


@dataclass
class LerobotAccount:
    """What was not used. between: rows between the chosen ones. lost_rows: rows that an episode lacks.

    lost_frames: by camera, times for which its video has no frame. taskless: episodes without a task text.
    """

    between: int = 0
    lost_rows: int = 0
    lost_frames: Counter[str] = field(default_factory=Counter)
    taskless: int = 0

    def lines(self) -> list[str]:
        """What was left out, one line for each reason."""
        lost = [f"{count} frames that the video of {key} lacks" for key, count in self.lost_frames.items()]
        counts = {
            "rows between the steps": self.between,
            "rows that the dataset lacks": self.lost_rows,
            "episodes without a task": self.taskless,
        }
        return [*(f"{count} {what}" for what, count in counts.items() if count), *lost]


@dataclass(frozen=True, eq=False)
class _DataRow:
    """A row of the data, with its columns as they are in the file."""

    batch: pa.RecordBatch
    number: int

    def value(self, key: str):
        return self.batch.column(key)[self.number].as_py()

    def array(self, key: str) -> np.ndarray:
        """The numbers of a column as a flat float64 array; a missing number is NaN."""
        return np.ravel(np.array(self.value(key), dtype=np.float64))


class LerobotMoments:
    """Reads the dataset at `rate_hz`. Each moment's gripper is a value of `space`.

    instruction: in place of the tasks. Raises UserError for a rate that the dataset cannot give.
    """

    def __init__(
        self,
        folder: LerobotFolder,
        columns: LerobotColumns,
        space: ActionSpace,
        rate_hz: float,
        instruction: str | None = None,
    ):
        columns.check(folder)
        self._repeated = columns.repeated_command(folder)
        self._folder, self._columns, self._space, self._instruction = folder, columns, space, instruction
        self._rate_hz, self._spacing = rate_hz, spacing(folder.fps, rate_hz)
        cameras = (columns.static, columns.gripper)
        self._videos = tuple(key for key in cameras if folder.features[key].dtype == "video")
        self._images = tuple(key for key in cameras if key not in self._videos)
        self._frames = {key: VideoFrames(0.5 / folder.fps) for key in self._videos}
        self._open: tuple[Path, Iterator[tuple[int, Iterator[_DataRow]]]] | None = None
        self.account = LerobotAccount()

    def episodes(self) -> Iterator[LerobotEpisode]:
        """The episodes, without what is in them."""
        return self._folder.episodes(self._videos)

    def recordings(self, episodes: Iterable[LerobotEpisode]) -> Iterator[tuple[Path, Iterator[ObservedStep]]]:
        """Yields for each episode the file of its rows, and its moments. Read them before the next ones.

        Where rows or frames are missing, the times of the moments have a gap.
        """
        try:
            for episode in episodes:
                yield episode.rows, self._moments(episode)
        finally:
            for frames in self._frames.values():
                frames.close()

    def _rows(self, episode: LerobotEpisode) -> Iterator[_DataRow]:
        """The rows of an episode. Files that hold several are read once, in their order."""
        if self._open is None or self._open[0] != episode.rows:
            groups = groupby(self._file_rows(episode.rows), key=lambda row: row.value("episode_index"))
            self._open = episode.rows, groups
        for index, rows in self._open[1]:
            if index == episode.index:
                return rows
        raise UserError(
            f"{episode.rows}: has no rows of episode {episode.index} where the metadata says: "
            "copy the dataset again"
        )

    def _file_rows(self, path: Path) -> Iterator[_DataRow]:
        columns = ["episode_index", "timestamp", *self._columns.numbers, *self._images]
        for batch in batches(path, columns, ["task_index"]):
            for number in range(batch.num_rows):
                yield _DataRow(batch, number)

    def _moments(self, episode: LerobotEpisode) -> Iterator[ObservedStep]:
        """The rows that are chosen at the control rate, as moments at multiples of the control period."""
        start, before, wanted, taskless = None, None, 0, False
        for row in self._rows(episode):
            time = row.value("timestamp")
            if not isinstance(time, float) or not abs(time) < LONGEST_S:
                raise UserError(
                    f"{episode.rows}: episode {episode.index} has the timestamp {time}: copy it again"
                )
            start = time if start is None else start
            number = round((time - start) * self._folder.fps)  # of the row, if none is missing
            due = max(wanted, math.ceil((number - 0.5) / self._spacing))
            self.account.lost_rows += due - wanted
            wanted = due
            if round(wanted * self._spacing) == number:
                text = self._text(episode, row)
                taskless = taskless or not text
                images = self._images_at(episode, row, time) if text else None
                if images is not None:
                    pose, gripper = self._arm_at(episode, row, before, time)
                    stamp = round(wanted * 1e9 / self._rate_hz)
                    at_frame = Pose(pose[:3], pose[3:])
                    yield ObservedStep(text, Observation(*images, pose), stamp, at_frame, gripper, None)
                wanted += 1
            else:
                self.account.between += 1
            before = row
        self.account.taskless += taskless

    def _images_at(
        self, episode: LerobotEpisode, row: _DataRow, time: float
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """The images of both cameras; None, and counted, if one has no frame for this time."""
        images = []
        for key in (self._columns.static, self._columns.gripper):
            image = self._image(episode, row, key, time)
            if image is None:
                self.account.lost_frames[key] += 1
                return None
            images.append(image)
        return images[0], images[1]

    def _arm_at(
        self, episode: LerobotEpisode, row: _DataRow, before: _DataRow | None, time: float
    ) -> tuple[np.ndarray, float]:
        """The TCP pose, and the gripper as a value of the action space."""
        columns = self._columns
        try:
            pose = columns.pose([row.array(key) for key in columns.state])
            is_open = columns.is_open(self._gripper_number(row, before))
        except (ValueError, TypeError, IndexError) as error:
            raise UserError(
                f"{episode.rows}: episode {episode.index} at {time:.3f} s: {cause(error)}"
            ) from error
        return pose, self._space.gripper_open if is_open else self._space.gripper_closed

    def _gripper_number(self, row: _DataRow, before: _DataRow | None) -> float:
        """How open the gripper is at this row, or what it was told by then.

        A command counts from its row on, so it is that of the row before. An episode's first row has none
        before it. If the state repeats the last command, as the state that `convert-bag` writes does, it is
        taken from there: that number has the command's name and one of its two values. Otherwise the first
        row's own command is taken, as if the gripper did not act there.
        """
        if before is None and self._repeated:
            key, number = self._repeated
            value = row.array(key)[number]
            if self._columns.is_end(value):
                return value
        told = before if before and self._columns.gripper_is_command else row
        return told.array(self._columns.gripper_key)[self._columns.gripper_at]

    def _text(self, episode: LerobotEpisode, row: _DataRow) -> str:
        if self._instruction is not None:
            return self._instruction
        if "task_index" in row.batch.schema.names:
            index = row.value("task_index")
            return self._folder.tasks.get(index, "") if isinstance(index, int) else ""
        return episode.tasks[0] if episode.tasks else ""

    def _image(self, episode: LerobotEpisode, row: _DataRow, key: str, time: float) -> np.ndarray | None:
        if key in self._frames:
            span = episode.videos[key]
            return self._frames[key].at(span.path, span.start_s + time)
        cell = row.value(key)
        try:
            data = cell["bytes"] if isinstance(cell, dict) else cell
            if not isinstance(data, bytes):
                raise ValueError("it has no bytes")
            return decoded_image(data)
        except Exception as error:  # Pillow raises many kinds for damaged files
            raise UserError(
                f"{episode.rows}: {key} at {time:.3f} s is no image ({cause(error)}): copy it again"
            ) from error


def spacing(fps: float, rate_hz: float) -> float:
    """How many rows one step takes.

    Raises UserError for a rate above fps, and for one that rows can only give with uneven steps: none may
    be longer or shorter than the mean by more than LARGEST_UNEVENNESS.
    """
    rows = fps / rate_hz
    low, high = max(int(rows), 1), int(rows) + 1
    if rows < 0.99:
        raise UserError(
            f"--rate-hz is {rate_hz:g}, the dataset has {fps:g} frames per second: frames cannot be made up: "
            f"give {fps:g} or less"
        )
    if abs(rows - round(rows)) < 0.01:
        return round(rows)
    if max(rows - low, high - rows) > LARGEST_UNEVENNESS * rows:
        raise UserError(
            f"--rate-hz is {rate_hz:g}, the dataset has {fps:g} frames per second: steps of {low} and "
            f"of {high} frames are too uneven: give {fps / low:g} or {fps / high:g}"
        )
    return rows
