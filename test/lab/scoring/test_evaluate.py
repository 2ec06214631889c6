"""Tests of the command `evaluate`: few and short chains of the embedded checkpoint, interrupted or not."""

import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import wait_until

from deer_vla_ros.__main__ import main
from deer_vla_ros.budget.cost import cost_table
from deer_vla_ros.budget.types import Budget
from deer_vla_ros.commands.evaluate_command import exit_choice
from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.scoring.benchmark import Group
from deer_vla_ros.lab.scoring.chain_report import mean_interval, rate_interval, report_text, summary
from deer_vla_ros.lab.scoring.chain_run import Attempt
from deer_vla_ros.lab.scoring.evaluation_run import groups_of
from deer_vla_ros.lab.scoring.network_driver import ExitChoice
from deer_vla_ros.lab.scoring.resume_file import ResumeFile
from deer_vla_ros.lab.scoring.sentences import Sentence, read_sentences
from deer_vla_ros.lab.scoring.table_benchmark import TableBenchmark, TableScenes
from deer_vla_ros.lab.sim.tasks import TASKS
from deer_vla_ros.model.action_space import TABLETOP
from deer_vla_ros.model.checkpoint import EMBEDDED, load
from deer_vla_ros.model.config import tabletop

SHORT = ("evaluate", "--chains", "2", "--trials", "1", "--steps", "2", "--seed", "10", "--jobs", "1")
KEYS = """chains average_length average_length_ci success_by_position tasks llm_gmac_mean llm_gmac_static
saved exit_shares budget checkpoint_sha256 seed steps_per_instruction phrasings infeasible singles wordings
benchmark""".split()


# The command.


def test_a_run_that_was_killed_goes_on_to_the_report_of_an_uninterrupted_one(tmp_path, monkeypatch):
    path, partial = tmp_path / "report.json", tmp_path / "report.json.partial.jsonl"
    command = [sys.executable, "-m", "deer_vla_ros", *SHORT, "--json", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: partial.is_file() and partial.read_text().count("\n") > 3, 240, "a part done")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not path.exists(), "the kill came before the end"
    before = partial.read_text()
    partial.write_text(
        before + '["lift_pink_block 0", [[{"task"'
    )  # A process that is killed while it writes a line leaves the file like this.
    assert main([*SHORT, "--exit", "3", "--json", str(path)]) == 1, "other arguments are refused"
    assert partial.read_text().startswith(before)
    assert main([*SHORT, "--json", str(path)]) == 0
    assert list(tmp_path.iterdir()) == [path], "nothing else is left"
    # An uninterrupted run. This process draws again only the chains that the killed process had drawn.
    drawn, chains = [], TableScenes.chains
    monkeypatch.setattr(TableScenes, "chains", lambda *asked: drawn.append(asked) or chains(*asked))
    assert main([*SHORT, "--json", str(tmp_path / "whole.json")]) == 0
    finished = before.count("\n") - 1  # The first line is not of a group. The first group has two chains.
    assert len(drawn) == finished
    assert path.read_bytes() == (tmp_path / "whole.json").read_bytes()
    # What the report says.
    figures = json.loads(path.read_text())
    assert set(KEYS) <= set(figures)
    assert figures["chains"] == 2 and len(figures["success_by_position"]) == 5
    assert figures["average_length_ci"][0] <= figures["average_length"] <= figures["average_length_ci"][1]
    assert set(figures["singles"]) == {task.name for task in TASKS}
    assert all(row["trials"] == 1 for row in figures["singles"].values())
    assert figures["budget"] == {"thresholds": "checkpoint"} and len(figures["checkpoint_sha256"]) == 64
    assert sum(figures["exit_shares"]) == pytest.approx(1.0)
    assert 1 < figures["saved"] == pytest.approx(figures["llm_gmac_static"] / figures["llm_gmac_mean"])
    assert (figures["seed"], figures["steps_per_instruction"], figures["phrasings"]) == (10, 2, "training")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--seed", "-1"), "--seed is -1: give 0 or more, since seeds below 1,000,000 belong to training"),
        (("--chains", "0"), "neither --chains nor --trials"),
        (("--chains", "60000"), "give 0 to 50000"),
        (("--jobs", "0"), "--jobs is 0: give 1 or more"),
        (("--lanes", "0"), "--lanes is 0: give 1 to 1024"),
        (("--tasks", "open_drawer,fly"), "--tasks: there is no task 'fly': the tasks are "),
        (("--calvin-root", "/"), "--calvin-root is not for --benchmark table"),
        (("--device", "cuda"), "--device is cuda, but torch sees no GPU on "),
        (("--exit", "0"), "--exit is 0, but the exits are at layers 1, 3"),
        (("--thresholds", "1,2"), "2 --thresholds for the"),
        (("--thresholds", "a,b"), "give numbers with commas"),
        (("--budget", "average_ms=5"), "one of average_gmac, average_fraction, peak_gmac, memory_gib"),
        (("--budget", "average_fraction=x"), "a positive number"),
        (("--budget", "average_fraction=0.01"), "which is not at least the"),
        (("--checkpoint", "/nowhere"), "config.json is missing"),
    ],
)
def test_arguments_that_cannot_be_met_are_refused_at_once_in_one_line(arguments, says, capsys):
    assert main(["evaluate", *arguments]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_only_one_of_the_ways_to_choose_a_depth_is_accepted(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--exit", "3", "--full-depth"])
    assert ended.value.code == 2 and "not allowed with" in capsys.readouterr().err


def test_groups_hold_every_chain_and_trial_once_and_do_not_depend_on_the_processes():
    singles = [
        Sentence("lift", "", ""),
        Sentence("lift", "lift it", "own"),
        Sentence("lift", "lift it", "two"),
    ]
    groups = groups_of(19, singles, trials=9, lanes=8)
    assert [len(group.indices) for group in groups[:3]] == [8, 8, 3]
    for single, count in ((None, 19), *((single, 9) for single in singles)):
        indices = [index for group in groups if group.single == single for index in group.indices]
        assert indices == list(range(count))
    assert len({group.key for group in groups}) == len(groups)


# The choice of exits.


def test_a_budget_gives_thresholds_for_every_length_and_a_fixed_exit_just_that_one():
    checkpoint = load(EMBEDDED)
    config, exits = checkpoint.info.model, checkpoint.info.model.exits
    peak = cost_table(config, 14).language(exits[2] + 1)
    rule_of = ExitChoice(budget=Budget(average_fraction=0.5, peak_gmac=peak)).rule_of(checkpoint)
    rules = {tokens: rule_of(tokens, 0) for tokens in (6, 14, 6)}
    assert rules[14].deepest == exits[2] < rules[6].deepest, "longer instructions cost more"
    assert cost_table(config, 6).language(rules[6].deepest + 1) <= peak
    assert ExitChoice(exit_layer=exits[1]).rule_of(checkpoint)(9, 0).exits == (exits[1],)
    assert ExitChoice(full_depth=True).rule_of(checkpoint)(9, 0).exits == (exits[-1],)
    assert ExitChoice().rule_of(checkpoint)(9, 0).thresholds == checkpoint.info.thresholds


def test_an_exit_by_time_holds_until_its_step():
    checkpoint = load(EMBEDDED)
    exits = checkpoint.info.model.exits
    rule_of = ExitChoice(by_time=((exits[0], 3), (exits[2], 5))).rule_of(checkpoint)
    taken = [rule_of(9, step).deepest for step in range(7)]
    assert taken == [exits[0]] * 3 + [exits[2]] * 2 + [exits[-1]] * 2
    with pytest.raises(UserError, match="the exits are at layers"):
        ExitChoice(by_time=((exits[0] + 1, 3),)).rule_of(checkpoint)
    for text in ("1:5,3:2", "1", "a:2", ""):
        with pytest.raises(UserError, match="--exit-by-time is"):
            exit_choice(SimpleNamespace(budget=None, thresholds=None, exit_by_time=text))


# The figures.


def attempt(succeeded: bool, steps: int = 10, **changes) -> Attempt:
    values = dict(
        task="lift_red_block",
        instruction="lift the red block",
        wording="training",
        position=0,
        feasible=True,
        succeeded=succeeded,
        steps=steps,
        approached=succeeded,
        tokens=7,
        exits={1: steps},
    )
    return Attempt(**{**values, **changes})


def test_lengths_costs_and_shares_are_added_up_over_steps():
    config = tabletop(layers=12)
    chains = [
        [attempt(True, 10, exits={1: 6, 5: 4}), attempt(False, 80, exits={11: 80}, tokens=9)],
        [attempt(False, 0, exits={}, feasible=False, approached=None, wording="held-out")],
        [attempt(True, 2, exits={1: 2}, task="open_drawer", approached=None)] * 5,
    ]
    found = summary(config, chains, [], ["open_drawer", "lift_red_block"])
    assert list(found["tasks"]) == ["open_drawer", "lift_red_block"], "in the order of the tasks"
    assert found["average_length"] == 2.0
    assert found["success_by_position"] == pytest.approx([2 / 3, 1 / 3, 1 / 3, 1 / 3, 1 / 3])
    assert found["tasks"]["lift_red_block"] == {"rate": 1 / 3, "trials": 3, "approached": 0.5}
    assert found["tasks"]["open_drawer"] == {"rate": 1.0, "trials": 5, "approached": None}
    assert found["infeasible"] == 1 and found["singles"] is None
    told = found["wordings"]["held-out"]
    assert (told["rate"], told["trials"], told["layers"]) == (0.0, 1, None)
    assert found["wordings"]["training"]["layers"] == pytest.approx((16 * 2 + 4 * 6 + 80 * 12) / 100)
    short, long = cost_table(config, 7), cost_table(config, 9)
    gmac = 16 * short.language(2) + 4 * short.language(6) + 80 * long.language(12)
    assert found["steps"] == 100 and found["llm_gmac_mean"] == pytest.approx(gmac / 100)
    static = 20 * 2 * short.language(12) + 80 * 2 * long.language(12)
    assert found["llm_gmac_static"] == pytest.approx(static / 100), "24 layers cost twice what 12 do"
    assert found["saved"] == pytest.approx(static / gmac)
    assert found["exit_shares"] == pytest.approx([0.16, 0, 0.04, 0, 0, 0.8])
    assert "average length 2.00 of 5" in report_text(found) and "lift_red_block" in report_text(found)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60))
def test_the_interval_holds_the_mean_and_narrows_with_more_chains_of_the_same_kind(lengths):
    low, high = mean_interval(lengths)
    mean = np.mean(lengths)
    assert 0 <= low <= mean + 1e-9 and mean - 1e-9 <= high <= 5
    assert (low, high) == mean_interval(lengths[::-1]), "whatever the order"
    normal = 1.96 * np.std(lengths * 25) / np.sqrt(len(lengths) * 25)
    narrow = mean_interval(lengths * 25)
    assert narrow[1] - narrow[0] <= high - low + 1e-9
    assert np.subtract(*narrow[::-1]) == pytest.approx(2 * normal, rel=0.15, abs=0.03)


def test_a_resume_file_of_other_arguments_says_which(tmp_path):
    path = tmp_path / "x.jsonl"
    ResumeFile(path, {"seed": 1, "budget": {"exit": 3}}).add("a", [1])
    assert ResumeFile(path, {"seed": 1, "budget": {"exit": 3}}).done == {"a": [1]}
    with pytest.raises(
        UserError, match=r"other arguments \(budget: \{'exit': 3\} there, \{'exit': 5\} now\)"
    ):
        ResumeFile(path, {"seed": 1, "budget": {"exit": 5}})


def test_a_resume_file_with_an_argument_more_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1, "x": null}\n')
    with pytest.raises(UserError, match=r"other arguments \(x: None there, nothing now\)"):
        ResumeFile(path, {"a": 1})


def test_two_runs_at_a_time_do_not_share_a_resume_file(tmp_path):
    path = tmp_path / "x.jsonl"
    first = ResumeFile(path, {"a": 1})
    first.add("one", 1)
    with pytest.raises(UserError, match="belongs to a run that goes on now: wait for its end"):
        ResumeFile(path, {"a": 1})
    first.add("two", 2)
    first.remove()
    second = ResumeFile(path, {"a": 1})
    assert second.done == {} and path.is_file()
    second.add("groups of many chains", ["x" * 2**20] * 3)
    del first, second
    left = ResumeFile(path, {"a": 1}).done
    assert list(left) == ["groups of many chains"], "a run that ends leaves it to the next"


def test_a_file_that_is_no_resume_file_is_not_replaced(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("precious")
    with pytest.raises(UserError, match="line 1 is damaged"):
        ResumeFile(path, {"a": 1})
    assert path.read_text() == "precious"
    path.write_text('{"a"')  # as a run leaves it that was killed at once
    assert ResumeFile(path, {"a": 1}).done == {}


# Sentences and tasks of the user's choice.


def test_other_peoples_sentences_are_scored_each_in_the_same_states(tmp_path, monkeypatch, capsys):
    plain, rich = tmp_path / "plain.json", tmp_path / "rich.json"
    plain.write_text(json.dumps({"open_drawer": ["open the drawer", "open it"], "turn_on_led": ["light on"]}))
    rich.write_text(json.dumps({"open_drawer": ["grab the handle and pull the drawer out"]}))
    path, run, ran = tmp_path / "report.json", TableScenes.run, []
    monkeypatch.setattr(
        TableScenes, "run", lambda own, chains, *rest: ran.append(chains) or run(own, chains, *rest)
    )
    command = ["evaluate", "--wordings", str(plain), "--wordings", str(rich), "--tasks", "open_drawer"]
    assert main([*command, "--trials", "2", "--steps", "2", "--jobs", "1", "--json", str(path)]) == 0
    figures, told = json.loads(path.read_text()), capsys.readouterr().out
    assert figures["chains"] == 0 and figures["tasks_asked_for"] == ["open_drawer"]
    said = [(each["wording"], each["sentence"], each["trials"]) for each in figures["sentences"]]
    texts = ("open the drawer", "open it", "grab the handle and pull the drawer out")
    assert said == [("plain", texts[0], 2), ("plain", texts[1], 2), ("rich", texts[2], 2)]
    assert {name: each["trials"] for name, each in figures["wordings"].items()} == {"plain": 4, "rich": 2}
    for each in (*figures["sentences"], *figures["wordings"].values()):
        assert each["rate_ci"][0] <= each["rate"] <= each["rate_ci"][1] and each["layers"] >= 2
    assert all(text in told for text in texts) and "wording rich: " in told
    starts = [[chain.start for chain in chains] for chains in ran]
    assert starts[0] == starts[1] == starts[2] and starts[0][0] != starts[0][1]


def test_chains_are_given_in_the_sentences_of_a_file(tmp_path):
    words = {"move_slider_left": ["left, please"], "move_slider_right": ["right, please"]}
    (tmp_path / "own.json").write_text(json.dumps(words))
    asked = TableBenchmark(tasks=tuple(words), sentences=read_sentences([tmp_path / "own.json"], words))
    (chain,) = asked.open(1, TABLETOP).chains(Group(None, (0,)))
    assert set(chain.wordings) == {"own"} and set(chain.tasks) == set(words)
    assert [words[task] for task in chain.tasks] == [[text] for text in chain.instructions]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON"),
        ("[]", "[] gives no sentences by their task: give a JSON file such as"),
        ('{"open_door": ["x"]}', "there is no task 'open_door': the tasks are "),
        ('{"open_drawer": "open it"}', "open_drawer has 'open it' in place of a list of sentences"),
        ('{"open_drawer": [" "]}', "open_drawer has ' ': give a sentence of one line"),
        ('{"open_drawer": ["a\\nb"]}', "give a sentence of one line with at most 300 characters"),
        ('{"open_drawer": ["%s"]}' % ("x" * 301), "at most 300 characters"),
        ('{"open_drawer": ["x", "x"]}', "open_drawer has 'x' twice: delete one"),
        ('{"open_drawer": ["x"]}', "--wordings has no sentence for turn_on_led of --tasks: add one"),
    ],
)
def test_a_file_of_sentences_that_cannot_be_used_is_refused_in_one_line(content, says, tmp_path, capsys):
    path = tmp_path / "own.json"
    path.write_text(content)
    assert main(["evaluate", "--wordings", str(path), "--tasks", "turn_on_led"]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and len(error) < 700


@settings(max_examples=50)
@given(st.integers(1, 400), st.data())
def test_the_interval_of_a_rate_holds_it_and_narrows_with_more_trials(trials, data):
    successes = data.draw(st.integers(0, trials))
    low, high = rate_interval(successes, trials)
    assert 0 <= low <= successes / trials + 1e-9 and successes / trials - 1e-9 <= high <= 1
    narrow = rate_interval(4 * successes, 4 * trials)
    assert narrow[1] - narrow[0] < high - low
