"""Measures the memory and the rate of a load: `python test/model/measure_load.py FOLDER [NUMBER TYPE]`.

The file is read from the disk if the caller may empty the page cache (root may), else from the page cache.
Beside the load it prints the rate at which the disk alone delivers the file: the faster one of a read before
the load and of a read after it.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from pathlib import Path

from deer_vla_ros.model.checkpoint import WEIGHTS, load
from deer_vla_ros.model.quantisation import types_of

POLL_S = 0.005
MIB = 2**20


def own_memory() -> int:
    """The anonymous memory of this process [bytes]."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def empty_page_cache() -> bool:
    """Whether the next read of any file comes from the disk."""
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


def read_rate(path: Path) -> float:
    """The megabytes per second of a plain read of the file from the disk in large blocks."""
    empty_page_cache()
    block, begin = bytearray(8 * MIB), time.monotonic()
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass
    return path.stat().st_size / 1e6 / (time.monotonic() - begin)


def measure(folder: Path, number_type: str) -> dict[str, object]:
    """One load on a CPU: peak of anonymous memory over the weights, and MB/s of the weights."""
    before, is_cold = read_rate(folder / WEIGHTS), empty_page_cache()
    begin_memory, is_over, peak = own_memory(), threading.Event(), 0
    marks: list[tuple[float, int]] = []

    def watch() -> None:
        nonlocal peak
        while not is_over.wait(POLL_S):
            peak = max(peak, own_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    dtype, bits = types_of(number_type, "cpu")
    loaded = load(
        folder,
        "cpu",
        dtype,
        on_progress=lambda done, total: marks.append((time.monotonic(), total)),
        bits=bits,
    )
    peak = max(peak, own_memory())
    is_over.set()
    thread.join()
    weights = sum(tensor.nbytes for tensor in loaded.model.state_dict().values())
    (begin, total), (end, _) = marks[0], marks[-1]
    return {
        "dtype": number_type,
        "from_disk": is_cold,
        "weights_mib": weights / MIB,
        "peak_mib": (peak - begin_memory) / MIB,
        "peak_over_weights": (peak - begin_memory) / weights,
        "load_mb_s": total / 1e6 / (end - begin),
        "disk_mb_s": max(before, read_rate(folder / WEIGHTS)),
    }


if __name__ == "__main__":
    kind = sys.argv[2] if len(sys.argv) > 2 else "float32"
    print(json.dumps(measure(Path(sys.argv[1]), kind), indent=2))
