"""Reading of `tokenizer.json`: only the parts that the tokenizers of released and own networks have.

The library `tokenizers` runs regular expressions that such a file holds, some of which never end, and it
panics at some values. Therefore the file is compared with the list below before the library sees it. A type,
name or value that is not listed is refused: among them `Split` and `Replace` by a regular expression, and the
models WordPiece and Unigram.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from deer_vla_ros.errors import UserError, cause, shown
from deer_vla_ros.untrusted import parse_json, read_bytes

MOST_BYTES = 20 * 2**20
"""The largest file. Those of GPT-NeoX and the LLaMA family have 2 to 17 MB."""
MOST_OBJECTS, MOST_LISTS = 2**16, 2**20
"""The most braces and brackets that a file opens, text included: each can take 200 bytes of memory."""
MOST_TOKENS = 2**20
MOST_LETTERS = 4096
"""The longest token. The longest of GPT-NeoX has 512 letters."""
MOST_PARTS = 4
"""The most parts of a normalizer, pre-tokenizer or decoder."""

Check = Callable[[Any], bool]


def read_tokenizer_file(path: Path, remedy: str) -> Tokenizer:
    """The tokenizer of a file. Raises UserError, with the remedy, if it cannot be read or has other parts."""
    content = read_bytes(path, MOST_BYTES, remedy)
    try:
        if content.count(b"{") > MOST_OBJECTS or content.count(b"[") > MOST_LISTS:
            raise ValueError(f"it has over {MOST_OBJECTS} objects or {MOST_LISTS} lists")
        values = parse_json(content, MOST_BYTES)
        _check(values)
        return Tokenizer.from_str(
            json.dumps(values)
        )  # it sees what was checked, also where names are doubled
    except Exception as error:  # `tokenizers` raises bare Exception
        raise UserError(f"{path}: no tokenizer ({cause(error)}): {remedy}") from error


def _check(values: Any) -> None:
    """Raises ValueError unless all parts of the file are listed, and each token has an id of its own."""
    _fields("the file", values, _FILE)
    model = values["model"]
    _fields("model", model, {"type": lambda kind: kind in _MODELS, **_MODELS.get(model.get("type"), {})})
    vocabulary = model["vocab"]
    tokens = {token["content"]: token["id"] for token in values["added_tokens"]}
    if any(vocabulary.get(token, number) != number for token, number in tokens.items()):
        raise ValueError("an added token has another id in the vocabulary")
    tokens = {**vocabulary, **tokens}
    if not all(0 <= number < MOST_TOKENS for number in tokens.values()):
        raise ValueError(f"a token has an id that is not from 0 to {MOST_TOKENS - 1}")
    if len(set(tokens.values())) < len(tokens):
        raise ValueError("two tokens have the same id")
    for merge in model.get("merges", ()):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if len(parts) != 2 or not all(part in vocabulary for part in (*parts, "".join(parts))):
            raise ValueError(f"the merge {shown(merge)} is not of two tokens to a third")
    unknown = model.get("unk_token")
    if unknown is not None and unknown not in vocabulary:
        raise ValueError(f"the token for unknown words, {shown(unknown)}, is not in the vocabulary")


def _fields(where: str, values: Any, fields: Mapping[str, Check]) -> None:
    """Raises ValueError unless `values` is an object of these fields only, and every value passes its check.
    A field that is missing is None."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {shown(values)}")
    for name in values.keys() - fields.keys():
        raise ValueError(f"{where} has {shown(name)}, which is not read")
    for name, check in fields.items():
        if not check(values.get(name)):
            raise ValueError(f"{where} has the {name} {shown(values.get(name))}, which is not read")


def _flag(value: Any) -> bool:
    return type(value) is bool


def _number(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST_TOKENS


def _word(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MOST_LETTERS


def _letter(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 1


def _one_of(*values: Any) -> Check:
    return lambda value: value in values


def _maybe(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check, most: int = MOST_PARTS) -> Check:
    return lambda values: isinstance(values, list) and len(values) <= most and all(map(check, values))


def _object(**fields: Check) -> Check:
    """Checks for an object of exactly these fields."""

    def check(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and not value.keys() - fields.keys()
            and all(of_field(value.get(name)) for name, of_field in fields.items())
        )

    return check


def _typed(kinds: Mapping[str, Mapping[str, Check]]) -> Check:
    """Checks for an object whose `type` is one of `kinds`, with the fields of that type, or for a `Sequence`
    of such objects, or for nothing."""

    def check(value: Any) -> bool:
        if not isinstance(value, dict) or not isinstance(value.get("type"), str):
            return False
        return value["type"] in kinds and _object(type=_word, **kinds[value["type"]])(value)

    def check_all(value: Any) -> bool:
        if value is None or check(value):
            return True
        if not isinstance(value, dict) or value.get("type") != "Sequence" or len(value) != 2:
            return False
        return any(_list_of(check)(value.get(name)) for name in ("normalizers", "pretokenizers", "decoders"))

    return check_all


_REPLACE = {"pattern": _object(String=_word), "content": _letter}
"""It puts one letter in place of a text, so that no text grows."""
_BYTES = {"add_prefix_space": _flag, "trim_offsets": _flag, "use_regex": _maybe(_flag)}
_META = {
    "replacement": _letter,
    "prepend_scheme": _maybe(_one_of("always", "first", "never")),
    "split": _maybe(_flag),
    "add_prefix_space": _maybe(_flag),
    "str_rep": _maybe(_letter),
}
_NORMALIZER = {
    **{name: {} for name in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase")},
    "Prepend": {"prepend": _letter},
    "Replace": _REPLACE,
}
_PRE_TOKENIZER = {"ByteLevel": _BYTES, "Whitespace": {}, "WhitespaceSplit": {}, "Metaspace": _META}
_DECODER = {
    "ByteLevel": _BYTES,
    "Metaspace": _META,
    "Replace": _REPLACE,
    "ByteFallback": {},
    "Fuse": {},
    "Strip": {"content": _letter, "start": _number, "stop": _number},
}
_PIECES = _list_of(
    lambda piece: (
        _object(Sequence=_object(id=_one_of("A", "B"), type_id=_number))(piece)
        or _object(SpecialToken=_object(id=_word, type_id=_number))(piece)
    )
)
"""What an instruction becomes in TemplateProcessing. It is never used: the prompt has its special tokens."""


def _special_tokens(value: Any) -> bool:
    of_token = _object(id=_word, ids=_list_of(_number), tokens=_list_of(_word))
    return isinstance(value, dict) and len(value) <= 8 and all(map(of_token, value.values()))


_POST_PROCESSOR = {
    "ByteLevel": _BYTES,
    "TemplateProcessing": {"single": _PIECES, "pair": _PIECES, "special_tokens": _special_tokens},
}
_ADDED = _object(
    id=_number,
    content=_word,
    **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), _flag),
)


def _vocabulary(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and 0 < len(value) <= MOST_TOKENS
        and all(type(number) is int and len(token) <= MOST_LETTERS for token, number in value.items())
    )


def _merge(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(part, str) for part in value)
    )


_FILE: Mapping[str, Check] = {
    "version": _one_of("1.0"),
    # InstructionTokenizer sets these two itself.
    "truncation": _maybe(
        _object(
            direction=_one_of("Left", "Right"),
            max_length=_number,
            strategy=_one_of("LongestFirst", "OnlyFirst", "OnlySecond"),
            stride=_one_of(0),
        )
    ),
    "padding": _maybe(
        _object(
            strategy=lambda value: value == "BatchLongest" or _object(Fixed=_number)(value),
            direction=_one_of("Left", "Right"),
            pad_to_multiple_of=_maybe(_number),
            pad_id=_number,
            pad_type_id=_number,
            pad_token=_word,
        )
    ),
    "added_tokens": _list_of(_ADDED, 2**12),
    "normalizer": _typed(_NORMALIZER),
    "pre_tokenizer": _typed(_PRE_TOKENIZER),
    "post_processor": _typed(_POST_PROCESSOR),
    "decoder": _typed(_DECODER),
    "model": lambda value: isinstance(value, dict),
}
_MODELS: Mapping[str, Mapping[str, Check]] = {
    "BPE": {
        "dropout": _one_of(None),
        "unk_token": _maybe(_word),
        "continuing_subword_prefix": _one_of(None, ""),
        "end_of_word_suffix": _one_of(None, ""),
        "fuse_unk": _maybe(_flag),
        "byte_fallback": _maybe(_flag),
        "ignore_merges": _maybe(_flag),
        "vocab": _vocabulary,
        "merges": _list_of(_merge, MOST_TOKENS),
    },
    "WordLevel": {"vocab": _vocabulary, "unk_token": _word},
}
