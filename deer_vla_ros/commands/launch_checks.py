"""The checks that launch files make before they start anything: parameter file, recording, output folder.

A launch file calls `check`, which runs this module in another process with the Python of the nodes. The
Python of `ros2 launch` does not always have scipy and rosbags, which the checks need.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from deer_vla_ros.errors import UserError

INTERRUPTED = (0, 2, -2, 130)
"""Exit statuses of a command line tool that was ended with Ctrl-C in an orderly way."""


def check(**given: str) -> None:
    """Raises UserError with one line if one of the given values is wrong.

    params, node: a parameter file and the full name of its node. bag: recording to play. out: folder to be
    made.
    """
    options = [f"--{name}={value}" for name, value in given.items()]
    python = shutil.which("python3") or sys.executable
    command = [python, "-m", "deer_vla_ros.commands.launch_checks", *options]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        if reason := done.stdout.strip():
            raise UserError(reason)
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(f"the checks before the start failed ({lines[-1]}): run `{' '.join(command)}`")


def check_parameters(path: Path, node: str) -> None:
    """Raises UserError if the file is wrong, or has no parameters for the node of this full name."""
    from deer_vla_ros.ros.parameters import from_file

    if not path.is_file():
        what = "not a file" if path.exists() else "no such file"
        raise UserError(f"params_file {path}: {what}: give a file such as config/deer_vla.yaml")
    from_file(path, node)


def check_recording(path: Path) -> None:
    """Raises UserError if the recording cannot be opened or is empty."""
    try:
        from deer_vla_ros.bag.recording import Recording
    except ModuleNotFoundError as error:
        raise UserError(f"bag {path} cannot be checked ({error}): pip install {error.name}") from error
    with Recording(path):
        pass


def check_out(path: Path) -> None:
    """Raises UserError if the recorder cannot make this folder."""
    parent = path.absolute().parent
    if os.path.lexists(path):
        raise UserError(f"out {path}: it exists already: give a new folder")
    if not parent.is_dir():
        raise UserError(f"out {path}: there is no folder {parent}: make it, or give another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"out {path}: the folder {parent} is not writable: give another place")


def early_end(process: str, status: int, is_shutdown: bool) -> str:
    """The text of the error when a process has ended; empty during an orderly shutdown."""
    return "" if is_shutdown else f"{process} ended by itself (exit status {status}): see its output above"


def recorder_end(process: str, status: int, is_shutdown: bool, out: str) -> str:
    """As `early_end`, for a recorder: at an orderly shutdown it has to leave a complete recording in
    `out`."""
    if not is_shutdown:
        return early_end(process, status, is_shutdown)
    complete = status in INTERRUPTED and Path(out, "metadata.yaml").is_file()
    what = f"{process} left no complete recording in {out} (exit status {status})"
    return "" if complete else f"{what}: see its output above, then `ros2 bag reindex {out}`"


def main() -> int:
    """Checks the values on the command line. Returns 1 after a line on stdout that says what is wrong."""
    parser = argparse.ArgumentParser()
    for name in ("params", "node", "bag", "out"):
        parser.add_argument(f"--{name}")
    given = parser.parse_args()
    try:
        # The fast checks come first.
        if given.out is not None:
            check_out(Path(given.out))
        if given.bag is not None:
            check_recording(Path(given.bag))
        if given.params is not None:
            check_parameters(Path(given.params), given.node)
    except UserError as error:
        print(" ".join(str(error).split()))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
