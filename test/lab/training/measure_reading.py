"""Measures how fast demonstrations are read from disk into the arrays of a batch. Record demonstrations
first:

    python -m deer_vla_ros record-demos --demos 300 --seed 9 --format calvin --out out/calvin/training
    python test/lab/training/measure_reading.py out/calvin/training --size 224

Nothing is cached between batches, so every step of CALVIN's format is decoded. TensorBoard shows how long a
training waited for batches (`waited`).
"""

import argparse
import time
from pathlib import Path

import numpy as np

from deer_vla_ros.bag.calvin_files import ANNOTATIONS
from deer_vla_ros.lab.training.calvin import CalvinWindows
from deer_vla_ros.lab.training.dataset import FrameWindows, Windows
from deer_vla_ros.lab.training.frames import Frames

BATCH, WINDOW, BATCHES = 8, 12, 20


def opened(folder: Path, threads: int) -> Windows:
    if (folder / ANNOTATIONS).is_file():
        return CalvinWindows([folder], threads, cache_bytes=1)
    return FrameWindows(Frames([folder]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--size",
        type=int,
        default=64,
        help="pixels of the images that the network takes (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=1, help="that decode (default: %(default)s)")
    args = parser.parse_args()
    windows, random = opened(args.folder, args.threads), np.random.default_rng(0)
    began = time.perf_counter()
    for _ in range(BATCHES):
        windows.batch(random.integers(0, len(windows), BATCH), WINDOW, args.size, random)
    print(f"{BATCHES * BATCH * WINDOW / (time.perf_counter() - began):.0f} steps per second")


if __name__ == "__main__":
    main()
