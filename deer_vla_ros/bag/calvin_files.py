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
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deer_vla_ros.bag.folder_kinds import what_to_do_with
from deer_vla_ros.bag.pickled_array import read_pickled, write_pickled
from deer_vla_ros.errors import UserError, cause, shown
from deer_vla_ros.files import whole_file, write_json, writing
from deer_vla_ros.model.action_space import ActionSpace
from deer_vla_ros.untrusted import read_json, read_npz

ANNOTATIONS = Path("lang_annotations", "auto_lang_ann.npy")
EPISODES = "ep_start_end_ids.npy"
RECORDINGS = "recordings.json"
LARGEST_NUMBER = 9_999_999
MOST_BYTES = 64 * 2**20
"""The most bytes of the arrays of one step that are read. CALVIN's two images have 0.14 MB."""
MOST_STEPS = 20_000_000
"""The most annotated steps of a folder. 23,000 intervals of 64 steps are 1,500,000."""

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
    path = Path(_step_path(folder, number))
    try:
        arrays = read_npz(path, names, MOST_BYTES)
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing, but {ANNOTATIONS} speaks of it: unpack the data set again"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a step of CALVIN's format ({cause(error)}): copy it again") from error
    for name, array in arrays.items():
        if name in IMAGES:
            fits = array.ndim == 3 and array.shape[2] == 3 and array.size and array.dtype == np.uint8
        else:
            fits = array.shape == SHAPES[name] and array.dtype.kind == "f" and np.isfinite(array).all()
        if not fits:
            raise UserError(
                f"{path}: {name} has shape {array.shape} and type {array.dtype}, which is not CALVIN's, or "
                "values that are not finite: copy it again"
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
        raise UserError(f"{path} is missing: {_instead(folder)}")
    found = read_pickled(path)
    try:
        language = _entry(found, "language")
        texts, tasks = _entry(language, "ann"), _entry(language, "task")
        bounds = _entry(_entry(found, "info"), "indx")
        annotations = [_annotation(*each) for each in zip(bounds, tasks, texts, strict=True)]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: not CALVIN's annotations ({cause(error)}): copy it again") from error
    steps = sum(each.end - each.first for each in annotations)
    if steps > MOST_STEPS:
        raise UserError(f"{path}: annotates {steps} steps, and {MOST_STEPS} are the most: split the data set")
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
    values = read_json(path, "convert the recordings again")
    if not isinstance(values, dict) or "action_space" not in values:
        raise UserError(f"{path}: says no action space: convert the recordings again")
    return ActionSpace.from_dict(values["action_space"], str(path))


def _instead(folder: Path) -> str:
    """What to do about a folder without annotations, by what it is."""
    if hint := what_to_do_with(folder):
        return hint
    for split in ("training", "validation"):
        if (folder / split / ANNOTATIONS).is_file():
            return f"give {folder / split}"
    others = sorted(path.parent.name for path in folder.glob(f"lang_*/{ANNOTATIONS.name}"))
    if others:
        return (
            f"there are {', '.join(others)}, which differ in embeddings only, and those are not used: rename "
            f"one to {ANNOTATIONS.parent}"
        )
    return "give a folder in CALVIN's format, such as task_D_D/training"


def _entry(values: Any, name: str) -> Any:
    """The value under a name. Raises ValueError if there is none."""
    if not isinstance(values, dict) or name not in values:
        raise ValueError(f"no {name!r}")
    return values[name]


def _annotation(bounds: Iterable, task: Any, text: Any) -> Annotation:
    first, end = bounds
    if not all(
        isinstance(bound, (int, np.integer)) and not isinstance(bound, bool) for bound in (first, end)
    ):
        raise ValueError(f"{shown(first)} to {shown(end)} is no interval")
    if not isinstance(task, str) or not isinstance(text, str):
        raise ValueError(f"{shown(task)} and {shown(text)} are no task and instruction")
    if not 0 <= first < end <= LARGEST_NUMBER + 1:
        raise ValueError(f"steps {first} to {end} are no interval")
    text.encode()  # half of a character is a ValueError
    return Annotation(int(first), int(end), str(task), str(text))


def _step_path(folder: Path, number: int) -> str:
    return os.path.join(folder, f"episode_{number:07d}.npz")
