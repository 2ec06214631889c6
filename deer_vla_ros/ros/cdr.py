"""How does a message lie in a recording? As the bytes that DDS would send."""

from __future__ import annotations

from typing import Any

from rclpy.serialization import serialize_message


def to_cdr(message: Any) -> bytes:
    """A ROS message as CDR bytes."""
    return serialize_message(message)
