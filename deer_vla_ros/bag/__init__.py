"""Replay of rosbag2 recordings: messages in, the policy's decisions out. It uses no DDS.

For tests of your own: `from deer_vla_ros.bag import assert_replays, decisions`.
"""

from __future__ import annotations

from typing import Any

__all__ = ["assert_replays", "decisions"]


def __getattr__(name: str) -> Any:
    """Imports these two when they are used: they need torch, and code that writes a recording does not."""
    if name in __all__:
        from deer_vla_ros.bag import golden

        return getattr(golden, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
