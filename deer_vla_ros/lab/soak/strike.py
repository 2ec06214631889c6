"""One attack: faults begin, last and end, and the time until the arm moves again is measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from deer_vla_ros.lab.soak.arena import START_S, Arena
from deer_vla_ros.lab.soak.fault import Clearing, Fault
from deer_vla_ros.lab.soak.heard import SECOND

PROOF_S = 0.7
"""The time after a fault's end in which the arm must still hold, if only ~/hold may end the hold."""
BY_ITSELF_S = 4.0
"""The most time to wait for motion without a call of ~/hold; after it, the hold is cleared if the fault
allows that."""
CLEARED_S = 6.0
"""The most time to wait for motion after the hold was cleared."""
HOLD_TOLD_S = 0.3
"""The most time from the last allowed motion to the first hold."""


@dataclass(frozen=True)
class StrikeOutcome:
    """The result of one attack.

    at_s: the time since the begin of the soak. recovered_s: the time to the first motion, from the end of the
    faults or, if ~/hold was called, from that call; None if there was no motion. cleared: whether ~/hold was
    called. restarted: whether the node's process was started again. said: the messages of /diagnostics
    meanwhile.
    """

    faults: tuple[str, ...]
    at_s: float
    recovered_s: float | None
    cleared: bool
    restarted: bool
    said: tuple[str, ...]


@dataclass
class _Struck:
    """A fault in progress. lifted_ns: just before its end was requested. end_ns: when it had ended."""

    fault: Fault
    begin_ns: int
    lifted_ns: int = 0
    end_ns: int = 0


def strike(arena: Arena, faults: Sequence[Fault], gap_s: float, started_ns: int) -> StrikeOutcome:
    """Lets the faults begin, `gap_s` apart, last as long as the longest of them, and end. Then waits for
    motion.

    started_ns: the begin of the soak [ns, wall clock].
    """
    struck = []
    for fault in faults:
        if struck:
            time.sleep(gap_s)
        for_now = time.time_ns()
        arena.observer.say(do="fault", name=fault.name, at=for_now)
        struck.append(_Struck(fault, fault.begin(arena)))
    time.sleep(max(fault.seconds for fault in faults))
    for each in struck:
        each.lifted_ns = time.time_ns()
        each.end_ns = each.fault.end(arena)
    end_ns = max(each.end_ns for each in struck)
    moved_ns, cleared_ns = _recover(arena, struck, end_ns)
    for each in struck:
        _judge(arena, each, cleared_ns)
        arena.observer.say(do="over", name=each.fault.name, at=moved_ns or time.time_ns())
        if each.fault.is_silent:
            arena.observer.say(do="mute", begin=each.begin_ns, end=moved_ns or time.time_ns())
    return StrikeOutcome(
        faults=tuple(fault.name for fault in faults),
        at_s=round((struck[0].begin_ns - started_ns) / SECOND, 2),
        recovered_s=None
        if moved_ns is None
        else round((moved_ns - max(end_ns, cleared_ns or 0)) / SECOND, 3),
        cleared=cleared_ns is not None,
        restarted=any(fault.restarts for fault in faults),
        said=tuple(arena.news.messages(struck[0].begin_ns, time.time_ns())),
    )


def _recover(arena: Arena, struck: Sequence[_Struck], end_ns: int) -> tuple[int | None, int | None]:
    """Waits for motion, and clears the hold if the faults need that.

    Returns the times of both [ns]; None for never.
    """
    restarts = any(each.fault.restarts for each in struck)
    ways = {each.fault.clearing for each in struck}
    if ways == {Clearing.ASKED}:
        time.sleep(PROOF_S)
    else:
        patience_s = START_S if restarts else BY_ITSELF_S
        if moved_ns := arena.news.motion_after(end_ns, patience_s):
            return moved_ns, None
        if ways == {Clearing.ITSELF}:
            return None, None
    cleared_ns = time.time_ns()
    answer = arena.caller.ask(do="hold", **{"with": {"value": False}})
    arena.promise(answer["ok"], "~/hold with false was not answered")
    return arena.news.motion_after(cleared_ns, CLEARED_S), cleared_ns


def _judge(arena: Arena, struck: _Struck, cleared_ns: int | None) -> None:
    """Has the observer check that the arm held when it had to, and checks that a hold was published."""
    fault, begin_ns = struck.fault, struck.begin_ns
    if fault.holds_after_s is None:
        return
    end_ns = struck.lifted_ns
    if fault.holds_for_s is not None:
        end_ns = min(end_ns, begin_ns + round(fault.holds_for_s * SECOND))
    if fault.clearing is Clearing.ASKED and cleared_ns is not None:
        end_ns = cleared_ns
    from_ns = begin_ns + round(fault.holds_after_s * SECOND)
    request = {"name": fault.name, "begin": from_ns, "end": end_ns, "by_decisions": fault.by_decisions}
    arena.observer.say(do="held", **request)
    if fault.by_decisions:
        return
    heard_ns = arena.news.hold_after(begin_ns, 0.0)
    told = heard_ns is not None and heard_ns < from_ns + round(HOLD_TOLD_S * SECOND)
    arena.promise(told, f"{fault.name}: no hold was told within {fault.holds_after_s + HOLD_TOLD_S:g} s")
