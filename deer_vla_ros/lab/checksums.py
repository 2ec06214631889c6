"""SHA-256 sums of files and of values, by which runs and machines are compared."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def file_sha256(path: Path) -> str | None:
    """The sum of a file, which is read in blocks; None if there is no such file. Raises OSError."""
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def json_sha256(values: Any) -> str:
    """The sum of values as JSON writes them."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
