"""The small network of test/model serves here too; demonstrations that all trainings of these tests share."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "model"))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data folder with `demos` in it."""
    from runs import write_demonstrations

    folder = tmp_path_factory.mktemp("data")
    write_demonstrations(folder / "demos")
    return folder
