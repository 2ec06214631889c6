"""The order of the faults: random by a seed, one at a time, and sometimes two at once."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.soak import call_faults, process_faults, robot_faults
from deer_vla_ros.lab.soak.fault import Clearing, Door, Fault

FAULTS = {fault.name: fault for fault in (*robot_faults.FAULTS, *call_faults.FAULTS, *process_faults.FAULTS)}
"""All faults, by name."""
PAIR_EVERY = 4
"""After this many single faults, two come at once."""


def chosen(names: str, with_table: bool) -> list[Fault]:
    """The faults that `--faults` selects: "all", or names separated by commas. Raises UserError for other
    values.

    with_table: the simulated table takes the place of the fake robot, whose faults are not possible then.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if wanted == ["all"]:
        return [fault for fault in FAULTS.values() if not (with_table and fault.is_robots)]
    if unknown := [name for name in wanted if name not in FAULTS]:
        raise UserError(
            f"soak: no fault is called {', '.join(unknown)}: use all, or some of {', '.join(FAULTS)}"
        )
    if not wanted:
        raise UserError(f"soak: --faults names none: use all, or some of {', '.join(FAULTS)}")
    if robots := [name for name in wanted if with_table and FAULTS[name].is_robots]:
        raise UserError(f"soak: {', '.join(robots)} are faults of the fake robot: leave out --robot table")
    return [FAULTS[name] for name in dict.fromkeys(wanted)]


def in_real_time(faults: Sequence[Fault], seed: int) -> Iterator[tuple[Fault, ...]]:
    """Yields without end one or two faults, none of them of the clock; yields nothing if there is no such
    fault.

    Faults that end the node's process come in the first round only, if there are others: memory is measured
    on a node that runs for a long time.
    """
    faults = [fault for fault in faults if fault.door is not Door.CLOCK]
    lasting = [fault for fault in faults if not fault.restarts] or faults
    dice = random.Random(seed)
    turn = faults
    while faults:
        singles = dice.sample(turn, len(turn))
        for index, fault in enumerate(singles, 1):
            yield (fault,)
            if index % PAIR_EVERY == 0 and (pair := _pair(faults, dice)):
                yield pair
        turn = lasting


def in_simulated_time(faults: Sequence[Fault], seed: int) -> Iterator[tuple[Fault, ...]]:
    """Yields without end the faults of the clock, one at a time; yields nothing if there is no such fault."""
    faults = [fault for fault in faults if fault.door is Door.CLOCK]
    dice = random.Random(seed)
    while faults:
        for fault in dice.sample(faults, len(faults)):
            yield (fault,)


def _pair(faults: Sequence[Fault], dice: random.Random) -> tuple[Fault, ...]:
    """Two faults of different doors; empty if there are none."""
    pairs = [
        (one, other)
        for one in faults
        for other in faults
        if one.name < other.name
        and one.pairs
        and other.pairs
        and one.door is not other.door
        and _apart(one, other)
    ]
    return dice.choice(pairs) if pairs else ()


def _apart(one: Fault, other: Fault) -> bool:
    """Whether neither fault cancels the other, as a call does that ends the other one's hold."""
    return not any(
        first.door is Door.CALLS and (second.clearing is Clearing.ASKED or second.name == "pose_first_zero")
        for first, second in ((one, other), (other, one))
    )
