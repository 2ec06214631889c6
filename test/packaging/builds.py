"""Helpers of the build tests: a copy of the sources, a clean environment, a program that uses messages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from paths import ROOT

NOT_SOURCES = shutil.ignore_patterns(
    ".git", ".venv", "build", "install", "log", "out", "__pycache__", "*.egg-info"
)

# The program publishes, because only that makes the middleware load its type support; an import does not.
USE_MESSAGES = """
import pathlib, rclpy, deer_vla_ros
from deer_vla_ros.msg import BudgetStatus, PolicyStep
from deer_vla_ros.errors import UserError
rclpy.init()
node = rclpy.create_node('probe')
node.create_publisher(PolicyStep, 'step', 1).publish(PolicyStep())
node.create_publisher(BudgetStatus, 'budget', 1).publish(BudgetStatus())
rclpy.shutdown()
print(pathlib.Path(deer_vla_ros.__file__).parent)
"""


def copy_sources(folder: Path) -> Path:
    """Copies the sources alone, as a clone has them, so that no test writes to the checkout."""
    # Only the folder `build` at the top is not a source.
    copy = folder / "deer_vla_ros"
    shutil.copytree(
        ROOT,
        copy,
        symlinks=True,
        ignore=lambda path, names: NOT_SOURCES(path, names) if Path(path) == ROOT else {"__pycache__"},
    )
    return copy


def clean_environment() -> dict[str, str]:
    """Environment variables with ROS on the paths, and without this checkout."""
    environment = dict(os.environ)
    for name in ("PYTHONPATH", "AMENT_PREFIX_PATH", "LD_LIBRARY_PATH", "CMAKE_PREFIX_PATH"):
        kept = [
            part
            for part in environment.pop(name, "").split(os.pathsep)
            if part and (not part.startswith(str(ROOT)) or part.startswith(sys.prefix))
        ]
        if kept:
            environment[name] = os.pathsep.join(kept)
    environment["MAKEFLAGS"] = "-j2"
    return environment


def run(*command, cwd: Path, env: dict[str, str]) -> str:
    """Runs a command to its end and returns its output. If it fails, the test fails and shows the output."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, f"{command} in {cwd} exited with {done.returncode}:\n{done.stdout[-6000:]}"
    return done.stdout


def run_sourced(setup: Path, *command, cwd: Path, env: dict[str, str]) -> str:
    """Runs a command as `run` does, in a shell that sourced an installation's setup.bash."""
    return run("bash", "-c", '. "$0" && exec "$@"', setup, *command, cwd=cwd, env=env)
