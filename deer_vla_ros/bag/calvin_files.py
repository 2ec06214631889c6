"""Files in CALVIN's format: one .npz file per step, and a list of intervals that have an instruction.

Source: https://github.com/mees/calvin, dataset/README.md and calvin_models/calvin_agent/datasets. A folder
`training` or `validation` holds:

    episode_0358482.npz                 one step; the numbers of consecutive steps are consecutive
    ep_start_end_ids.npy                (N, 2) first and last step of each recording without a break
    lang_annotations/auto_lang_ann.npy  a pickled dict: language.ann, .task, .emb, and info.indx with
                                        (first, end) of each interval

`end` is not part of the interval: CALVIN's annotator writes (first, first + length), and its loader never
reads further.

Folders that this package writes also have recordings.json, which says what an action means (`action_space`).

The data of the simulated table (demonstrations/record_store.py) differs in these points:
- The world frame is the arm's base frame. A rel_action of 1 is 0.03 m or 0.15 rad; in CALVIN it is 0.02 m or
  0.05 rad. Steps are 0.1 s apart; in CALVIN they are 1/30 s apart.
- Actions are the expert's answers without noise. Where noise or a policy moved the arm, they were not carried
  out.
- scene_obs: slider, drawer [m], button (always 0), switch [m], lamp, LED (0 or 1), then red, blue and pink
  block as in CALVIN.
- robot_obs[14], the gripper action, is the gripper command of the step before.
- language.emb has width 0. There are no depth, tactile or statistics files.
- Step numbers have gaps between episodes. Each episode is one interval.
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deer_vla_ros.bag.pickled_array import read_pickled, write_pickled
from deer_vla_ros.errors import UserError
from deer_vla_ros.files import whole_file, write_json, writing
from deer_vla_ros.model.action_space import ActionSpace

ANNOTATIONS = Path("lang_annotations", "auto_lang_ann.npy")
EPISODES = "ep_start_end_ids.npy"
RECORDINGS = "recordings.json"
LARGEST_NUMBER = 9_999_999

SHAPES = {"rel_actions": (7,), "actions": (7,), "robot_obs": (15,), "scene_obs": (24,)}
IMAGES = ("rgb_static", "rgb_gripper")


@dataclass(frozen=True, eq=False)
class CalvinStep:
    """One step: rgb_static (200, 200, 3) and rgb_gripper (84, 84, 3) uint8; the other arrays float64.

    rel_actions (7,): motion x, y, z and XYZ Euler angles, each -1..1; gripper 1 open, -1 closed.
    actions (7,): the pose after the motion [m, rad], and the gripper.
    robot_obs (15,): TCP position [m] and XYZ Euler angles, gripper width [m], seven joints [rad], gripper
    action.
    scene_obs (24,): sliding door, drawer, button, switch, light bulb, green light, then position and XYZ
    Euler angles of the red, blue and pink block.
    """

    rgb_static: np.ndarray
    rgb_gripper: np.ndarray
    rel_actions: np.ndarray
    actions: np.ndarray
    robot_obs: np.ndarray
    scene_obs: np.ndarray


@dataclass(frozen=True)
class Annotation:
    """The steps `first` to `end` - 1 carry out the instruction `text`."""

    first: int
    end: int
    task: str
    text: str


def write_step(folder: Path, number: int, step: CalvinStep) -> None:
    """Writes a step in a compressed file, as CALVIN does. Where the disk refuses it, raises UserError and
    leaves no file."""
    path = Path(_step_path(folder, number))
    with writing(path), contextlib.ExitStack() as undo:
        undo.callback(path.unlink, missing_ok=True)
        np.savez_compressed(path, **vars(step))
        undo.pop_all()


def read_step(folder: Path, number: int, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Decodes and returns only the arrays `names` of a step; the names are those of CalvinStep.

    Raises UserError if the file is missing or damaged.
    """
    path = _step_path(folder, number)
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {}
            for name in names:
                with archive.open(f"{name}.npy") as file:
                    arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing, but {ANNOTATIONS} speaks of it: unpack the data set again"
        ) from error
    except Exception as error:  # zipfile and numpy raise many kinds of exceptions for damaged files
        raise UserError(f"{path}: not a step of CALVIN's format ({error}): copy it again") from error
    for name, array in arrays.items():
        fits = array.ndim == 3 and array.dtype == np.uint8 if name in IMAGES else array.shape == SHAPES[name]
        if not fits:
            raise UserError(
                f"{path}: {name} has shape {array.shape} and type {array.dtype}, which is not CALVIN's: "
                "copy it again"
            )
    return arrays


def write_annotations(folder: Path, annotations: Iterable[Annotation]) -> None:
    """Writes the intervals. Each is recorded without a break, with the steps before and after it."""
    annotations = list(annotations)
    bounds = [(each.first, each.end) for each in annotations]
    language = {
        "ann": [each.text for each in annotations],
        "task": [each.task for each in annotations],
        "emb": np.zeros((len(annotations), 1, 0), np.float32),
    }
    (folder / ANNOTATIONS).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / EPISODES) as scratch:
        np.save(scratch, np.array([(first, end - 1) for first, end in bounds], dtype=np.int64).reshape(-1, 2))
    write_pickled(folder / ANNOTATIONS, {"language": language, "info": {"episodes": [], "indx": bounds}})


class CalvinWriter:
    """Writes episodes one after another into the new folder `training` of a dataset.

    folder: the dataset. about: facts on how it was recorded, which recordings.json gets. The numbers of the
    steps have a gap between two episodes.
    """

    def __init__(self, folder: Path, space: ActionSpace, **about: Any):
        self._folder, self._space, self._about = folder / "training", space, about
        self._annotations: list[Annotation] = []
        self._first = self._next = 0
        self._folder.mkdir(parents=True)

    def add(self, step: CalvinStep) -> None:
        """Writes the next step of the present episode."""
        write_step(self._folder, self._next, step)
        self._next += 1

    def end_episode(self, text: str) -> None:
        """The steps since the last call are one episode, which carries out the instruction `text`."""
        self._annotations.append(Annotation(self._first, self._next, text.replace(" ", "_"), text))
        self._first = self._next = self._next + 1

    def close(self) -> None:
        """Completes the dataset with the annotations and recordings.json."""
        write_annotations(self._folder, self._annotations)
        texts = Counter(each.text for each in self._annotations)
        write_action_space(self._folder, self._space, **self._about, episodes=dict(texts))


def read_annotations(folder: Path) -> list[Annotation]:
    """Reads the annotations. Raises UserError if they are missing or damaged."""
    path = folder / ANNOTATIONS
    if not path.is_file():
        raise UserError(f"{path} is missing: give a folder in CALVIN's format, such as task_D_D/training")
    try:
        found = read_pickled(path)
        texts, tasks, bounds = found["language"]["ann"], found["language"]["task"], found["info"]["indx"]
        annotations = [_annotation(*each) for each in zip(bounds, tasks, texts, strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not CALVIN's annotations ({error}): copy it again") from error
    if not annotations:
        raise UserError(f"{path}: annotates nothing: there is nothing to learn from in this folder")
    return annotations


def write_action_space(folder: Path, space: ActionSpace, **about: Any) -> None:
    """Writes beside the steps what their actions mean, and `about`: facts on how they were recorded."""
    write_json(folder / RECORDINGS, {"action_space": vars(space), **about})


def read_action_space(folder: Path) -> ActionSpace | None:
    """Returns what the actions of a folder mean, or None if it does not say so, as in CALVIN's own data.

    Raises UserError for a damaged file.
    """
    path = folder / RECORDINGS
    if not path.is_file():
        return None
    try:
        return ActionSpace.from_dict(json.loads(path.read_text())["action_space"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: says no action space ({error!r}): convert the recordings again") from error


def _annotation(bounds: Any, task: Any, text: Any) -> Annotation:
    first, end = (int(bound) for bound in bounds)
    if not 0 <= first < end <= LARGEST_NUMBER + 1:
        raise ValueError(f"steps {first} to {end} are no interval")
    return Annotation(first, end, str(task), str(text))


def _step_path(folder: Path, number: int) -> str:
    return os.path.join(folder, f"episode_{number:07d}.npz")
