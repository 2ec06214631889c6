"""Writing of shards of demonstrations, in our own format or in CALVIN's; no shard is incomplete."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np

from deer_vla_ros.bag.calvin_files import (
    LARGEST_NUMBER,
    Annotation,
    CalvinStep,
    write_action_space,
    write_annotations,
    write_step,
)
from deer_vla_ros.control.motion import euler_of, motion_of, moved
from deer_vla_ros.control.types import Pose
from deer_vla_ros.errors import UserError, cause, shown
from deer_vla_ros.files import remove_leftovers, whole_file, whole_folder, write_text
from deer_vla_ros.inference.preprocess import resize_and_crop
from deer_vla_ros.lab.demonstrations.demonstrations import Demonstration, Moment
from deer_vla_ros.lab.sim.state import COLOURS, TableState
from deer_vla_ros.lab.sim.tasks import TASKS
from deer_vla_ros.lab.training.frames import ShardWriter
from deer_vla_ros.model.action_space import TABLETOP
from deer_vla_ros.untrusted import read_json

Settings = dict[str, Any]
"""What a shard depends on. Its names and values are written into the shard as JSON."""

Files = dict[Path, bytes]
"""The content of files by their paths in the folder of all shards."""

_STEPS_PER_SHARD = 10_000
"""In CALVIN's numbering; it is more than demonstrations.STEP_LIMIT times the demonstrations of a shard."""
CALVIN_SHARDS = (LARGEST_NUMBER + 1) // _STEPS_PER_SHARD


class Store(Protocol):
    """A folder of shards. It is sent to worker processes, so it holds only plain data."""

    def found(self) -> dict[int, Settings]:
        """Returns the settings of every complete shard by its number, with the number of its `episodes`.

        Removes what a killed run left.
        """

    def write(self, number: int, settings: Settings, episodes: Iterable[Demonstration]) -> int:
        """Writes one shard and returns the number of its frames."""

    def put(self, files: Files) -> None:
        """Writes the files of one shard, which `packed` has made on another machine."""

    def finish(self) -> None:
        """Completes the folder after the last shard."""


@dataclass(frozen=True)
class FrameStore:
    """The format of training.frames: a folder per shard, with images at the network's size."""

    folder: Path
    image_size: int

    def found(self) -> dict[int, Settings]:
        remove_leftovers(self.folder)
        metas = {number: shard / "meta.json" for number, shard in _shards(self.folder, "")}
        return {
            number: {"policy": None, **_read_json(path)} for number, path in metas.items() if path.is_file()
        }

    def write(self, number: int, settings: Settings, episodes: Iterable[Demonstration]) -> int:
        about = {name: settings[name] for name in ("seed", "policy", "phrasings")}
        writer = ShardWriter(
            self.folder / f"shard-{number:04d}", tuple(settings["tasks"]), self.image_size, about
        )
        frames = 0
        for episode in episodes:
            writer.add_episode(self._frame(episode, moment) for moment in episode.moments)
            frames += len(episode.moments)
        writer.close()
        return frames

    def put(self, files: Files) -> None:
        (shard,) = {path.parent for path in files}
        with whole_folder(self.folder / shard, sum(map(len, files.values()))) as scratch:
            scratch.mkdir()
            for path, content in files.items():
                (scratch / path.name).write_bytes(content)

    def _frame(self, episode: Demonstration, moment: Moment) -> dict[str, np.ndarray]:
        images = [
            resize_and_crop(image, self.image_size) for image in (moment.views.static, moment.views.gripper)
        ]
        task = np.asarray(TASKS.index(episode.task))
        return {"images": np.stack(images), "tcp": moment.tcp, "task": task, **vars(moment.labels)}

    def finish(self) -> None:
        pass


@dataclass(frozen=True)
class CalvinStore:
    """The format of training.calvin_files: a file per step with the cameras' own images, and `shard-*.json`.

    The step numbers of shard k begin at 10,000 k. Its .json file is written after its steps. `finish` makes
    the annotations from all .json files.
    """

    folder: Path

    def found(self) -> dict[int, Settings]:
        return {number: _read_json(path) for number, path in _shards(self.folder, ".json")}

    def write(self, number: int, settings: Settings, episodes: Iterable[Demonstration]) -> int:
        start = first = number * _STEPS_PER_SHARD
        random = np.random.default_rng([settings["seed"], 1])
        annotations = []
        for episode in episodes:
            for step, moment in enumerate(episode.moments, start=first):
                write_step(self.folder, step, calvin_step(episode, moment))
            end = first + len(episode.moments)
            annotations.append((first, end, episode.task.name, str(random.choice(episode.task.phrasings))))
            first = end
        about = {**settings, "episodes": len(annotations), "annotations": annotations}
        write_text(self.folder / f"shard-{number:04d}.json", json.dumps(about) + "\n")
        return first - start

    def put(self, files: Files) -> None:
        for path in sorted(files, key=lambda path: path.suffix == ".json"):
            with whole_file(self.folder / path, len(files[path])) as scratch:
                scratch.write_bytes(files[path])

    def finish(self) -> None:
        shards = sorted(self.found().items())
        write_annotations(self.folder, [each for shard in shards for each in _annotations_of(*shard)])
        write_action_space(self.folder, TABLETOP)


def packed(
    store: Store, number: int, settings: Settings, episodes: Iterable[Demonstration]
) -> tuple[int, Files]:
    """The number of a shard's frames, and its files, for a store that is on another machine."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        frames = replace(store, folder=folder).write(number, settings, episodes)
        files = (path for path in folder.rglob("*") if path.is_file())
        return frames, {path.relative_to(folder): path.read_bytes() for path in files}


def calvin_step(episode: Demonstration, moment: Moment) -> CalvinStep:
    """Returns a moment in the form of training.calvin_files."""
    wanted = moment.labels.actions[TASKS.index(episode.task)].astype(np.float64)
    target = moved(Pose(moment.tcp[:3], moment.tcp[3:]), *motion_of(wanted, TABLETOP))
    state = moment.state
    gripper = 1.0 if moment.gripper_open else -1.0
    return CalvinStep(
        rgb_static=moment.views.static,
        rgb_gripper=moment.views.gripper,
        rel_actions=wanted,
        actions=np.array([*target.position, *euler_of(target.quaternion), wanted[6]]),
        robot_obs=np.array(
            [*moment.tcp[:3], *euler_of(moment.tcp[3:]), state.opening, *moment.joints[:7], gripper]
        ),
        scene_obs=_scene_obs(state),
    )


def _scene_obs(state: TableState) -> np.ndarray:
    blocks = (state.block(colour) for colour in COLOURS)
    poses = [value for block in blocks for value in (*block.position, *euler_of(block.quaternion))]
    return np.array(
        [state.slider, state.drawer, 0.0, state.switch, float(state.lamp), float(state.led), *poses]
    )


def _shards(folder: Path, ending: str) -> Iterator[tuple[int, Path]]:
    """Number and path of each shard. What has another name than a Store gives is none of them."""
    for path in folder.glob(f"shard-*{ending}"):
        if name := re.fullmatch(rf"shard-([0-9]{{4,9}}){re.escape(ending)}", path.name):
            yield int(name[1]), path


def _read_json(path: Path) -> Settings:
    values = read_json(path, "remove this shard, and it is recorded again")
    if not isinstance(values, dict) or type(values.get("episodes")) is not int:
        raise UserError(f"{path} says no number of episodes: remove this shard, and it is recorded again")
    return values


def _annotations_of(shard: int, settings: Settings) -> list[Annotation]:
    """The annotations of a shard. Raises UserError if they are others than `CalvinStore.write` writes."""
    first, found = shard * _STEPS_PER_SHARD, []
    try:
        for start, end, task, text in settings["annotations"]:
            if type(start) is not int or type(end) is not int or not first <= start < end:
                raise ValueError(f"steps {shown(start)} to {shown(end)} are no interval")
            if end > first + _STEPS_PER_SHARD or not isinstance(task, str) or not isinstance(text, str):
                raise ValueError(f"{shown(task)} and {shown(text)} are no task and text of this shard")
            found.append(Annotation(start, end, task, text))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"shard-{shard:04d}.json has no annotations ({cause(error)}): remove it, and it is recorded again"
        ) from error
    return found
