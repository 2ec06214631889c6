"""Tests that the generated files are up to date."""

import pytest

from deer_vla_ros.commands.reference_pages import ROOT, render


@pytest.mark.parametrize(("path", "text"), render().items(), ids=lambda value: getattr(value, "name", ""))
def test_a_generated_file_is_what_the_declarations_say(path, text):
    assert (ROOT / path).read_text() == text, "run `python -m deer_vla_ros.commands.reference_pages`"
