"""The run of a soak: one attack after another until the time is over."""

from __future__ import annotations

import contextlib
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.soak import schedule
from deer_vla_ros.lab.soak.arena import Arena, opened
from deer_vla_ros.lab.soak.fault import Door, Fault
from deer_vla_ros.lab.soak.heard import Limits
from deer_vla_ros.lab.soak.logs import unhandled
from deer_vla_ros.lab.soak.sampling import Sampler
from deer_vla_ros.lab.soak.soak_report import SoakFindings
from deer_vla_ros.lab.soak.strike import StrikeOutcome, strike

CLOCK_SHARE, CLOCK_LEAST_S, CLOCK_MOST_S = 0.2, 25.0, 120.0
"""The share of a soak, at its end, that runs in simulated time for the faults of the clock; its least and
most time."""
GAP_S = (0.5, 1.5)
"""The time of undisturbed motion between two attacks, from and to."""
SUMMARY_S = 10.0
OURS = "DEER_VLA_SOAK"
"""The environment variable that every process of this soak inherits, to find those that still run at the
end."""


def soak(
    seen: SoakFindings,
    faults: Sequence[Fault],
    limits: Limits,
    out: Path,
    table_parameters: Path | None,
    progress: Callable[[float, StrikeOutcome | None], None],
) -> None:
    """Attacks the node for `seen.minutes` and fills `seen`, also if it is interrupted.

    table_parameters: the node's parameter file for the simulated table, which takes the fake robot's place;
    None: the fake robot. progress: called with the seconds so far and the newest outcome. Raises UserError if
    a process does not start.
    """
    os.environ[OURS] = uuid.uuid4().hex
    try:
        with opened(out, limits, table_parameters is not None, table_parameters or Path()) as arena:
            try:
                _attack(arena, seen, faults, progress)
            finally:
                _collect(arena, seen)
    finally:
        seen.exceptions += unhandled([out / "node.log", out / "second.log"])
        seen.left_behind = _left_behind()


def _attack(
    arena: Arena,
    seen: SoakFindings,
    faults: Sequence[Fault],
    progress: Callable[[float, StrikeOutcome | None], None],
) -> None:
    started_s, started_ns = time.monotonic(), time.time_ns()
    total_s = seen.minutes * 60
    dice = random.Random(seen.seed)
    clock_s = _clock_seconds(faults, total_s)
    with Sampler(lambda: _pids(arena)) as sampler:
        seen.samples = sampler.samples
        for section, end_s in (
            (schedule.in_real_time(faults, seen.seed), total_s - clock_s),
            (schedule.in_simulated_time(faults, seen.seed), total_s),
        ):
            if end_s >= total_s and clock_s:
                _begin_simulated_time(arena)
            for attack in _until(section, started_s + end_s):
                outcome = strike(arena, attack, dice.uniform(0.0, 0.5), started_ns)
                seen.outcomes.append(outcome)
                arena.check()
                if outcome.recovered_s is None or not arena.node.is_running():
                    _revive(arena)
                progress(time.monotonic() - started_s, outcome)
                time.sleep(dice.uniform(*GAP_S))


def _until(attacks: Iterator[tuple[Fault, ...]], end_s: float) -> Iterator[tuple[Fault, ...]]:
    for attack in attacks:
        if time.monotonic() > end_s:
            return
        yield attack


def _clock_seconds(faults: Sequence[Fault], total_s: float) -> float:
    """The time at the end for the faults of the clock [s]: all of it if there are no other faults."""
    doors = {fault.door for fault in faults}
    if Door.CLOCK not in doors:
        return 0.0
    if doors == {Door.CLOCK}:
        return total_s
    return min(max(CLOCK_SHARE * total_s, CLOCK_LEAST_S), CLOCK_MOST_S, total_s / 2)


def _begin_simulated_time(arena: Arena) -> None:
    """Starts robot and node again in simulated time. The silence meanwhile is excused."""
    begin_ns = time.time_ns()
    arena.use_simulated_time()
    arena.await_motion("in simulated time")
    arena.observer.say(do="mute", begin=begin_ns, end=time.time_ns())


def _revive(arena: Arena) -> None:
    """Starts a new node after one did not recover, so that the next fault can be judged."""
    begin_ns = time.time_ns()
    arena.revive_node()
    arena.await_motion("after it was started anew")
    arena.observer.say(do="mute", begin=begin_ns, end=time.time_ns())


def _pids(arena: Arena) -> dict[str, int]:
    """The ids of the processes to sample, by name."""
    watchdog = arena.watchdog_pid()
    return {"node": arena.node.pid} | ({"watchdog": watchdog} if watchdog else {})


def _collect(arena: Arena, seen: SoakFindings) -> None:
    """Fills `seen` with the results so far."""
    arena.observer.say(do="sum")
    seen.summary = arena.news.await_summary(SUMMARY_S) or {}
    seen.broken = arena.broken
    seen.exceptions = arena.node_ends


def _left_behind() -> list[str]:
    """Kills all processes of this soak that still run. Returns their command lines."""
    mark, found = f"{OURS}={os.environ[OURS]}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(folder.name)
            if pid != os.getpid() and mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(
                    (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                )
                os.kill(pid, 9)
    return found


def limits_for(table_parameters: Path | None) -> Limits:
    """The node's default limits, with the workspace from `table_parameters` if it is given.

    Raises UserError if the file has no workspace of three numbers a corner.
    """
    if table_parameters is None:
        return Limits()
    from deer_vla_ros.ros.parameters import from_file

    given = from_file(table_parameters)
    box = (tuple(given["guard.workspace_min"]), tuple(given["guard.workspace_max"]))
    if len(box[0]) != 3 or len(box[1]) != 3:
        raise UserError(f"{table_parameters}: the workspace has no three numbers a corner: mend the file")
    return Limits(workspace_min=box[0], workspace_max=box[1])
