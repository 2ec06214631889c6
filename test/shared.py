"""Folders that are made once for all workers of a test run."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path


def made_once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """Returns a folder that `make` has filled. Only the first worker that asks for it calls `make`.

    The tests must not change the folder.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the folder of the run, which all workers share
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = root / f"shared_{name}"
        if not (root / f"{name}.complete").exists():
            folder.mkdir()
            make(folder)
            (root / f"{name}.complete").touch()
    return folder
