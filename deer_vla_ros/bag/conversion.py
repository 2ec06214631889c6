"""Conversion of recordings into training data: episodes of one instruction each, in CALVIN's format.

The action of a step is the motion from the pose at its frame to the pose at the next step's frame (or to the
target), about one control period later, in units of the action space, and whether the gripper was then open.
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
from deer_vla_ros.bag.observed import LONGEST_SPAN, SHORTEST_SPAN, ObservedStep
from deer_vla_ros.control.motion import euler_of, motion_between
from deer_vla_ros.control.types import Pose
from deer_vla_ros.errors import UserError
from deer_vla_ros.files import whole_folder
from deer_vla_ros.model.action_space import ActionSpace


@dataclass
class Converted:
    """The result of a conversion.

    seconds: the sum of the times from each step to the next. gaps: places where an episode was split, because
    the next step did not come after about one period, or its target is not known. poseless: frames at which
    the pose is not known. targetless: steps without a fresh target. short: episodes that were too short.
    clipped: steps that moved further than an action can express. open: steps after which the gripper was
    open.
    """

    episodes: int = 0
    steps: int = 0
    seconds: float = 0.0
    gaps: int = 0
    poseless: int = 0
    targetless: int = 0
    short: int = 0
    clipped: int = 0
    open: int = 0
    texts: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """What the dataset holds, for the person who reads the report."""
        return [
            f"{self.episodes} episodes with {self.steps} steps",
            *(f"  {count} x {text}" for text, count in self.texts.most_common()),
            f"  the gripper is open after {self.open} of {self.steps} steps",
        ]

    def left_out(self) -> list[str]:
        """What was left out, one line for each reason."""
        counts = {
            "last steps of episodes, which have no next pose": self.episodes,
            f"gaps, where no next frame with a pose (and a target) follows after {SHORTEST_SPAN:g} to "
            f"{LONGEST_SPAN:g} control periods: episodes end there": self.gaps,
            "frames with no measured poses around them": self.poseless,
            "steps whose target is missing or old": self.targetless,
            "episodes of fewer than 3 steps": self.short,
        }
        return [f"{count} {what}" for what, count in counts.items() if count]


def spaced(seen: Iterable[ObservedStep], rate_hz: float) -> Iterator[ObservedStep]:
    """Chooses steps at the control rate: after each, the one whose frame is nearest to a period later.

    The controller itself cannot wait for a better frame. It leaves out one that is early by more than the
    pace allows, and would lose every other frame of a jittering camera here.
    """
    period_ns, last, chosen = 1e9 / rate_hz, None, None
    for step in chain(seen, (None,)):
        is_end = step is None or last is None
        if is_end or step.stamp_ns <= last.stamp_ns or step.instruction != last.instruction:
            # Frames that come soon after the last step lie between two steps.
            if chosen is not None and chosen.stamp_ns - last.stamp_ns >= SHORTEST_SPAN * period_ns:
                yield chosen
            if step is not None:
                yield step
            last, chosen = step, None
            continue
        if chosen is not None:
            due_ns = last.stamp_ns + period_ns
            if abs(step.stamp_ns - due_ns) >= abs(chosen.stamp_ns - due_ns):
                yield chosen
                last = chosen
        chosen = step


def episodes(
    seen: Iterable[ObservedStep], rate_hz: float, source: str, converted: Converted
) -> Iterator[Iterator[ObservedStep]]:
    """Splits the steps into episodes of one instruction each, whose steps are about one period apart.

    A dataset says no time of a step, so an action has to be the motion of one control period. Where the next
    step comes earlier or later than SHORTEST_SPAN to LONGEST_SPAN, or where the motion leads is not known,
    the episode ends, and `converted` counts a gap. Read each episode to its end before the next one. Only one
    step at a time is in memory.
    """
    episode, last = 0, None

    def number(step: ObservedStep) -> int:
        nonlocal episode, last
        if last is not None:
            span = (step.stamp_ns - last.stamp_ns) * rate_hz / 1e9
            is_gap = not SHORTEST_SPAN <= span <= LONGEST_SPAN or _end(step, source) is None
            is_gap = is_gap and step.instruction == last.instruction
            converted.gaps += is_gap
            episode += is_gap or step.instruction != last.instruction
        last = step
        return episode

    def known() -> Iterator[ObservedStep]:
        for step in spaced(seen, rate_hz):
            converted.poseless += step.pose is None
            converted.targetless += _end(step, source) is None and step.pose is not None
            if step.pose is not None:
                yield step

    return (steps for _, steps in groupby(known(), key=number))


def _end(following: ObservedStep, source: str) -> Pose | None:
    """Where a motion leads, if the next step is `following`."""
    return following.target if source == "target" else following.pose


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
            for episode in episodes(seen, rate_hz, source, converted):
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
                f"{_why_none(converted)}: nothing is written"
            )
        dataset.close()
    return converted


def _why_none(converted: Converted) -> str:
    if converted.targetless:
        remedy = "name its topic with --topic target_pose:=TOPIC"
        return f" ({converted.targetless} steps without a fresh target: {remedy})"
    if converted.gaps or converted.poseless:
        remedy = "set control.rate_hz to the rate of cameras and poses"
        return f" ({converted.gaps} gaps, {converted.poseless} frames without poses around them: {remedy})"
    return ""


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
    start, end = now.pose, _end(following, source)
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
