"""Conversion of recordings into training data: episodes of one instruction each, in CALVIN's format.

The action of a step is the motion from its measured pose to the measured pose (or the target) of the next
step, about one control period later, in units of the action space, and whether the gripper was then open.
Values that a robot does not know (scene_obs) are zero, and so are the joints.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, groupby, islice, pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from deer_vla_ros.bag.calvin_files import SHAPES, CalvinStep, CalvinWriter
from deer_vla_ros.bag.observed import ObservedStep
from deer_vla_ros.control.motion import euler_of, motion_between
from deer_vla_ros.control.pace import JITTER
from deer_vla_ros.errors import UserError
from deer_vla_ros.files import whole_folder
from deer_vla_ros.model.action_space import ActionSpace

SHORTEST_MOTION, LONGEST_MOTION = 1 - 2 * JITTER, 1 + 2 * JITTER
"""In control periods: the least and the most time from one step to the next in an episode. Both stamps may
jitter as much as the pace allows a frame to be early."""


@dataclass
class Converted:
    """The result of a conversion.

    seconds: the sum of the times from each step to the next. gaps: places where an episode was split, because
    the next step did not come after about one period. short: episodes that were too short. clipped: steps
    that moved further than an action can express. open: steps after which the gripper was open.
    """

    episodes: int = 0
    steps: int = 0
    seconds: float = 0.0
    gaps: int = 0
    short: int = 0
    clipped: int = 0
    open: int = 0
    texts: Counter[str] = field(default_factory=Counter)


def episodes(
    seen: Iterable[ObservedStep], rate_hz: float, converted: Converted
) -> Iterator[Iterator[ObservedStep]]:
    """Splits the steps into episodes of one instruction each, whose steps are about one period apart.

    A dataset says no time of a step, so an action has to be the motion of one control period. Where the next
    step comes earlier or later than SHORTEST_MOTION to LONGEST_MOTION, or its pose was measured so, the
    episode ends, and `converted` counts a gap. Read each episode to its end before the next one. Only one
    step at a time is in memory.
    """
    episode, last = 0, None

    def number(moment: ObservedStep) -> int:
        nonlocal episode, last
        if last is not None:
            is_gap = moment.instruction == last.instruction and not _follows(last, moment, rate_hz)
            converted.gaps += is_gap
            episode += is_gap or moment.instruction != last.instruction
        last = moment
        return episode

    return (moments for _, moments in groupby(seen, key=number))


def _follows(step: ObservedStep, following: ObservedStep, rate_hz: float) -> bool:
    """Whether both the frames and the poses of two steps are about one period apart."""
    spans = (following.stamp_ns - step.stamp_ns, following.pose.stamp_ns - step.pose.stamp_ns)
    return all(SHORTEST_MOTION <= span * rate_hz / 1e9 <= LONGEST_MOTION for span in spans)


class EpisodeWriter(Protocol):
    """Writes a dataset, one step after another."""

    def add(self, step: CalvinStep) -> None:
        """Writes the next step of the present episode."""

    def end_episode(self, text: str) -> None:
        """The steps since the last call are one episode, which carries out the instruction `text`."""

    def close(self) -> None:
        """Completes the dataset."""


def convert(
    recordings: Iterable[tuple[Path, Iterable[ObservedStep]]],
    out: Path,
    space: ActionSpace,
    rate_hz: float,
    source: str,
    shortest: int = 2,
    writer: Callable[..., EpisodeWriter] = CalvinWriter,
) -> Converted:
    """Writes the dataset `out`; it is complete or does not exist.

    source: the end of a motion, "measured" pose or "target". shortest: least number of steps in an episode.
    writer: makes the writer, from the dataset's folder, which does not exist yet, the action space, and
    `actions` and `rate_hz` as facts on the dataset. Raises UserError if the recordings hold no usable episode
    or no gripper command.
    """
    if out.exists():
        raise UserError(f"--out is {out}, which exists: give the dataset a new folder")
    converted = Converted()
    with whole_folder(out) as made:
        dataset = writer(made, space, actions=source, rate_hz=rate_hz)
        for path, seen in recordings:
            for episode in episodes(seen, rate_hz, converted):
                beginning = list(islice(episode, shortest + 1))
                if len(beginning) <= shortest:
                    converted.short += 1
                    continue
                for now, following in pairwise(chain(beginning, episode)):
                    dataset.add(_step(path, now, following, space, source, converted))
                    converted.steps += 1
                    converted.seconds += (following.stamp_ns - now.stamp_ns) / 1e9
                text = beginning[0].instruction
                dataset.end_episode(text)
                converted.episodes += 1
                converted.texts[text] += 1
        if not converted.episodes:
            raise UserError(
                f"no episode of more than {shortest} steps in these recordings"
                + (
                    f" ({converted.gaps} gaps: set control.rate_hz to the rate of cameras and poses)"
                    if converted.gaps
                    else ""
                )
                + ": nothing is written"
            )
        dataset.close()
    return converted


def _step(
    path: Path,
    now: ObservedStep,
    following: ObservedStep,
    space: ActionSpace,
    source: str,
    converted: Converted,
) -> CalvinStep:
    if following.gripper is None:
        raise UserError(
            f"{path}: no gripper command by {following.stamp_ns / 1e9:.3f} s: "
            "name its topic with --topic gripper_command:=TOPIC, start the recording before the first one, "
            "or read the gripper's joint state with --gripper-range CLOSED OPEN"
        )
    start, end = now.pose.pose, following.pose.pose
    if source == "target":
        if following.target is None:
            raise UserError(
                f"{path}: no target by {following.stamp_ns / 1e9:.3f} s: "
                "name its topic with --topic target_pose:=TOPIC"
            )
        end = following.target
    translation, rotation = motion_between(start, end)
    wanted = np.concatenate(
        [translation / space.translation_m, rotation.as_euler("xyz") / space.rotation_rad]
    )
    converted.clipped += bool((np.abs(wanted) > 1).any())
    before, after = (_is_open(moment.gripper, space) for moment in (now, following))
    converted.open += after > 0
    return CalvinStep(
        rgb_static=now.observation.static,
        rgb_gripper=now.observation.gripper,
        rel_actions=np.array([*np.clip(wanted, -1, 1), after]),
        actions=np.array([*end.position, *euler_of(end.quaternion), after]),
        robot_obs=np.array(
            [*start.position, *euler_of(start.quaternion), now.gripper or 0.0, *np.zeros(7), before]
        ),
        scene_obs=np.zeros(SHAPES["scene_obs"]),
    )


def _is_open(command: float | None, space: ActionSpace) -> float:
    """Returns 1 if the command is nearer to open than to closed, and -1 otherwise."""
    if command is None:
        return 1.0
    return 1.0 if abs(command - space.gripper_open) < abs(command - space.gripper_closed) else -1.0
