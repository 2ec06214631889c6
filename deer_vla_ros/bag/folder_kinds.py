"""What a folder is that a person gave in place of another kind of data, and what to do with it."""

from __future__ import annotations

from pathlib import Path

LEROBOT = Path("meta", "info.json")
"""The file that every LeRobot data set has."""
LEROBOT_REMEDY = (
    "this is a LeRobot data set: run `python -m deer_vla_ros convert-lerobot {} --static KEY --gripper KEY "
    "--state KEY --gripper-range CLOSED OPEN --out DIR`, which makes training data of it in DIR/training"
)
RECORDING = "metadata.yaml"
"""The file that every finished recording of rosbag2 has."""


def what_to_do_with(folder: Path) -> str:
    """The remedy for a folder that is a LeRobot data set or a recording, or is missing; empty for others."""
    if not folder.is_dir():
        return "there is no such folder"
    if (folder / LEROBOT).is_file():
        return LEROBOT_REMEDY.format(folder)
    if (folder / RECORDING).is_file():
        return (
            f"this is a recording: run `python -m deer_vla_ros convert-bag {folder} --out DIR` first, and "
            "give DIR/training"
        )
    return ""
