"""The sentences in which an evaluation gives its tasks, and files of other people's sentences."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deer_vla_ros.errors import UserError, shown
from deer_vla_ros.lab.checksums import json_sha256
from deer_vla_ros.untrusted import read_json

LONGEST = 300
"""The most characters of a sentence."""
_EXAMPLE = 'give a JSON file such as {"open_drawer": ["open the drawer", "pull the drawer out"]}'


@dataclass(frozen=True)
class Sentence:
    """A sentence in which a task is given. wording: the name of the group of sentences that it belongs to."""

    task: str
    text: str
    wording: str


def read_sentences(paths: Sequence[Path], tasks: Collection[str]) -> tuple[Sentence, ...]:
    """The sentences of JSON files {task: [sentence, ...]}, in order. The wording is the file's name without
    its ending.

    tasks: the names that may occur. Raises UserError if a file cannot be read, names an unknown task, gives a
    sentence twice, is empty, or if two files have the same name.
    """
    found: dict[Sentence, None] = {}
    for path in paths:
        values = read_json(path, _EXAMPLE)
        if any(each.wording == path.stem for each in found):
            raise UserError(f"{path}: two files of wordings are called {path.stem!r}: rename one")
        for sentence in sentences_of(values, tasks, path.stem, path):
            if sentence in found:
                raise UserError(f"{path}: {sentence.task} has {sentence.text!r} twice: delete one")
            found[sentence] = None
    return tuple(found)


def sentences_of(
    values: object,
    tasks: Collection[str],
    wording: str,
    path: Path,
    text_of: Callable[[object, str], str] | None = None,
) -> Iterator[Sentence]:
    """The sentences of a document {task: [sentence, ...]}, in order.

    tasks: the names that may occur. path: the file, for errors. text_of: gives the sentence of a JSON value
    in place of `checked`. Raises UserError.
    """
    if not isinstance(values, dict) or not values:
        raise UserError(f"{path}: {shown(values)} gives no sentences by their task: {_EXAMPLE}")
    for task, texts in values.items():
        if task not in tasks:
            raise UserError(f"{path}: {unknown_task(task, tasks)}")
        if not isinstance(texts, list) or not texts:
            raise UserError(f"{path}: {task} has {shown(texts)} in place of a list of sentences: {_EXAMPLE}")
        for text in texts:
            yield Sentence(task, (text_of or checked)(text, f"{path}: {task}"), wording)


def checked(text: object, where: str) -> str:
    """The sentence without spaces around it. Raises UserError if it is none, or longer than LONGEST."""
    if not isinstance(text, str) or not text.strip() or len(text) > LONGEST or not text.strip().isprintable():
        raise UserError(
            f"{where} has {shown(text)}: give a sentence of one line with at most {LONGEST} characters"
        )
    return text.strip()


def sentences_sha256(sentences: Sequence[Sentence]) -> str | None:
    """The SHA-256 sum of the sentences; None if there are none."""
    if not sentences:
        return None
    values = [[each.task, each.text, each.wording] for each in sentences]
    return json_sha256(values)


def unknown_task(task: str, tasks: Collection[str]) -> str:
    """Says that there is no such task, and which ones there are."""
    return f"there is no task {shown(task)}: the tasks are {', '.join(tasks)}"
