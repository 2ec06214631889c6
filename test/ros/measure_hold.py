"""Measures the time until a hold reaches the arm after the node is stopped, killed or hangs.

It also measures the time until a signal ends the node. It is not a test; run it by hand:

    . scripts/env.sh; PYTHONPATH=$PYTHONPATH:test:test/ros python test/ros/measure_hold.py --trials 5
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import time

os.environ["ROS_DOMAIN_ID"] = str(random.SystemRandom().randrange(1, 100))
os.environ.setdefault("FASTDDS_BUILTIN_TRANSPORTS", "UDPv4")

from geometry_msgs.msg import TwistStamped  # noqa: E402
from harness import START_TIMEOUT, Client, spawn, spawn_python, wait_until  # noqa: E402
from rig import Rig, moves  # noqa: E402
from test_safety import HANGS  # noqa: E402

START = "import sys\nfrom deer_vla_ros.__main__ import main\nsys.exit(main(['node', *sys.argv[1:]]))"


class Heard:
    """The arrival time of each twist, and whether it moves the arm."""

    def __init__(self, client: Client, namespace: str):
        self.twists: list[tuple[float, bool]] = []
        client.node.create_subscription(TwistStamped, f"{namespace}target_twist", self._on_twist, 100)

    def _on_twist(self, message: TwistStamped) -> None:
        self.twists.append((time.monotonic(), moves(message)))

    def first_hold_after(self, moment: float) -> float:
        """The seconds from `moment` to the first hold that is not followed by a motion within a second."""
        held = wait_until(
            lambda: [at for at, moving in self.twists if at > moment and not moving], 20.0, "a hold"
        )
        return held[0] - moment


def trial(client: Client, index: int, fault: str) -> float:
    """Causes a fault. Returns the seconds from it to the hold."""
    namespace = f"{fault}{index}/"
    rig, heard = Rig(client, namespace), Heard(client, namespace)
    arguments = ("--ros-args", "-r", f"__ns:=/{namespace.rstrip('/')}")
    started = (
        spawn_python("-c", f"{HANGS}\n{START}", *arguments) if fault == "lock" else spawn("node", *arguments)
    )
    with started as process, rig.running():
        client.await_active(process, f"{namespace}deer_vla")
        rig.instruct("open the drawer")
        wait_until(lambda: sum(moving for _, moving in heard.twists) >= 8, START_TIMEOUT, "motions")
        if fault == "lock":  # The tenth inference hangs: the last motion comes from the ninth.
            wait_until(lambda: len(rig.steps) >= 9, START_TIMEOUT, "nine steps")
            moment = heard.twists[-1][0]
        else:
            moment = time.monotonic()
            process.send(signal.SIGSTOP if fault == "stop" else signal.SIGKILL)
        seconds = heard.first_hold_after(moment)
        process.send(signal.SIGCONT)
        return seconds


def end(client: Client, index: int, busy: int) -> float:
    """The seconds from SIGINT to the process's end with status 0. busy: the number of busy loops."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    namespace = f"end{busy}_{index}/"
    try:
        with spawn("node", "--ros-args", "-r", f"__ns:=/{namespace.rstrip('/')}") as process:
            client.await_active(process, f"{namespace}deer_vla")
            begin = time.monotonic()
            assert process.stop(signal.SIGINT) == 0, process.output()
            return time.monotonic() - begin
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=5)
    trials = parser.parse_args().trials
    with Client("measure_hold") as client:
        for fault in ("stop", "kill", "lock"):
            found = [trial(client, index, fault) for index in range(trials)]
            print(
                f"{fault:5} to hold: median {statistics.median(found):.3f} s, longest {max(found):.3f} s",
                flush=True,
            )
        for busy in (0, 4):
            found = [end(client, index, busy) for index in range(trials)]
            median, longest = statistics.median(found), max(found)
            print(
                f"SIGINT to the end beside {busy} busy loops: median {median:.2f} s, longest {longest:.2f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
