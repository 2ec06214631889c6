"""Quality of service as recordings keep it: YAML text, or the tree of it."""

from __future__ import annotations

from typing import Any

from rosbags.interfaces import Qos
from rosbags.rosbag2.metadata import parse_qos

LONGEST = 65_536


def parsed_qos(found: Any) -> list[Qos]:
    """The profiles; empty if they cannot be read, because reading messages does not need them.

    found: a text, or a list of dictionaries. A text with aliases or of more than LONGEST characters is none:
    no recorder writes it, and a small one may stand for gigabytes.
    """
    if isinstance(found, str) and (len(found) > LONGEST or "&" in found or "*" in found):
        return []
    try:
        profiles = parse_qos(found)
        numbers = (
            (each.depth, *each.deadline, *each.lifespan, *each.liveliness_lease_duration) for each in profiles
        )
        return profiles if all(isinstance(number, int) for row in numbers for number in row) else []
    except Exception:  # for arbitrary text, a parser may raise anything
        return []
