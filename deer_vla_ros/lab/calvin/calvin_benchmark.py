"""CALVIN as a benchmark (benchmark.Benchmark): its chains, run on simulators in processes of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.types import Observation
from deer_vla_ros.lab.calvin.calvin_process import CalvinInstall, CalvinProcess, SimulatorLost
from deer_vla_ros.lab.calvin.calvin_sequences import CalvinSequence, CalvinState, start_of, states_for
from deer_vla_ros.lab.checksums import json_sha256
from deer_vla_ros.lab.scoring.benchmark import Group
from deer_vla_ros.lab.scoring.chain_run import Attempt, Chain, Driver, run_chains
from deer_vla_ros.lab.scoring.sentences import Sentence, sentences_sha256
from deer_vla_ros.model.action_space import CALVIN, ActionSpace

MOST_TRIES = 3
"""How often a group of chains is run while its simulators are lost."""


@dataclass(frozen=True)
class CalvinBenchmark:
    """CALVIN's LH-MTLC protocol.

    install: where the simulator is. versions: what each of its processes has to report. sequences, words: the
    chains, and the five sentences of each. alone: the sentences of tasks that are given alone. tasks: those
    that are evaluated. seed: selects the states in which tasks are given alone.
    """

    install: CalvinInstall
    versions: tuple[tuple[str, str], ...]
    sequences: tuple[CalvinSequence, ...]
    words: tuple[tuple[Sentence, ...], ...]
    alone: tuple[Sentence, ...]
    tasks: tuple[str, ...]
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        states = [[vars(each.state), each.tasks] for each in self.sequences]
        return {
            "benchmark": "calvin",
            "scene": self.install.scene,
            "renderer": self.install.renderer,
            "versions": dict(self.versions),
            "sequences_sha256": json_sha256(states),
            "words_sha256": sentences_sha256([each for words in self.words for each in words]),
            "seed": self.seed if self.alone else None,  # The words of chains are in their sum.
            "tasks_asked_for": list(self.tasks),
            "sentences_sha256": sentences_sha256(self.alone),
        }

    def singles(self) -> Sequence[Sentence]:
        return self.alone

    def cores_of(self, lanes: int) -> int:
        return lanes

    def open(self, lanes: int, space: ActionSpace) -> CalvinScenes:
        return CalvinScenes(self, lanes, space)


def versions_of(process: CalvinProcess) -> tuple[tuple[str, str], ...]:
    """The versions on which a simulator's figures depend."""
    return tuple(
        (name, getattr(process.about, name)) for name in ("numpy", "pybullet", "calvin_env", "sources")
    )


class CalvinScenes:
    """The simulators of one process of the evaluation. See benchmark.ChainScenes."""

    def __init__(self, benchmark: CalvinBenchmark, lanes: int, space: ActionSpace):
        self._benchmark, self._lanes, self._space = benchmark, lanes, space
        self._scenes: list[CalvinScene] = []

    def chains(self, group: Group) -> list[Chain]:
        asked, single = self._benchmark, group.single
        if single is None:
            found = [(asked.sequences[index], asked.words[index]) for index in group.indices]
        else:
            states = states_for(single.task)
            order = np.random.default_rng([asked.seed, len(states)]).permutation(len(states))
            found = [
                (CalvinSequence(states[order[index]], (single.task,)), (single,)) for index in group.indices
            ]
        return [
            Chain(
                sequence.state,
                sequence.tasks,
                tuple(each.text for each in words),
                tuple(each.wording for each in words),
            )
            for sequence, words in found
        ]

    def run(
        self, chains: Sequence[Chain], driver: Driver, step_limit: int, on_chain_end: Callable[[], None]
    ) -> list[tuple[Attempt, ...]]:
        """See benchmark.ChainScenes. If a simulator is lost, the chains are run again on new ones.

        Raises SimulatorLost if that happens MOST_TRIES times.
        """
        told = 0  # chains whose end was told in any try
        for tries in range(1, MOST_TRIES + 1):
            ended = 0

            def count() -> None:
                nonlocal ended, told
                ended += 1
                if ended > told:
                    told = ended
                    on_chain_end()

            try:
                return run_chains(chains, self._started(len(chains)), driver, step_limit, count)
            except SimulatorLost as error:
                self._close()
                if tries == MOST_TRIES:
                    raise
                print(f"evaluate: {error}: its chains are run again", file=sys.stderr, flush=True)
            except BaseException:
                self._close()
                raise
        raise AssertionError("MOST_TRIES is at least 1")

    def _started(self, count: int) -> list[CalvinScene]:
        """`count` scenes. New processes start at the same time."""
        while len(self._scenes) < min(count, self._lanes):
            self._scenes.append(CalvinScene(CalvinProcess(self._benchmark.install), self._space))
        for scene in self._scenes[:count]:
            found = versions_of(scene.process)
            if found != self._benchmark.versions:
                raise UserError(
                    f"evaluate: a simulator of CALVIN has {dict(found)}, and the evaluation was begun with "
                    f"{dict(self._benchmark.versions)}: install the same on every machine"
                )
        return self._scenes[:count]

    def _close(self) -> None:
        for scene in self._scenes:
            scene.process.close()
        self._scenes = []


class CalvinScene:
    """One simulator and its arm. See chain_run.ChainScene. CALVIN does not judge whether a task is possible.

    space: the units of the actions. Actions in CALVIN's own units are rounded to float16, as the reference
    implementation of DeeR does. Others become the same motion, limited to what CALVIN allows in one step.
    """

    def __init__(self, process: CalvinProcess, space: ActionSpace):
        self.process = process
        units = (space.translation_m / CALVIN.translation_m, space.rotation_rad / CALVIN.rotation_rad)
        self._factors = None if units == (1.0, 1.0) else np.repeat(units, 3)

    def begin(self, start: CalvinState) -> None:
        self._view = self.process.begin(*start_of(start))

    def ask(self, task: str) -> bool:
        self.process.ask(task)
        return True

    def observe(self) -> Observation:
        pose = self._view.robot_obs
        tcp = np.concatenate([pose[:3], Rotation.from_euler("xyz", pose[3:6]).as_quat()])
        return Observation(self._view.static, self._view.gripper, tcp)

    def act(self, pose: np.ndarray, gripper_open: bool) -> None:
        if self._factors is None:
            pose = np.asarray(pose, np.float16)
        else:
            pose = np.clip(pose * self._factors, -1.0, 1.0)
        self.process.send(np.append(pose, np.asarray(1 if gripper_open else -1, pose.dtype)))

    def finish(self) -> bool:
        self._view, done = self.process.receive()
        return done

    def approached(self) -> bool | None:
        return None
