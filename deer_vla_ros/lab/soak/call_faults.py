"""The faults that come through the instruction, the services and the parameters."""

from __future__ import annotations

from typing import Any

from deer_vla_ros.lab.soak.arena import INSTRUCTION, Arena
from deer_vla_ros.lab.soak.fault import HOLD_WITHIN_S, Clearing, Door, Fault, nothing

LONG_TEXT = 2_000_000
"""The number of characters of a far too long instruction."""
LOOSE = {
    "guard.max_translation_m": 1.0,
    "guard.max_rotation_rad": 3.0,
    "guard.leash_m": 1.0,
    "guard.leash_rad": 3.0,
}
TIGHT = {
    "guard.max_translation_m": 0.06,
    "guard.max_rotation_rad": 0.3,
    "guard.leash_m": 0.15,
    "guard.leash_rad": 0.6,
}
"""The node's defaults."""
WRONG_TRANSITIONS = [77, 3, 1, 2, 0, 255, 3, 1]
"""Ids of lifecycle transitions that are not possible while the node is active."""
CYCLES = [4, 3, 4, 3, 4, 3]
"""Ids of lifecycle transitions: deactivate and activate, three times."""
FULL_CYCLE = [4, 2, 1, 3]
"""Ids of lifecycle transitions: deactivate, clean up, configure, activate."""


def _call(arena: Arena, do: str, **arguments: Any) -> dict[str, Any]:
    return arena.caller.ask(do=do, **{"with": arguments})


def _flood(do: str, **arguments: Any):
    """A fault of many calls without a pause. The node must answer every one of them."""

    def begin(arena: Arena) -> int:
        answer = _call(arena, do, **arguments)
        sent, answered = answer["sent"], answer.get("answered", answer["sent"])
        arena.promise(sent == answered, f"{do}: {sent - answered} of {sent} calls were not answered")
        return answer["begin"]

    return begin


def _instruct(*texts: str, repeat: int = 1):
    def act(arena: Arena) -> int:
        return [_call(arena, "instruct", text=text, repeat=repeat) for text in texts][0]["at"]

    return act


def _garbage(arena: Arena) -> int:
    binary = "".join(chr(code) for code in range(1, 256)) + "\u202e\U0001f916\ufffd"
    begin_ns = _call(arena, "instruct", text=binary)["begin"]
    _call(arena, "instruct", text="no ", repeat=LONG_TEXT // 3)
    return begin_ns


def _loosen(arena: Arena) -> int:
    """Tries to set wider limits of the guard while the arm moves, which the node must refuse."""
    answer = _call(arena, "set_parameters", values=LOOSE)
    arena.promise(bool(answer["answered"]), "set_parameters: no answer")
    arena.promise(not answer["accepted"], "the guard's limits were loosened while the arm moved")
    return answer["begin"]


def _tighten(arena: Arena) -> int:
    answer = _call(arena, "set_parameters", values=TIGHT)
    arena.promise(
        answer["accepted"], f"the guard's limits could not be set to their defaults: {answer['reason']}"
    )
    return answer["at"]


def _transitions(ids: list[int], expected: bool):
    def begin(arena: Arena) -> int:
        answer = _call(arena, "transitions", ids=ids)
        right = all(made is expected for made in answer["made"])
        arena.promise(right, f"lifecycle transitions {ids}: made {answer['made']}, all were to be {expected}")
        return answer["begin"]

    return begin


def _fault(name: str, about: str, seconds: float, begin, end=nothing, **options: Any) -> Fault:
    return Fault(name, about, Door.CALLS, seconds, begin, end, **options)


_BACK = _instruct(INSTRUCTION)

FAULTS = (
    _fault(
        "instruction_flood",
        "200 new instructions per second for 2 s",
        0.0,
        _flood("instruction_flood", rate_hz=200.0, seconds=2.0),
        _BACK,
    ),
    _fault("instruction_garbage", "a binary text, and one of 2 MB", 1.0, _garbage, _BACK),
    _fault(
        "instruction_empty", "an empty instruction", 1.6, _instruct(""), _BACK, holds_after_s=HOLD_WITHIN_S
    ),
    _fault("parameter_flood", "1000 parameter sets of 4 clients", 0.0, _flood("parameter_flood", count=1000)),
    _fault(
        "guard_loosened",
        "the guard's limits are set to 1 m and 3 rad while the arm moves",
        1.0,
        _loosen,
        _tighten,
        clearing=Clearing.EITHER,
        alone=True,
    ),
    _fault(
        "hold_flood", "200 calls of ~/hold", 0.0, _flood("hold_flood", count=200), clearing=Clearing.EITHER
    ),
    _fault(
        "hold_both",
        "~/hold with true and with false at the same time, 10 times",
        0.0,
        _flood("hold_both", count=10),
        clearing=Clearing.EITHER,
    ),
    _fault("reset_flood", "200 calls of ~/reset", 0.0, _flood("reset_flood", count=200)),
    _fault(
        "transitions_wrong",
        "lifecycle transitions that are not possible, one of them unknown",
        0.0,
        _transitions(WRONG_TRANSITIONS, False),
    ),
    _fault(
        "transitions_cycle",
        "deactivated and activated 3 times",
        0.0,
        _transitions(CYCLES, True),
        is_silent=True,
        clearing=Clearing.EITHER,
    ),
    _fault(
        "transitions_full_cycle",
        "deactivated, cleaned up, configured and activated",
        0.0,
        _transitions(FULL_CYCLE, True),
        is_silent=True,
        clearing=Clearing.EITHER,
    ),
)
