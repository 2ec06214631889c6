"""The environment that every test runs in: real messages, and a ROS graph of its own."""

import os
import random
from pathlib import Path

import pytest

# One domain per test process, so that two runs on one machine never hear each other: of ten for each worker of a run. Above 101 the
# ports of a domain reach into the range that Linux hands out to other programs.
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
os.environ["ROS_DOMAIN_ID"] = str(1 + 10 * (_worker % 10) + random.SystemRandom().randrange(10))
os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
# Tests kill processes, and over Fast DDS's shared memory that can leave those that live waiting for good (eProsima/Fast-DDS#5469).
os.environ["FASTDDS_BUILTIN_TRANSPORTS"] = "UDPv4"
# Networks as small as the tests' are slower on two threads than on one, and ten times so where the cores are shared.
os.environ["OMP_NUM_THREADS"] = "1"

try:
    import deer_vla_ros.msg  # noqa: F401
except ImportError as error:
    # Skipping here would let CI test nothing and call it a success.
    pytest.exit(
        f"deer_vla_ros.msg cannot be imported ({error}): run `make test`, or `make build` and `. scripts/env.sh`",
        returncode=1,
    )

_LONGEST = (
    "commands/test_budget_commands.py",
    "ros/test_lifecycle.py",
    "lab/training/test_trainer.py",
    "ros/test_manners.py",
    "bag/test_replay.py",
    "ros/test_gripper_action.py",
    "lab/scoring/test_evaluate.py",
    "lab/demo/test_demo.py",
    "lab/parity/test_parity.py",
    "inference/test_long_episode.py",
)
"""Files that take the most time, as measured: they go first, so that two workers end together."""


def pytest_collection_modifyitems(items):
    order = {str(Path(__file__).parent / name): place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(str(item.path), len(order)))
