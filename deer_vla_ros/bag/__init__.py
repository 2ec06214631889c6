"""What would it have done on this recording? rosbag2 in, decisions out; no network in here.

For tests of your own: `from deer_vla_ros.bag import assert_replays, decisions`.
"""

from __future__ import annotations

from typing import Any

__all__ = ["assert_replays", "decisions"]


def __getattr__(name: str) -> Any:
    """Those two bring torch along, which who only writes a recording does without."""
    if name in __all__:
        from deer_vla_ros.bag import golden

        return getattr(golden, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
