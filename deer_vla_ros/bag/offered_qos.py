"""Quality of service as recordings keep it: YAML text, or the tree of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rosbags.interfaces import Qos
from rosbags.rosbag2.metadata import parse_qos

from deer_vla_ros.untrusted import parse_yaml

LONGEST = 16_384
"""Characters of a topic's profiles. A recorder writes less than 1000 for each publisher."""


def parsed_qos(found: Any) -> list[Qos]:
    """The profiles; empty if they cannot be read, because reading messages does not need them.

    found: a text, or a list of dictionaries. A text with aliases or of more than LONGEST characters is none:
    no recorder writes it, and a small one may stand for gigabytes.
    """
    if isinstance(found, str) and (len(found) > LONGEST or "&" in found or "*" in found):
        return []
    try:
        tree = parse_yaml(found, Path("offered_qos_profiles"), "") if isinstance(found, str) else found
        profiles = parse_qos(tree)
        numbers = (
            (each.depth, *each.deadline, *each.lifespan, *each.liveliness_lease_duration) for each in profiles
        )
        return profiles if all(isinstance(number, int) for row in numbers for number in row) else []
    except Exception:  # for arbitrary text, a parser may raise anything
        return []
