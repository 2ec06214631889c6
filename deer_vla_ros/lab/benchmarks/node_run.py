"""The run of the latency benchmark: first the relay alone, then beside a policy node with each thread
setting.

Each of these is measured on an idle and on a loaded machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from ament_index_python.packages import get_package_share_directory

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.benchmarks import node_figures as benchmark_figures
from deer_vla_ros.lab.benchmarks.node_figures import LatencyRow
from deer_vla_ros.processes import ChildProcess, kept

CPU_THREADS = (1, 0)
"""Values of model.cpu_threads: the default, whose idle row is the node's result, and 0, with which torch
chooses."""
RATE_HZ = 30.0
START_TIMEOUT_S = 120.0
SETTLE_S = 2.0
"""Time from the first step, or from the start of the load, to the first sample."""
TRAIL_S = 0.5
"""Time after the last sample's stamp, in which its command arrives."""
NAMESPACE, FRAME = "deer_vla_benchmark", "base"
PROFILES = "FASTRTPS_DEFAULT_PROFILES_FILE"
"""The environment variable in which Fast DDS 2, Jazzy's default middleware, finds the file of its
settings."""
COLUMNS = ("relay alone", "relay", "command", "compute", "overhead")
HEAD = (
    " " * 17
    + "".join(f"{column:>16}" for column in (*COLUMNS, "ratio"))
    + "   frames sent, heard; steps /s, layers"
)


def measure(seconds: float, out: Path, checkpoint: str = "", noise: bool = False) -> list[LatencyRow]:
    """Measures all conditions, `seconds` each, and prints a line after each one. Raises UserError if a
    process fails.

    out: the folder for logs. checkpoint: the node's folder; empty: the embedded one. noise: see
    `node_parts.camera`. There is no progress bar: it would use the cores whose latency is measured.
    """
    os.environ.setdefault(PROFILES, str(_config("fastdds_large_images.xml")))
    cores = len(os.sched_getaffinity(0))
    conditions = {"idle": 0, "loaded": cores}
    windows = len(conditions) * (1 + len(CPU_THREADS))
    print(
        f"{windows} x {seconds:g} s on {cores} cores, first the relay alone; ms at p50 / p99",
        HEAD,
        sep="\n",
        flush=True,
    )
    log = out / "listener.log"
    parts = [_part("camera", out / "camera.log", *(["--noise"] if noise else []))]
    parts += [_part(name, out / f"{name}.log") for name in ("relay", "listener")]
    rows = []
    with kept(*parts):
        _await(log, "relay", parts)
        alone = {name: _window(seconds, parts, spinning, out) for name, spinning in conditions.items()}
        for threads in CPU_THREADS:
            node = _node(threads, out, checkpoint)
            with kept(node):
                _await(log, "step", [node, *parts])
                for name, spinning in conditions.items():
                    window = _window(seconds, [node, *parts], spinning, out)
                    rows.append(
                        benchmark_figures.row(benchmark_figures.read(log), name, threads, window, alone[name])
                    )
                    print(_line(rows[-1]), flush=True)
    return rows


def _config(name: str) -> Path:
    """The path of a file in `config/`, in the sources if they are there, else in the installed package."""
    live = Path(__file__).parents[3] / "config" / name
    return live if live.exists() else Path(get_package_share_directory("deer_vla_ros")) / "config" / name


def _window(seconds: float, processes: list[ChildProcess], spinning: int, out: Path) -> tuple[int, int]:
    """Lets everything run for one condition. Returns the begin and end of the stamps that count [ns].

    spinning: the number of load processes, each of which keeps one core busy.
    """
    load = [_part("load", out / f"load{i}.log") for i in range(spinning)]
    with kept(*load):
        _pause(SETTLE_S, [*processes, *load])
        begin_ns = time.time_ns()
        _pause(seconds, [*processes, *load])
        end_ns = time.time_ns()
        _pause(TRAIL_S, [*processes, *load])
    return begin_ns, end_ns


def _node(threads: int, out: Path, checkpoint: str) -> ChildProcess:
    settings = {
        "model.path": checkpoint,
        "control.rate_hz": RATE_HZ,
        "control.rehearsal": True,
        "model.cpu_threads": threads,
        "action.frame": FRAME,
    }
    parameters = [
        word for name, value in settings.items() if value != "" for word in ("-p", f"{name}:={value}")
    ]
    return ChildProcess(
        "policy node", ["node", "--ros-args", "-r", f"__ns:=/{NAMESPACE}", *parameters], out / "node.log"
    )


def _part(name: str, log: Path, *words: str) -> ChildProcess:
    return ChildProcess(name, ["benchmark", name, *words], log)


def _await(log: Path, what: str, processes: Iterable[ChildProcess]) -> None:
    """Waits until the listener has received a message `what` (a field of Heard) for a frame stamped after
    now.

    Raises UserError if none comes within START_TIMEOUT_S.
    """
    now_ns, deadline = time.time_ns(), time.monotonic() + START_TIMEOUT_S
    while max(getattr(benchmark_figures.read(log), what), default=0) < now_ns:
        if time.monotonic() > deadline:
            raise UserError(f"no {what} was heard within {START_TIMEOUT_S:g} s: see the logs in {log.parent}")
        _pause(0.2, processes)


def _pause(seconds: float, processes: Iterable[ChildProcess]) -> None:
    """Sleeps, and checks once a second that all processes are alive. Raises UserError if one has ended."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 1.0))
        for process in processes:
            process.check()


def _line(row: LatencyRow) -> str:
    def pair(values: dict[str, float]) -> str:
        return f"{values['p50']:.2f} / {values['p99']:.2f}"

    cells = [pair(getattr(row, f"{column.replace(' ', '_')}_ms")) for column in COLUMNS]
    cells.append(pair({"p50": row.p50_ratio, "p99": row.p99_ratio}))
    rates = (
        f"{row.camera_rate_hz:.1f}, {row.camera_rate_heard_hz:.1f}; "
        f"{row.step_rate_hz:.1f}, {row.layers:.1f} ({row.samples} samples)"
    )
    return (
        f"{row.condition:<7}threads {row.cpu_threads:<2}"
        + "".join(f"{cell:>16}" for cell in cells)
        + f"   {rates}"
    )
