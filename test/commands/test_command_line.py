"""Tests of `python -m deer_vla_ros`: the choice of the command, ROS arguments, and errors in one line."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from deer_vla_ros import __main__ as command_line
from deer_vla_ros.errors import UserError


@pytest.fixture
def probe(monkeypatch):
    """A command `probe` that keeps its arguments and calls `probe.action`."""
    module = SimpleNamespace(__doc__="Example: probe --number 3", seen=None, action=lambda: 0)

    def run(args):
        module.seen = args
        return module.action()

    module.add_arguments = lambda parser: parser.add_argument("--number", type=int)
    module.run = run
    monkeypatch.setitem(sys.modules, "probe_command", module)
    monkeypatch.setitem(
        command_line.COMMANDS, "probe", command_line.CommandEntry("probe_command", "a probe", True)
    )
    return module


def test_arguments_are_parted_from_those_of_ros(probe):
    assert command_line.main(["probe", "--ros-args", "-r", "__ns:=/a", "--", "--number", "3"]) == 0
    assert probe.seen.number == 3
    assert probe.seen.ros_args == ["--ros-args", "-r", "__ns:=/a", "--"]


def test_a_users_error_is_one_line_and_status_1(probe, capsys):
    def fail():
        raise UserError("rate 0 Hz is below 1 Hz: give --rate 1 or more")

    probe.action = fail
    assert command_line.main(["probe"]) == 1
    assert capsys.readouterr().err == "error: rate 0 Hz is below 1 Hz: give --rate 1 or more\n"


def test_a_defect_keeps_its_traceback(probe):
    probe.action = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        command_line.main(["probe"])


@pytest.mark.parametrize(
    "arguments", [[], ["no-such-command"], ["probe", "--number", "x"], ["parity", "--ros-args"]]
)
def test_bad_arguments_exit_with_status_2(probe, arguments):
    with pytest.raises(SystemExit) as left:
        command_line.main(arguments)
    assert left.value.code == 2


PRINTING = """
import sys, types
from deer_vla_ros import __main__ as command_line
sys.modules["probe_command"] = types.SimpleNamespace(
    add_arguments=lambda parser: None, run=lambda args: print("x") or 0
)
command_line.COMMANDS["probe"] = command_line.CommandEntry("probe_command", "a probe", True)
sys.exit(command_line.main(["probe"]))
"""
"""A program that runs a command which prints."""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("is_pipe", [True, False])
def test_an_output_that_cannot_be_written_is_at_most_one_line(is_pipe, unbuffered):
    """A pipe whose reader has gone ends the command without a word, a full disk with one."""
    if is_pipe:
        reader, output = os.pipe()
        os.close(reader)
    else:
        output = os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run(
        [sys.executable, "-c", PRINTING],
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(output)
    full = "error: standard output cannot be written (No space left on device): make room\n"
    assert (done.returncode, done.stderr) == (1, "" if is_pipe else full)


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_every_command_explains_itself_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as left:
        command_line.main([command, "--help"])
    assert left.value.code == 0
    assert (
        f"python -m deer_vla_ros {command}" in capsys.readouterr().out.split("options:")[0].split("\n", 1)[1]
    )


@pytest.mark.parametrize(
    "arguments, absent", [(["--help"], ["torch", "rclpy", "numpy"]), (["sim", "--help"], ["torch"])]
)
def test_help_imports_nothing_heavy(arguments, absent):
    code = (
        "import sys\nfrom deer_vla_ros.__main__ import main\n"
        f"try: main({arguments})\nexcept SystemExit: pass\n"
        f"sys.exit([name for name in {absent} if name in sys.modules] or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
