"""The environment of every test: the generated messages, and a ROS graph of its own."""

import os
import random

import pytest
from hypothesis import settings

# No example of a property test has a deadline, because any may take long on a busy machine. `make test-all`
# runs five times as many examples of those that name no number of their own.
settings.register_profile("usual", deadline=None)
settings.register_profile("thorough", deadline=None, max_examples=500)
settings.load_profile("usual")

# Every test process has a ROS domain of its own, so that runs on one machine do not disturb each other.
# Each worker of a run draws one of ten domains. Linux may give the ports of domains above 101 to others.
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
os.environ["ROS_DOMAIN_ID"] = str(1 + 10 * (_worker % 10) + random.SystemRandom().randrange(10))
os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
# Tests kill processes. With Fast DDS's shared memory, other processes may then wait forever
# (eProsima/Fast-DDS#5469).
os.environ["FASTDDS_BUILTIN_TRANSPORTS"] = "UDPv4"
# The small networks of the tests are slower on two threads than on one, and ten times slower if other
# processes use the cores.
os.environ["OMP_NUM_THREADS"] = "1"

try:
    import deer_vla_ros.msg  # noqa: F401
except ImportError as error:
    # This ends the run. If the tests were skipped instead, CI would test nothing and report success.
    pytest.exit(
        f"deer_vla_ros.msg cannot be imported ({error}): "
        "run `make test`, or `make build` and `. scripts/env.sh`",
        returncode=1,
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test begins first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: "test_fuzz.py" not in item.nodeid)
