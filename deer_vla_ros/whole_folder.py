"""How does a folder appear whole or not at all? It is made under another name, and renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from deer_vla_ros.errors import UserError


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Where to make it: a path of the same name, not there yet, that takes the place of `path` at the end. After an exception nothing is left.

    What a killed process left of an earlier attempt is removed. UserError where the folder cannot be made.
    """
    own = str(os.getpid())
    for old in path.parent.glob(f".{path.name}.partial-*"):
        number = old.name.rpartition("-")[2]
        if (
            number == own or not Path("/proc", number).exists()
        ):  # of its own number: in a container the next process often has the same
            shutil.rmtree(old, ignore_errors=True)
    scratch = path.parent / f".{path.name}.partial-{own}"
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made ({error.strerror}): give another place") from error
    try:
        yield scratch / path.name
        if path.exists():
            path.rename(scratch / "before")  # removed only once the new one stands in its place
        (scratch / path.name).rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
