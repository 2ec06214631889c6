"""The command line: `python -m deer_vla_ros COMMAND`, installed as `deer-vla COMMAND`.

`deer_vla_ros.commands` describes what a command is. A command is imported only when it is called, so the
simulated table starts without torch, and `--help` answers at once.
Exit status: 0 (success), 1 (failure), 2 (wrong arguments).
"""

import argparse
import importlib
import os
import sys
from types import ModuleType

import deer_vla_ros
from deer_vla_ros.commands import COMMANDS, PROGRAM, CommandEntry
from deer_vla_ros.errors import UserError

PIP_MODULES = (
    "av",
    "distributed",
    "matplotlib",
    "mcap",
    "mujoco",
    "optuna",
    "pyarrow",
    "rich",
    "rosbags",
    "tensorboardX",
)
"""Packages from PyPI that only some commands need."""
ROS_MODULES = ("rclpy", "deer_vla_ros", "std_msgs", "sensor_msgs", "geometry_msgs")


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit status. argv: without the program's name; None: sys.argv."""
    own, ros_args = split_ros_args(sys.argv[1:] if argv is None else argv)
    name = _program_parser().parse_args(own[:1]).command
    command = COMMANDS[name]
    try:
        module = importlib.import_module(command.module)
        try:
            return _run(name, command, module, own[1:], ros_args)
        finally:
            print(end="", flush=True)  # what standard output refuses is told here, not after the end
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in PIP_MODULES:
            print(f"error: {error}: pip install {missing}", file=sys.stderr)
        elif missing in ROS_MODULES:
            print(
                f"error: {error}: source your ROS workspace, or run `make build` and `. scripts/env.sh`",
                file=sys.stderr,
            )
        else:
            raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    except Exception as error:
        from deer_vla_ros.files import refusal

        lost = _lost_output(error)
        told = f"standard output cannot be written ({lost.strerror}): make room" if lost else refusal(error)
        if told is None:
            raise
        if not isinstance(lost, BrokenPipeError):  # otherwise the reader, such as `head`, has seen enough
            print(f"error: {told}", file=sys.stderr)
    return 1


def _lost_output(error: Exception) -> OSError | None:
    """Why standard output cannot be written, if that is behind an error, or None. What is printed after that
    is lost without another error."""
    if isinstance(error, OSError) and error.filename is None:
        try:
            print(flush=True)  # an empty line: a text of no letters would not reach the device
        except OSError as refused:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return refused
    return None


def _run(name: str, command: CommandEntry, module: ModuleType, own: list[str], ros_args: list[str]) -> int:
    """Parses the command's own arguments and runs it."""
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    args = parser.parse_args(own)
    if ros_args and not command.takes_ros_args:
        parser.error(f"{name} takes no --ros-args; only {', '.join(_ros_commands())} do")
    args.ros_args = ros_args
    return module.run(args)


def split_ros_args(argv: list[str]) -> tuple[list[str], list[str]]:
    """Separates our arguments from those of ROS, and returns both lists in this order.

    The arguments of ROS are between `--ros-args` and `--` or the end. There may be several such parts.
    """
    own: list[str] = []
    ros_args: list[str] = []
    in_ros_args = False
    for argument in argv:
        in_ros_args = in_ros_args or argument == "--ros-args"
        (ros_args if in_ros_args else own).append(argument)
        in_ros_args = in_ros_args and argument != "--"
    return own, ros_args


def _ros_commands() -> list[str]:
    return [name for name, command in COMMANDS.items() if command.takes_ros_args]


def _program_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="A multi-exit vision-language-action policy for ROS 2.",
        epilog=f"commands:\n{table}\n\n`{PROGRAM} COMMAND --help` explains one, with an example.",
    )
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of the commands below")
    parser.add_argument("--version", action="version", version=deer_vla_ros.__version__)
    return parser


if __name__ == "__main__":
    sys.exit(main())
