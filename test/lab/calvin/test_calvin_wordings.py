"""Tests of the sentences in which CALVIN's tasks are given."""

import json
import os
from pathlib import Path

import pytest

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.calvin.calvin_sequences import TASK_RULES, generate
from deer_vla_ros.lab.calvin.calvin_wordings import VALIDATION, enriched, published, words_of_chains
from deer_vla_ros.lab.scoring.sentences import Sentence

SEQUENCES = generate(4)


def clone(folder: Path, sentences: dict) -> Path:
    """A folder with CALVIN's file of sentences only."""
    path = folder / VALIDATION
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(sentences))  # JSON is YAML
    return folder


def by_task(*texts: str) -> dict:
    return {task: [f"{text} {task}" for text in texts] for task in TASK_RULES}


def written(folder: Path, content) -> Path:
    path = folder / "words.json"
    path.write_text(json.dumps(content))
    return path


def test_a_clones_first_sentences_are_taken(tmp_path):
    found = published(clone(tmp_path, by_task("please", "now")))
    assert list(found) == list(TASK_RULES)
    assert found["open_drawer"] == "please open_drawer"


@pytest.mark.skipif("DEER_VLA_CALVIN_ROOT" not in os.environ, reason="no clone of CALVIN is named")
def test_the_sentences_of_a_real_clone():
    found = published(Path(os.environ["DEER_VLA_CALVIN_ROOT"]))
    assert len(set(found.values())) == 34
    assert found["open_drawer"] == "pull the handle to open the drawer"


@pytest.mark.parametrize(
    "sentences, said",
    [
        ([], "holds []"),
        ({**by_task("do"), "open_drawer": []}, "open_drawer has [], no list of sentences"),
        ({task: ["do"] for task in list(TASK_RULES)[1:]}, "rotate_red_block_right has None"),
        ({**by_task("do"), "open_drawer": [7]}, "open_drawer has 7"),
    ],
)
def test_a_clone_without_sentences_is_refused(tmp_path, sentences, said):
    with pytest.raises(UserError) as raised:
        published(clone(tmp_path, sentences))
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_folder_that_is_no_clone_is_refused(tmp_path):
    with pytest.raises(UserError, match="git clone --recurse-submodules"):
        published(tmp_path)


def test_sentences_by_chain_stay_in_their_places(tmp_path):
    texts = [[f"chain {at} place {place}" for place in range(5)] for at in range(4)]
    found = enriched(written(tmp_path, texts), SEQUENCES)
    assert found[2][3] == Sentence(SEQUENCES[2].tasks[3], "chain 2 place 3", "enriched")
    assert [[each.text for each in five] for five in found] == texts


def test_sentences_by_task_are_drawn_by_seed_and_place(tmp_path):
    path = written(tmp_path, by_task(*map(str, range(40))))
    found = enriched(path, SEQUENCES, seed=3)
    assert found == enriched(path, SEQUENCES, seed=3)
    assert found != enriched(path, SEQUENCES, seed=4)
    assert found[:2] == enriched(path, SEQUENCES[:2], seed=3), "further chains do not change the first"
    assert len({each.text.split()[0] for five in found for each in five}) > 5
    for sequence, five in zip(SEQUENCES, found):
        assert tuple(each.text.split()[1] for each in five) == tuple(each.task for each in five)
        assert tuple(each.task for each in five) == sequence.tasks


def test_a_sentence_ends_at_its_first_line_break(tmp_path):
    texts = [["Turn it. \n\nSpin it", "don\u2019t stop", " a ", "b", "c"]] * 4
    found = enriched(written(tmp_path, texts), SEQUENCES)
    assert [each.text for each in found[0][:3]] == ["Turn it.", "don't stop", "a"]


@pytest.mark.parametrize(
    "content, said",
    [
        ("do", "holds 'do'"),
        ([["a"] * 5] * 3, "has sentences for 3 chains, and there are 4"),
        ([["a"] * 5] * 3 + [["a"] * 4], "chain 3, is ['a', 'a', 'a', 'a']: give 5 sentences"),
        ([["a"] * 5] * 3 + [["a"] * 4 + [None]], "chain 3 has None"),
        ([["a"] * 5] * 3 + [["a"] * 4 + ["\nb"]], "chain 3 has ''"),
        ([["a"] * 5] * 3 + [["a"] * 4 + ["\ud800"]], "chain 3 has '\\ud800'"),
        ({"juggle": ["juggle"]}, "there is no task 'juggle'"),
        ({"open_drawer": "open"}, "open_drawer has 'open' in place of a list of sentences"),
        ({"open_drawer": ["open", 7]}, "open_drawer has 7"),
        ({"open_drawer": ["open"]}, "which the chains contain"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_in_one_line(tmp_path, content, said):
    with pytest.raises(UserError) as raised:
        enriched(written(tmp_path, content), SEQUENCES)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_task_with_one_sentence_always_gets_it():
    own = [Sentence(task, f"do {task}", "published") for task in TASK_RULES]
    for five in words_of_chains(own, SEQUENCES):
        assert all(each.text == f"do {each.task}" for each in five)
