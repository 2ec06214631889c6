"""How is a YAML file read that a person names?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from deer_vla_ros.errors import UserError


def read_yaml(path: Path, example: str) -> Any:
    """What is in it; UserError where it cannot be read or is no YAML, with a file to compare it with."""
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UserError(f"{path} cannot be read ({reason}): give a file such as {example}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
