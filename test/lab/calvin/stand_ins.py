"""Folders that stand in for an installation of CALVIN: its simulator is stand_in_simulator.py."""

import shlex
import sys
from pathlib import Path

from deer_vla_ros.lab.calvin import calvin_simulator
from deer_vla_ros.lab.calvin.calvin_process import CalvinInstall
from deer_vla_ros.lab.calvin.calvin_sequences import TASK_RULES
from deer_vla_ros.lab.calvin.calvin_wordings import VALIDATION

PROGRAM = Path(__file__).parent / "stand_in_simulator.py"


def script(folder: Path, text: str) -> str:
    """Makes a shell script that stands in for a Python, and returns its path."""
    path = folder / "another python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def stand_in_calvin(folder: Path) -> CalvinInstall:
    """Makes a CALVIN in the folder: `folder/calvin` as its root and `folder/python` as its Python.

    That Python runs stand_in_simulator.py in place of calvin_simulator.py, so that commands and their
    processes use the stand-in by --calvin-root and --calvin-python alone.
    """
    root = folder / "calvin"
    tasks = root / calvin_simulator.TASKS
    tasks.parent.mkdir(parents=True)
    tasks.touch()
    (root / VALIDATION).parent.mkdir(parents=True)
    (root / VALIDATION).write_text("".join(f'{task}: ["please {task}"]\n' for task in TASK_RULES))
    (root / "calvin_env/calvin_env").mkdir(parents=True)
    scenes = root / "calvin_env/conf/scene"
    scenes.mkdir(parents=True)
    for letter in "ABCD":
        (scenes / f"calvin_scene_{letter}.yaml").touch()
    python = folder / "python"
    real, stand_in = shlex.quote(sys.executable), shlex.quote(str(PROGRAM))
    python.write_text(
        f"""#!/bin/sh
case "$2" in */calvin_simulator.py) shift 2; exec {real} -E {stand_in} "$@";; esac
exec {real} "$@"
"""
    )
    python.chmod(0o755)
    return CalvinInstall(root, str(python))
