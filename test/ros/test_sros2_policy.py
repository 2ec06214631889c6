"""Tests that the SROS2 policy allows exactly what the declarations name and the running processes use."""

import contextlib
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from functools import partial

import pytest
from harness import Client, spawn, wait_until

from deer_vla_ros.commands.reference_pages import ROOT
from deer_vla_ros.errors import UserError
from deer_vla_ros.ros import security
from deer_vla_ros.ros.interface import INPUTS, OUTPUTS, SERVICES

POLICY = ROOT / "config" / "sros2" / "deer_vla.policy.xml"
NODE, WATCHDOG = "deer_vla", "deer_vla_watchdog"
KINDS = {("topics", "publish"), ("topics", "subscribe"), ("services", "reply"), ("actions", "call")}

# The topics that rclpy 7.1 of Jazzy gives to every node. The code has its own list.
OF_EVERY_NODE = {"publish": {"/parameter_events"}, "subscribe": {"/clock"}}
OF_A_MANAGED_NODE = {
    "publish": {"/rosout", "~/transition_event"},
    "reply": {
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
    },
}
COMMANDS = {"target_pose", "target_twist"}


def names(entries) -> set[str]:
    return {entry.name for entry in entries}


def profiles(text: str) -> dict[str, dict[str, set[str]]]:
    """For every node of a policy, the names that it may use, by the kind of use."""
    tree = ElementTree.fromstring(text)
    assert (tree.tag, tree.attrib) == ("policy", {"version": "0.2.0"})
    (enclave,) = tree.findall("enclaves/enclave")
    assert enclave.attrib == {"path": "/deer_vla"}
    found = {}
    for profile in enclave.findall("profiles/profile"):
        rules: dict[str, set[str]] = {}
        for rule in profile:
            ((verb, qualifier),) = rule.attrib.items()
            assert (rule.tag, verb) in KINDS and qualifier == "ALLOW"
            given = [entry.text for entry in rule]
            assert {entry.tag for entry in rule} == {rule.tag.removesuffix("s")}
            assert len(set(given)) == len(given) and verb not in rules
            rules[verb] = set(given)
        found[profile.attrib["node"]] = rules
    return found


@pytest.fixture(scope="module")
def policy() -> dict[str, dict[str, set[str]]]:
    return profiles(POLICY.read_text())


# --- Comparison with the declarations.


def test_the_node_may_use_what_the_interface_names_and_what_every_managed_node_has(policy):
    assert policy[NODE] == {
        "publish": names(OUTPUTS) | OF_EVERY_NODE["publish"] | OF_A_MANAGED_NODE["publish"],
        "subscribe": names(INPUTS) | COMMANDS | OF_EVERY_NODE["subscribe"],
        "reply": names(SERVICES) | OF_A_MANAGED_NODE["reply"],
        "call": {"gripper_controller/gripper_cmd"},
    }


def test_the_watchdog_may_publish_the_motion_commands_and_hear_the_pose(policy):
    pose = {"ee_pose"}
    assert COMMANDS <= names(OUTPUTS) and pose <= names(INPUTS)
    assert policy[WATCHDOG] == {
        "publish": COMMANDS | OF_EVERY_NODE["publish"],
        "subscribe": pose | OF_EVERY_NODE["subscribe"],
    }
    assert policy.keys() == {NODE, WATCHDOG}


def test_a_robots_policy_has_its_namespace_and_its_names():
    target, gripper = "/motion_controller/target_frame", "/hand/gripper_cmd"
    remaps = ["--remap", f"target_pose:={target}", "--remap", f"{security.GRIPPER_ACTION}:={gripper}"]
    command = [sys.executable, "-m", "deer_vla_ros.ros.security", "--namespace", "/left", *remaps]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = profiles(done.stdout)
    assert done.stdout.count('ns="/left"') == 2
    for node in (NODE, WATCHDOG):
        assert target in found[node]["publish"] and "target_pose" not in found[node]["publish"]
    assert found[NODE]["call"] == {gripper}


@pytest.mark.parametrize(("namespace", "remaps"), [("/", {"tool_pose": "/arm/pose"}), ("left", {})])
def test_a_name_that_the_node_does_not_have_is_refused(namespace, remaps):
    with pytest.raises(UserError, match="tool_pose|begin it with a slash"):
        security.render_policy(namespace, remaps)


# --- Comparison with running processes.


@pytest.fixture(scope="module")
def client():
    with Client("sros2_policy_test") as client:
        yield client


def used(client: Client, node: str, namespace: str) -> dict[str, set[str]]:
    """The names that `node` uses according to the ROS graph, by the kind of use, as in the policy."""
    of_node = {
        "publish": client.node.get_publisher_names_and_types_by_node,
        "subscribe": client.node.get_subscriber_names_and_types_by_node,
        "reply": client.node.get_service_names_and_types_by_node,
    }
    own, inside = f"{namespace}/{node}/", f"{namespace}/"

    def in_policy(name: str) -> str:
        return name.replace(own, "~/", 1) if name.startswith(own) else name.removeprefix(inside)

    return {verb: {in_policy(name) for name, _ in ask(node, namespace)} for verb, ask in of_node.items()}


OTHER = ("inputs.image_transport:=compressed", "use_sim_time:=true", "control.enable_timeout_s:=1.0")
"""Parameters with which a node uses topics and services that it does not use by default."""


@pytest.fixture(scope="module")
def running(client) -> Iterator[tuple[str, ...]]:
    """Two nodes that together use everything. Yields their namespaces."""
    given = {"/plain": (), "/other": OTHER}
    with contextlib.ExitStack() as processes:
        for namespace, values in given.items():
            parameters = [part for value in values for part in ("-p", value)]
            process = processes.enter_context(
                spawn("node", "--ros-args", "-r", f"__ns:={namespace}", *parameters)
            )
            client.await_active(process, f"{namespace.removeprefix('/')}/{NODE}")
        yield tuple(given)


@pytest.mark.parametrize("node", [NODE, WATCHDOG])
def test_running_processes_use_exactly_what_the_policy_allows(client, policy, running, node):
    # The gripper's action is left out: it needs control_msgs, which is not installed everywhere.
    allowed = {"reply": set()} | {verb: entries for verb, entries in policy[node].items() if verb != "call"}
    together: dict[str, set[str]] = {verb: set() for verb in allowed}
    for namespace in running:
        found = wait_until(partial(settled, client, node, namespace, allowed), what=f"all of {node}")
        for verb, entries in found.items():
            assert entries <= allowed[verb], f"{verb}: used, but not allowed"
            together[verb] |= entries
    if node == NODE:
        together["subscribe"] |= COMMANDS  # The node subscribes to them in its first seconds only.
    assert together == allowed, "allowed, but not used"


def settled(client: Client, node: str, namespace: str, allowed: dict) -> dict[str, set[str]] | None:
    """The names that `node` uses, once the graph has all of its services and publishers; None before."""
    if (node, namespace) not in client.node.get_node_names_and_namespaces():
        return None
    found = used(client, node, namespace)
    return found if all(len(found[verb]) >= len(allowed[verb]) for verb in ("reply", "publish")) else None
