"""How does a command write what `--json` asks for?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deer_vla_ros.errors import UserError


def write_json(path: Path, report: Any) -> None:
    """Writes `report`, and the folders that lead to it, in one piece; raises UserError where that cannot be."""
    write_text(path, json.dumps(report, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Interrupted, an older file stays as it was. Devices and pipes (/dev/stdout) are written to, not replaced."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            path.write_text(text)
            return
        scratch = path.with_name(f".{path.name}.new")
        scratch.write_text(text)
        scratch.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}): give another place") from error
