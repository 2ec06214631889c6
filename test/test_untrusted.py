"""Tests of reading JSON that other people made."""

import pytest

from deer_vla_ros.errors import UserError
from deer_vla_ros.untrusted import parse_json, read_json


@pytest.mark.parametrize(
    "text",
    ['{"open_drawer": [1], "open_drawer": [2]}', '[{"a": {"b": 1, "open_drawer": 1, "open_drawer": 1}}]'],
)
def test_an_object_with_the_same_key_twice_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match="^the key 'open_drawer' stands twice$"):
        parse_json(text)
    path = tmp_path / "words.json"
    path.write_text(text)
    with pytest.raises(UserError, match="words.json: .*'open_drawer' stands twice.*: give another file$"):
        read_json(path, "give another file")


def test_the_same_key_in_two_objects_is_accepted():
    assert parse_json('[{"a": 1}, {"a": {"a": 2}}]') == [{"a": 1}, {"a": {"a": 2}}]


def test_a_long_key_that_stands_twice_is_told_in_a_short_line():
    key = "x" * 10000
    with pytest.raises(ValueError) as caught:
        parse_json(f'{{"{key}": 1, "{key}": 2}}')
    assert len(str(caught.value)) < 200
