"""Changes of parameters in a recording: `/parameter_events` of the policy node, applied at their place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from deer_vla_ros.control.controller import Controller
from deer_vla_ros.errors import UserError
from deer_vla_ros.ros import parameters

VALUES = ("", "bool_value", "integer_value", "double_value", "string_value", "", "", "", "double_array_value")
"""Fields of a ParameterValue by the number of its type; empty for types that no parameter of the node has."""

NAMED_NODES = 5
"""This many other nodes are named in a note."""

MS_BUDGETS = ("budget.average_ms", "budget.deadline_ms")


class ParameterEvents:
    """Applies the changes of live parameters of one node, and notes differences of other parameters.

    `/parameter_events` is one topic for all nodes. Events of other nodes have no effect. Those that have
    parameters of the policy are counted: they may come from another arm, or from a node with another name.
    """

    def __init__(self, given: dict[str, Any], node: str, keep: tuple[str, ...] = (), has_clock: bool = False):
        """given: values of all parameters at the beginning. node: full name of the node that is replayed.
        keep: prefixes of names without changes.

        has_clock: whether there is a latency table. Without one, budgets in ms cannot be replayed.
        """
        self.given, self._node, self._keep, self._has_clock = dict(given), node, keep, has_clock
        self.applied = 0
        self._differences: set[str] = set()
        self._others: Counter[str] = Counter()
        self._declared = {declaration.name: declaration for declaration in parameters.DECLARATIONS}

    def notes(self) -> list[str]:
        """Lines for the person who reads the result."""
        others = [f"{node} ({count})" for node, count in sorted(self._others.items()) if count]
        if len(others) > NAMED_NODES:
            others[NAMED_NODES:] = [f"{len(others) - NAMED_NODES} more"]
        return sorted(self._differences) + (
            [
                f"parameter events of other nodes than {self._node} have no effect: {', '.join(others)}; "
                "if one of them is the policy node, name it with --node"
            ]
            if others
            else []
        )

    def apply(self, controller: Controller, event: Any) -> bool:
        """Applies a ParameterEvent message; returns whether it changed anything. UserError if infeasible."""
        node = "/" + event.node.strip("/")
        if node != self._node:
            changes = (*event.new_parameters, *event.changed_parameters)
            self._others[node] += any(each.name in self._declared for each in changes)
            return False
        changed = {}
        for name, value in self._values((*event.new_parameters, *event.changed_parameters)):
            if self._declared[name].live:
                changed[name] = value
            elif value != self.given[name] and name.startswith(("control.", "action.")):
                self._differences.add(
                    f"{name} was {value!r} when it was recorded and is {self.given[name]!r} here"
                )
        # An event without changed_parameters comes from the start of a node. A value that is set later, even
        # the same one, makes a new budget.
        if not event.changed_parameters:
            changed = {name: value for name, value in changed.items() if value != self.given[name]}
        if not changed:
            return False
        self.given |= changed
        asked = parameters.budget(self.given)
        check_clock(self.given, self._has_clock)
        controller.policy.check(asked, parameters.budget_names(changed))
        for change in parameters.changes(changed, self.given).values():
            change(controller)
        controller.policy.wait_for_layers()
        self.applied += 1
        return True

    def _values(self, recorded: Iterable[Any]) -> Iterator[tuple[str, Any]]:
        """Names and values of the recorded parameters that the node has, without those of `keep`."""
        for each in recorded:
            declaration = self._declared.get(each.name)
            field = VALUES[each.value.type] if each.value.type < len(VALUES) else ""
            if declaration is None or not field or (self._keep and each.name.startswith(self._keep)):
                continue
            value = getattr(each.value, field)
            yield (
                each.name,
                declaration.checked(
                    list(value) if field == "double_array_value" else value, "recorded parameter event"
                ),
            )


def check_clock(given: dict[str, Any], has_clock: bool) -> None:
    """Raises UserError for a budget in ms without a latency table, which is the same on every machine."""
    for name in MS_BUDGETS:
        if given[name] and not has_clock:
            raise UserError(
                f"{name} is {given[name]:g}: a replay needs latencies that stay the same for that: "
                "give --latency-table FILE, which `python -m deer_vla_ros benchmark latency --json FILE` "
                "measures, or a budget in GMAC"
            )
