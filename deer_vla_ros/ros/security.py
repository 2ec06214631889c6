"""The SROS2 policy of the node: what it may use on a secured ROS graph, made from its declarations.

`python -m deer_vla_ros.commands.reference_pages` writes config/sros2/deer_vla.policy.xml with it. For a robot
with a namespace and remaps:

    python -m deer_vla_ros.ros.security --namespace /left --remap target_pose:=/motion_controller/target_frame
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from xml.sax.saxutils import escape, quoteattr

from deer_vla_ros.errors import UserError
from deer_vla_ros.ros.interface import INPUTS, OUTPUTS, SERVICES
from deer_vla_ros.ros.parameters import DECLARATIONS, NODE_NAME

ENCLAVE = f"/{NODE_NAME}"
"""Node and watchdog both use this enclave: one enclave is one identity."""
WATCHDOG_NAME = f"{NODE_NAME}_watchdog"
GRIPPER_ACTION = next(each.default for each in DECLARATIONS if each.name == "action.gripper_action")

COMMANDS = ("target_pose", "target_twist")
"""The watchdog publishes them, too: a hold, when the node hangs or has died. At its start the node subscribes
to them, to find out whether another node commands the arm already."""
WATCHDOG_SUBSCRIBED = ("ee_pose",)

NODE_PUBLISHED = ("/parameter_events",)
NODE_SUBSCRIBED = ("/clock",)
"""Topics that rclpy gives to every node; /clock only with `use_sim_time`."""
MANAGED_PUBLISHED = ("/rosout", "~/transition_event")
MANAGED_SERVED = (
    "~/change_state",
    "~/describe_parameters",
    "~/get_available_states",
    "~/get_available_transitions",
    "~/get_parameter_types",
    "~/get_parameters",
    "~/get_state",
    "~/get_transition_graph",
    "~/get_type_description",
    "~/list_parameters",
    "~/set_parameters",
    "~/set_parameters_atomically",
)
"""What rclpy also gives to the policy node: log, lifecycle and parameters. The watchdog has none of them."""

HEADER = """\
<!-- SROS2 policy of the deer_vla node and of its watchdog process: what they may use, and nothing else.
     Written by `python -m deer_vla_ros.commands.reference_pages`; a test compares it with the running node.
     Names are those without a namespace and without remaps; ~ is the name of the node.
     docs/how-to/secure-with-sros2.md tells how to write this file for your robot. -->
"""

NO_REMAPS: Mapping[str, str] = MappingProxyType({})


def render_policy(namespace: str = "/", remaps: Mapping[str, str] = NO_REMAPS) -> str:
    """The text of the policy file.

    remaps: from a name of the interface (or of the gripper's action) to its name on the robot. Raises
    UserError for a name that the node does not have, or a namespace without a slash.
    """
    names = {each.name for each in (*INPUTS, *OUTPUTS, *SERVICES)} | {GRIPPER_ACTION}
    if strangers := sorted(set(remaps) - names):
        raise UserError(f"the node has no {', '.join(strangers)}: remap a name of docs/reference")
    if not namespace.startswith("/"):
        raise UserError(f"the namespace is {namespace!r}: begin it with a slash")

    def named(entries: Iterable[str]) -> list[str]:
        return sorted({remaps.get(name, name) for name in entries})

    inputs, outputs, services = ([each.name for each in table] for table in (INPUTS, OUTPUTS, SERVICES))
    node = _profile(
        NODE_NAME,
        namespace,
        {
            ("topic", "publish"): named((*NODE_PUBLISHED, *MANAGED_PUBLISHED, *outputs)),
            ("topic", "subscribe"): named((*NODE_SUBSCRIBED, *COMMANDS, *inputs)),
            ("service", "reply"): named((*MANAGED_SERVED, *services)),
            ("action", "call"): named((GRIPPER_ACTION,)),
        },
    )
    watchdog = _profile(
        WATCHDOG_NAME,
        namespace,
        {
            ("topic", "publish"): named((*NODE_PUBLISHED, *COMMANDS)),
            ("topic", "subscribe"): named((*NODE_SUBSCRIBED, *WATCHDOG_SUBSCRIBED)),
        },
    )
    return HEADER + "\n".join(
        [
            '<policy version="0.2.0">',
            "  <enclaves>",
            f"    <enclave path={quoteattr(ENCLAVE)}>",
            "      <profiles>",
            *node,
            *watchdog,
            "      </profiles>",
            "    </enclave>",
            "  </enclaves>",
            "</policy>",
            "",
        ]
    )


def _profile(name: str, namespace: str, rules: Mapping[tuple[str, str], list[str]]) -> list[str]:
    """The lines of one node. rules: the names, by (kind of the entry, what is allowed)."""
    lines = [f"        <profile ns={quoteattr(namespace)} node={quoteattr(name)}>"]
    for (kind, verb), names in rules.items():
        lines.append(f'          <{kind}s {verb}="ALLOW">')
        lines += [f"            <{kind}>{escape(each)}</{kind}>" for each in names]
        lines.append(f"          </{kind}s>")
    return [*lines, "        </profile>"]


def main() -> None:
    """Prints the policy for the namespace and the remaps on the command line."""
    parser = argparse.ArgumentParser(description="Prints the SROS2 policy of a deer_vla node on your robot.")
    parser.add_argument("--namespace", default="/", help="namespace of the node (default: /)")
    parser.add_argument(
        "--remap", action="append", default=[], metavar="NAME:=NAME", help="as the node is given it; repeat"
    )
    given = parser.parse_args()
    rules = [rule.partition(":=") for rule in given.remap]
    try:
        if wrong := [name for name, sign, other in rules if not (name and sign and other)]:
            raise UserError(f"--remap {wrong[0]}: give it as NAME:=NAME")
        print(render_policy(given.namespace, {name: other for name, _, other in rules}), end="")
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
