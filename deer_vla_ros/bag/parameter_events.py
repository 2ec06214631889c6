"""Which parameters were changed while it was recorded? `/parameter_events` of the policy node, obeyed at their place in the recording."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from deer_vla_ros.control.controller import Controller
from deer_vla_ros.errors import UserError
from deer_vla_ros.ros import parameters

VALUES = ("", "bool_value", "integer_value", "double_value", "string_value", "", "", "", "double_array_value")
"""Fields of a ParameterValue by its type's number, as far as parameters of the node have that type."""

MS_BUDGETS = ("budget.average_ms", "budget.deadline_ms")


class ParameterEvents:
    """Applies what was changed live; what a node reads only when it starts is noted where it differs."""

    def __init__(self, given: dict[str, Any], keep: tuple[str, ...] = (), has_clock: bool = False):
        """given: values of all parameters at the beginning. keep: beginnings of the names that stay as given, whatever was recorded.
        has_clock: whether there is a latency table, without which budgets in ms cannot be replayed."""
        self.given, self._keep, self._has_clock = dict(given), keep, has_clock
        self.applied = 0
        self.notes: set[str] = set()
        self._declared = {declaration.name: declaration for declaration in parameters.DECLARATIONS}

    def apply(self, controller: Controller, event: Any) -> bool:
        """Obeys a ParameterEvent message; whether it changed anything. UserError for a budget that cannot be replayed here."""
        if event.node.rpartition("/")[2] != parameters.NODE_NAME:
            return False
        changed = {}
        for name, value in self._values((*event.new_parameters, *event.changed_parameters)):
            if self._declared[name].live:
                changed[name] = value
            elif value != self.given[name] and name.startswith(("control.", "action.")):
                self.notes.add(f"{name} was {value!r} when it was recorded and is {self.given[name]!r} here")
        if (
            not event.changed_parameters
        ):  # what a node starts with; set while it runs, even the same value makes a new budget
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
        """Names and values of recorded parameters that are the node's, and are not to stay as given."""
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
    """UserError for a budget in ms without a clock that runs alike on every machine."""
    for name in MS_BUDGETS:
        if given[name] and not has_clock:
            raise UserError(
                f"{name} is {given[name]:g}: a replay needs latencies that stay the same for that: give --latency-table FILE, which "
                "`python -m deer_vla_ros benchmark latency --json FILE` measures, or a budget in GMAC"
            )
