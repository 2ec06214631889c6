"""The sentences in which CALVIN's tasks are given: its own, and published files of other wordings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deer_vla_ros.errors import UserError, shown
from deer_vla_ros.lab.calvin.calvin_sequences import CHAIN_LENGTH, TASK_RULES, CalvinSequence
from deer_vla_ros.lab.scoring.sentences import Sentence, checked, sentences_of
from deer_vla_ros.untrusted import read_json, read_yaml

VALIDATION = Path("calvin_models/conf/annotations/new_playtable_validation.yaml")
"""CALVIN's own sentences, one per task, in its folder."""
WORDING = "enriched"
"""The name of the sentences of a file of other wordings."""


def published(root: Path) -> dict[str, str]:
    """CALVIN's own sentence for each of its tasks. root: a clone of mees/calvin. Raises UserError."""
    path = root / VALIDATION
    remedy = "clone CALVIN again: git clone --recurse-submodules https://github.com/mees/calvin"
    if not path.is_file():
        raise UserError(f"{path} does not exist: {remedy}")
    found = read_yaml(path, "CALVIN's own")
    if not isinstance(found, dict):
        raise UserError(f"{path} holds {shown(found)}: {remedy}")
    for task in TASK_RULES:
        if not isinstance(found.get(task), list) or not found[task]:
            raise UserError(f"{path}: {task} has {shown(found.get(task))}, no list of sentences: {remedy}")
    return {task: _first_line(found[task][0], f"{path}: {task}") for task in TASK_RULES}


def enriched(
    path: Path, sequences: Sequence[CalvinSequence], seed: int = 0
) -> tuple[tuple[Sentence, ...], ...]:
    """The five sentences of each chain, from a JSON file of other wordings.

    It is a list of five sentences for each chain (such as `lang_annotation_cache.json` of RoboFlamingo and
    DeeR-VLA, for all chains of their `eval_sequences.json` in its order), or {task: [sentence, ...]} (such as
    their `enrich_lang_annotations.json`), of which `words_of_chains` takes sentences by the seed. As in their
    evaluation, a sentence ends at its first line break. A typographic apostrophe becomes a plain one, which
    their code means to do, but does not. Raises UserError.
    """
    remedy = "give a list of five sentences for each chain, or {task: [sentence, ...]}"
    found = read_json(path, remedy)
    if isinstance(found, dict):
        return words_of_chains(
            tuple(sentences_of(found, TASK_RULES, WORDING, path, _first_line)), sequences, seed
        )
    if not isinstance(found, list):
        raise UserError(f"{path} holds {shown(found)}: {remedy}")
    if len(found) != len(sequences):
        raise UserError(
            f"{path} has sentences for {len(found)} chains, and there are {len(sequences)}: give the file "
            "that belongs to the chains of --sequences"
        )
    for at, texts in enumerate(found):
        if not isinstance(texts, list) or len(texts) != CHAIN_LENGTH:
            raise UserError(f"{path}, chain {at}, is {shown(texts)}: give {CHAIN_LENGTH} sentences")
    return tuple(
        tuple(
            Sentence(task, _first_line(text, f"{path}, chain {at}"), WORDING)
            for task, text in zip(sequence.tasks, texts)
        )
        for at, (sequence, texts) in enumerate(zip(sequences, found))
    )


def words_of_chains(
    sentences: Sequence[Sentence], sequences: Sequence[CalvinSequence], seed: int = 0
) -> tuple[tuple[Sentence, ...], ...]:
    """One of the sentences of its task for each task of each chain, drawn by the seed and the place in the
    chains. Raises UserError if a task has none."""
    of_task: dict[str, list[Sentence]] = {}
    for each in sentences:
        of_task.setdefault(each.task, []).append(each)
    for task in dict.fromkeys(task for sequence in sequences for task in sequence.tasks):
        if task not in of_task:
            raise UserError(
                f"no sentence is given for {task}, which the chains contain: add one, or give --chains 0, or "
                "--tasks without it"
            )

    def one(number: int, position: int, task: str) -> Sentence:
        choices = of_task[task]
        return choices[np.random.default_rng([seed, number, position]).integers(len(choices))]

    return tuple(
        tuple(one(number, position, task) for position, task in enumerate(sequence.tasks))
        for number, sequence in enumerate(sequences)
    )


def _first_line(text: object, where: str) -> str:
    """The first line of a sentence, with plain apostrophes. Raises UserError if it is no sentence."""
    if isinstance(text, str):
        text = text.split("\n")[0].replace("\u2019", "'")
    return checked(text, where)
