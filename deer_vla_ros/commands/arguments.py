"""Arguments that several commands share: positive numbers, phrasings, clusters, how a recording is read."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import deer_vla_ros
from deer_vla_ros.errors import UserError

TABLE_GUARD = Path(deer_vla_ros.__file__).parent / "lab" / "sim" / "assets" / "guard.yaml"
"""Parameter file: the policy node's limits on the simulated table. It is found without importing MuJoCo."""
PHRASINGS = ("training", "held-out", "both")
"""The wordings of the instructions; both: half of each."""
DTYPES = ("float32", "bfloat16", "float16", "int8", "int4")
"""Number types of the weights, as the parameter `model.dtype` names them."""


def positive(text: str) -> float:
    """The text as a finite number above 0. Raises ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"'{text}' is no finite number above 0")
    return value


def add_cluster_argument(parser: argparse._ActionsContainer) -> None:
    """Adds the argument that names the machines on which the jobs run."""
    parser.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="run on the workers of this Dask scheduler, such as tcp://host:8786, or of a scheduler file "
        "(default: on this machine)",
    )


def add_recording_arguments(parser: argparse.ArgumentParser, of: str = "") -> None:
    """Adds the arguments that say how a recording is read. of: prefix of each help text."""
    parser.add_argument(
        "--params", type=Path, metavar="FILE", help=f"{of}the node's parameter file (default: its defaults)"
    )
    parser.add_argument(
        "--node",
        default="",
        metavar="NAME",
        help=f"{of}full name of the policy node, such as /left/deer_vla: its parameters and topics count "
        "(default: deer_vla in the namespace of the topics)",
    )
    parser.add_argument(
        "--topic",
        action="append",
        default=[],
        metavar="NAME:=TOPIC",
        help=f"{of}what the node's topic is called there; repeat",
    )
    parser.add_argument("--instruction", metavar="TEXT", help=f"{of}in place of the recorded ones")
    parser.add_argument(
        "--clock",
        choices=("receive", "header"),
        default="receive",
        help=f"{of}bag time: when messages were received, or the newest stamp among them "
        "(default: %(default)s)",
    )


def topics_of(args: argparse.Namespace) -> dict[str, str]:
    """Recorded topics by the node's names, from the --topic arguments. Raises UserError."""
    found = {}
    for text in args.topic:
        name, mark, topic = text.partition(":=")
        if not (mark and name and topic):
            raise UserError(
                f"--topic is {text!r}: give NAME:=TOPIC, such as camera/static/image_raw:=/cam0/image_raw"
            )
        found[name.strip("/")] = topic
    return found
