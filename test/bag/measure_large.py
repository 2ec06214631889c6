"""Measures the memory of replays of a long and a short recording. It is not a test; run it by hand:

    python test/bag/measure_large.py --gb 10

It writes recordings of 0.01 GB and of --gb (640 x 480 noise from two cameras at 10 Hz) and replays each in a
process of its own. It prints their peak memory and the ratio, and then the time of a replay of the last 2 s
of
the long recording.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from geometry_msgs.msg import PoseStamped
from sensor_msgs.msg import Image
from std_msgs.msg import String

from deer_vla_ros.bag.bag_file import BagFile
from deer_vla_ros.bag.cdr import to_cdr, type_of
from deer_vla_ros.ros.messages import SECOND, image_message, stamp

BEGINS_NS = 1_800_000_000 * SECOND


def generate(folder: Path, gigabytes: float) -> None:
    bag, random, written, now = BagFile(folder), np.random.default_rng(0), 0, BEGINS_NS
    for topic, kind in (
        ("/camera/static/image_raw", Image),
        ("/camera/gripper/image_raw", Image),
        ("/ee_pose", PoseStamped),
        ("/instruction", String),
    ):
        bag.declare(topic, type_of(kind))
    bag.write("/instruction", to_cdr(String(data="lift the red block")), now)
    pose = PoseStamped()
    pose.header.frame_id = "base"
    pose.pose.position.x, pose.pose.position.z = 0.4, 0.2
    pose.pose.orientation.x, pose.pose.orientation.w = 1.0, 0.0
    while written < gigabytes * 1e9:
        pose.header.stamp = stamp(now)
        bag.write("/ee_pose", to_cdr(pose), now)
        for topic in ("/camera/gripper/image_raw", "/camera/static/image_raw"):
            data = to_cdr(image_message(random.integers(0, 256, (480, 640, 3), np.uint8), "camera", now))
            bag.write(topic, data, now)
            written += len(data)
        now += SECOND // 10
    bag.close()


def replayed(folder: Path, *arguments: str) -> tuple[float, float]:
    """Runs a replay. Returns its peak memory [MB] and its time [s]."""
    command = [
        sys.executable,
        "-m",
        "deer_vla_ros",
        "replay",
        str(folder),
        "--out",
        str(folder.parent / "out"),
        *arguments,
    ]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the replay failed: {' '.join(command)}")
    return usage.ru_maxrss / 1e3, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=10.0)
    parser.add_argument(
        "--folder", type=Path, help="where there is room for twice that (default: a temporary one)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        peaks = []
        for name, gigabytes in (("short", 0.01), ("long", args.gb)):
            generate(Path(scratch) / name, gigabytes)
            peak, seconds = replayed(Path(scratch) / name)
            peaks.append(peak)
            print(f"{gigabytes:g} GB: {peak:.0f} MB at its peak, {seconds:.0f} s", flush=True)
        print(f"ratio {peaks[1] / peaks[0]:.2f}")
        end = args.gb * 1e9 / 1_843_400 / 10 - 2
        peak, seconds = replayed(Path(scratch) / "long", "--start", f"{end:.1f}", "--no-inputs")
        print(f"its last 2 s alone: {peak:.0f} MB, {seconds:.1f} s")


if __name__ == "__main__":
    main()
