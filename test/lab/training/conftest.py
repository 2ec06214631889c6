"""Demonstrations that all trainings of these tests share."""

import pytest


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data folder with `demos` in it."""
    from runs import write_demonstrations

    folder = tmp_path_factory.mktemp("data")
    write_demonstrations(folder / "demos")
    return folder
