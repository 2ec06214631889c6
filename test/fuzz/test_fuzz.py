"""Every reader of files is given damaged and malicious ones."""

import subprocess
import sys
from pathlib import Path


def test_no_damaged_file_gives_more_than_one_line():
    """One process imports the readers once; it forks a child for each kind of file."""
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), "all", "--mutants", "200"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
