"""How does a folder appear whole or not at all? It is made under another name, and renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Where to make it: a path of the same name, not there yet, that takes the place of `path` at the end. After an exception nothing is left.

    What a killed process left of an earlier attempt is removed.
    """
    for old in path.parent.glob(f".{path.name}.partial-*"):
        if not Path("/proc", old.name.rpartition("-")[2]).exists():
            shutil.rmtree(old, ignore_errors=True)
    scratch = path.parent / f".{path.name}.partial-{os.getpid()}"
    scratch.mkdir(parents=True)
    try:
        yield scratch / path.name
        if path.exists():
            shutil.rmtree(path)
        (scratch / path.name).rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
