"""Tests of `evaluate --benchmark calvin`, on a program that stands in for CALVIN's simulator."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import wait_until
from stand_ins import stand_in_calvin

from deer_vla_ros.__main__ import main
from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.types import Action
from deer_vla_ros.lab.calvin.calvin_benchmark import CalvinBenchmark, CalvinScene, versions_of
from deer_vla_ros.lab.calvin.calvin_process import CalvinProcess
from deer_vla_ros.lab.calvin.calvin_sequences import START_STATES, TASK_RULES, generate
from deer_vla_ros.lab.calvin.calvin_wordings import words_of_chains
from deer_vla_ros.lab.scoring.benchmark import Group
from deer_vla_ros.lab.scoring.chain_run import LaneDecision
from deer_vla_ros.lab.scoring.sentences import Sentence
from deer_vla_ros.model.action_space import CALVIN, TABLETOP


@pytest.fixture(scope="module")
def install(tmp_path_factory):
    return stand_in_calvin(tmp_path_factory.mktemp("calvin"))


@pytest.fixture
def command(install):
    """The words of a command: four chains in two groups, four steps per instruction."""
    words = ("evaluate", "--benchmark", "calvin", "--calvin-root", str(install.root))
    return [*words, "--calvin-python", install.python, "--sequences", "4", "--steps", "4", "--lanes", "2"]


@pytest.fixture(scope="module")
def benchmark(install):
    with CalvinProcess(install) as process:
        versions = versions_of(process)
    sequences = generate(4)
    own = [Sentence(task, f"please {task}", "published") for task in TASK_RULES]
    return CalvinBenchmark(
        install, versions, sequences, words_of_chains(own, sequences), tuple(own), tuple(TASK_RULES)
    )


class KnowingDriver:
    """A driver that knows what the stand-in wants, but for the tasks that it fails."""

    def __init__(self, fails=()):
        self.tasks, self.fails = {}, fails

    def begin(self, lane, task, instruction):
        assert instruction == f"please {task}"
        self.tasks[lane] = task
        return 0

    def decide(self, scenes):
        decisions = {}
        for lane, scene in scenes.items():
            assert scene.observe().static.shape == (200, 200, 3)
            number, pose = list(TASK_RULES).index(self.tasks[lane]), np.zeros(6, np.float32)
            if self.tasks[lane] not in self.fails:
                pose[number % 3] = -1.0 if number % 2 else 1.0
            decisions[lane] = LaneDecision(pose, True)
        return decisions


def group(*indices, single=None):
    return Group(single, indices)


# The rules.


def test_a_chain_goes_on_from_state_to_state_until_the_first_failure(benchmark):
    scenes = benchmark.open(2, CALVIN)
    chains, ended = scenes.chains(group(0, 1)), []
    failing = benchmark.sequences[1].tasks[2]
    assert failing not in benchmark.sequences[0].tasks
    results = scenes.run(chains, KnowingDriver([failing]), 10, lambda: ended.append(1))
    assert [[attempt.succeeded for attempt in attempts] for attempts in results] == [
        [True] * 5,
        [True, True, False],
    ]
    assert [attempt.task for attempt in results[0]] == list(benchmark.sequences[0].tasks)
    assert {attempt.steps for attempt in results[0]} == {2} and results[1][2].steps == 10
    assert {attempt.wording for attempt in results[0]} == {"published"} and len(ended) == 2


def test_single_tasks_begin_in_states_that_allow_them_and_are_the_same_for_every_sentence(benchmark):
    scenes = benchmark.open(1, CALVIN)
    sentences = [Sentence("open_drawer", text, "own") for text in ("open it", "pull it out")]
    drawn_for = [scenes.chains(group(*range(6), single=sentence)) for sentence in sentences]
    states = [[chain.start for chain in chains] for chains in drawn_for]
    assert states[0] == states[1] and len(set(states[0])) == 6
    assert {state.drawer for state in states[0]} == {"closed"}
    assert [chains[0].instructions for chains in drawn_for] == [("open it",), ("pull it out",)]


def test_calvins_own_actions_are_rounded_as_the_reference_does_and_others_are_the_same_motion(install):
    pose = np.array([0.1, -0.2, 0.3, 0.4, -0.5, 0.6], np.float32)
    moved = {}
    for space in (CALVIN, TABLETOP):
        with CalvinProcess(install) as process:
            scene = CalvinScene(process, space)
            scene.begin(START_STATES[0])
            before = scene._view.robot_obs.copy()
            scene.ask("open_drawer")
            scene.act(pose, False)
            scene.finish()
            moved[space] = scene._view.robot_obs - before
            assert scene._view.robot_obs[14] == -1
            assert np.allclose(np.linalg.norm(scene.observe().tcp[3:]), 1)
    rounded = pose.astype(np.float16).astype(float)
    assert np.array_equal(rounded, pose.astype(float)) is False
    assert moved[CALVIN][:6] == pytest.approx(rounded * np.repeat([0.02, 0.05], 3), abs=1e-12)
    assert moved[TABLETOP][:3] == pytest.approx(pose[:3] * 0.03, abs=1e-9)
    assert moved[TABLETOP][3:6] == pytest.approx([0.05, -0.05, 0.05], abs=1e-9), "at most CALVIN's step"


# The command.


def figures(path):
    return json.loads(path.read_text())


def test_the_figures_are_the_same_for_any_number_of_processes_and_after_a_lost_simulator(
    command, tmp_path, monkeypatch, capfd
):
    reports = {}
    for name, jobs, fault in (
        ("one", "1", ""),
        ("two", "2", ""),
        ("crash", "1", "crash:2"),
        ("garbage", "1", "garbage:3"),
    ):
        monkeypatch.setenv("STAND_IN_FAULT", fault)
        monkeypatch.setenv("STAND_IN_FAULT_ONCE", str(tmp_path / f"{name} once"))
        path = tmp_path / f"{name}.json"
        assert main([*command, "--jobs", jobs, "--json", str(path)]) == 0
        reports[name] = path.read_bytes()
    assert len(set(reports.values())) == 1
    told = [line for line in capfd.readouterr().err.splitlines() if "its chains are run again" in line]
    assert len(told) == 2 and "ended with exit code 3: the arm fell off" in told[0]
    found = figures(tmp_path / "one.json")
    assert (found["benchmark"], found["chains"], found["steps_per_instruction"]) == ("calvin", 4, 4)
    assert found["scene"] == "calvin_scene_D" and found["versions"]["pybullet"] == "stand-in"
    assert found["exit_shares"] and found["wordings"]["published"]["trials"] >= 4


def test_a_simulator_that_is_lost_again_and_again_is_told_in_one_line_and_the_run_can_go_on(
    command, tmp_path, monkeypatch, capfd
):
    path = tmp_path / "report.json"
    monkeypatch.setenv("STAND_IN_FAULT", "crash:2")
    assert main([*command, "--jobs", "1", "--json", str(path)]) == 1
    *_, error = capfd.readouterr().err.splitlines()
    assert error == "error: the CALVIN simulator ended with exit code 3: the arm fell off"
    assert not path.exists()
    monkeypatch.delenv("STAND_IN_FAULT")
    assert main([*command, "--jobs", "1", "--json", str(path)]) == 0
    assert main([*command, "--jobs", "1", "--json", str(tmp_path / "whole.json")]) == 0
    assert path.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_a_run_does_not_go_on_with_other_files_of_calvin(command, tmp_path, monkeypatch, capsys):
    path = tmp_path / "report.json"
    monkeypatch.setenv("STAND_IN_FAULT", "error:6")
    assert main([*command, "--jobs", "1", "--json", str(path)]) == 1
    monkeypatch.delenv("STAND_IN_FAULT")
    monkeypatch.setenv("STAND_IN_SOURCES", "changed by somebody")
    assert main([*command, "--jobs", "1", "--json", str(path)]) == 1
    assert "interrupted run with other arguments (versions: " in capsys.readouterr().err
    monkeypatch.delenv("STAND_IN_SOURCES")
    assert main([*command, "--jobs", "1", "--json", str(path)]) == 0


def test_a_killed_run_leaves_no_simulator_and_goes_on(command, tmp_path, monkeypatch):
    path, partial = tmp_path / "report.json", tmp_path / "report.json.partial.jsonl"
    monkeypatch.setenv("STAND_IN_FAULT", "hang:6")
    monkeypatch.setenv("STAND_IN_MARK", str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-m", "deer_vla_ros", *command, "--jobs", "1", "--json", str(path)],
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: partial.is_file() and partial.read_text().count("\n") > 1, 120, "a group done")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until(lambda: not running(tmp_path), 60, "the simulators' end")
    monkeypatch.delenv("STAND_IN_FAULT")
    assert main([*command, "--jobs", "1", "--json", str(path)]) == 0
    assert figures(path)["chains"] == 4 and not partial.exists()


def running(mark):
    """The processes that have this mark in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if (
            f"STAND_IN_MARK={mark}".encode() in environment
            and b"stand_in" in (process / "cmdline").read_bytes()
        ):
            found.append(process.name)
    return found


def test_an_action_that_is_not_finite_is_one_line(command, monkeypatch, capfd):
    monkeypatch.setattr(Action, "is_finite", property(lambda action: False))
    assert main([*command, "--jobs", "1"]) == 1
    *_, error = capfd.readouterr().err.splitlines()
    assert error.startswith("error: evaluate: the network's action is not finite")


def test_other_wordings_come_from_files_of_the_field(command, tmp_path):
    enriched, own, path = tmp_path / "enriched.json", tmp_path / "own.json", tmp_path / "report.json"
    enriched.write_text(
        json.dumps([[f"chain {number}, {place}" for place in range(5)] for number in range(4)])
    )
    assert main([*command, "--chains", "3", "--enriched", str(enriched), "--json", str(path)]) == 0
    found = figures(path)
    assert found["chains"] == 3 and list(found["wordings"]) == ["enriched"]
    own.write_text(json.dumps({"open_drawer": ["open it", "pull"], "stack_block": ["on top"]}))
    path.unlink()
    assert main([*command, "--wordings", str(own), "--trials", "2", "--json", str(path)]) == 0
    found = figures(path)
    assert found["chains"] == 0 and [each["sentence"] for each in found["sentences"]] == ["open it", "pull"]
    assert all(each["trials"] == 2 for each in found["sentences"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--sequences", "0"), "--sequences is 0: give 1 to 10000, or a file"),
        (("--sequences", "/nowhere"), "/nowhere cannot be read"),
        (("--chains", "-1"), "--chains is -1: give 0 to 50000"),
        (("--chains", "0"), "neither --chains nor --trials asks for anything"),
        (("--trials", "97", "--tasks", "open_drawer"), "open_drawer has 96 start states in CALVIN"),
        (("--sequences", "9" * 5000), "cannot be read"),
        (("--chains", "5"), "--chains is 5, and 4 of the 4 sequences have only the tasks asked for"),
        (
            ("--tasks", "stack_block", "--chains", "0", "--trials", "1"),
            "no single task is given",
        ),
        (("--tasks", "fly"), "there is no task 'fly'"),
        (("--calvin-scene", "calvin_scene_E"), "no scene 'calvin_scene_E': choose one of calvin_scene_A"),
        (("--calvin-python", "/nowhere"), "the Python '/nowhere' cannot be run"),
        (("--phrasings", "both"), "--phrasings is not for --benchmark calvin"),
        (("--enriched", "a", "--wordings", "b"), "both choose the sentences"),
    ],
)
def test_arguments_that_cannot_be_met_are_refused_in_one_line(command, arguments, says, capsys):
    assert main([*command, *arguments]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_simulators_of_other_versions_are_refused(benchmark):
    other = dataclasses.replace(benchmark, versions=(("numpy", "1.0"),))
    scenes = other.open(1, CALVIN)
    with pytest.raises(UserError, match="the evaluation was begun with {'numpy': '1.0'}"):
        scenes.run(scenes.chains(group(0)), KnowingDriver(), 10, lambda: None)
