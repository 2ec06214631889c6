"""In which order is the node measured? First the relay alone, then beside a node of each thread setting; idle and loaded each."""

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
"""model.cpu_threads: the default, by whose idle row the node is judged, and torch's choice."""
RATE_HZ = 30.0
START_TIMEOUT_S = 120.0
SETTLE_S = 2.0
"""Between the first step, or the start of the load, and the first sample."""
TRAIL_S = 0.5
"""After the last sample's stamp, for its command to arrive."""
NAMESPACE, FRAME = "deer_vla_benchmark", "base"
PROFILES = "FASTRTPS_DEFAULT_PROFILES_FILE"
"""Where Fast DDS 2, Jazzy's default middleware, looks for its settings."""
COLUMNS = ("relay alone", "relay", "command", "compute", "overhead")
HEAD = (
    " " * 17 + "".join(f"{column:>16}" for column in (*COLUMNS, "ratio")) + "   frames sent, heard; steps /s"
)


def measure(seconds: float, out: Path) -> list[LatencyRow]:
    """All conditions, `seconds` each, told line by line as they are done; raises UserError where a process fails.

    Nothing is drawn while a condition is measured: a progress bar would run on the cores whose latency is the question.
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
    parts = [_part(name, out / f"{name}.log") for name in ("camera", "relay", "listener")]
    rows = []
    with kept(*parts):
        _await(log, "relay", parts)
        alone = {name: _window(seconds, parts, spinning, out) for name, spinning in conditions.items()}
        for threads in CPU_THREADS:
            node = _node(threads, out)
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
    """A file of `config/`: beside the live sources, else where it was installed."""
    live = Path(__file__).parents[3] / "config" / name
    return live if live.exists() else Path(get_package_share_directory("deer_vla_ros")) / "config" / name


def _window(seconds: float, processes: list[ChildProcess], spinning: int, out: Path) -> tuple[int, int]:
    """Lets everything run, with `spinning` processes that keep a core busy each; begin and end of the stamps that count [ns]."""
    load = [_part("load", out / f"load{i}.log") for i in range(spinning)]
    with kept(*load):
        _pause(SETTLE_S, [*processes, *load])
        begin_ns = time.time_ns()
        _pause(seconds, [*processes, *load])
        end_ns = time.time_ns()
        _pause(TRAIL_S, [*processes, *load])
    return begin_ns, end_ns


def _node(threads: int, out: Path) -> ChildProcess:
    settings = {
        "control.rate_hz": RATE_HZ,
        "control.rehearsal": True,
        "model.cpu_threads": threads,
        "action.frame": FRAME,
    }
    parameters = [word for name, value in settings.items() for word in ("-p", f"{name}:={value}")]
    return ChildProcess(
        "policy node", ["node", "--ros-args", "-r", f"__ns:=/{NAMESPACE}", *parameters], out / "node.log"
    )


def _part(name: str, log: Path) -> ChildProcess:
    return ChildProcess(name, ["benchmark", name], log)


def _await(log: Path, what: str, processes: Iterable[ChildProcess]) -> None:
    """Until the listener hears one `what` of a frame from now on."""
    now_ns, deadline = time.time_ns(), time.monotonic() + START_TIMEOUT_S
    while max(getattr(benchmark_figures.read(log), what), default=0) < now_ns:
        if time.monotonic() > deadline:
            raise UserError(f"no {what} was heard within {START_TIMEOUT_S:g} s: see the logs in {log.parent}")
        _pause(0.2, processes)


def _pause(seconds: float, processes: Iterable[ChildProcess]) -> None:
    """Sleeps, and looks once a second whether all processes are alive; raises UserError where one is not."""
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
    rates = f"{row.camera_rate_hz:.1f}, {row.camera_rate_heard_hz:.1f}; {row.step_rate_hz:.1f} ({row.samples} samples)"
    return (
        f"{row.condition:<7}threads {row.cpu_threads:<2}"
        + "".join(f"{cell:>16}" for cell in cells)
        + f"   {rates}"
    )
