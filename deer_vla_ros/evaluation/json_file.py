"""How does a command write what `--json` asks for?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deer_vla_ros.errors import UserError


def write_json(path: Path, report: Any) -> None:
    """Writes `report`, and the folders that lead to it; raises UserError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}): give --json another place") from error
