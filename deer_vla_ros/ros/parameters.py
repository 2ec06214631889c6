"""The declarations of the node's parameters (type, range, unit, description), and settings made from values.

`python -m deer_vla_ros.commands.reference_pages` writes config/deer_vla.yaml and docs/reference from them.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rcl_interfaces.srv import ListParameters
from rclpy.exceptions import InvalidParameterTypeException
from rclpy.node import Node
from rclpy.parameter import Parameter

from deer_vla_ros.budget.types import UNITS, Budget
from deer_vla_ros.control.guard import GuardLimits
from deer_vla_ros.control.inputs import InputLimits
from deer_vla_ros.control.settings import ControllerSettings
from deer_vla_ros.errors import UserError, shown
from deer_vla_ros.model.action_space import ActionSpace
from deer_vla_ros.ros.gripper import INTERFACES
from deer_vla_ros.ros.messages import SECOND
from deer_vla_ros.untrusted import read_yaml

if TYPE_CHECKING:  # launch files check parameters before the start, without torch
    from deer_vla_ros.control.controller import Controller

NODE_NAME = "deer_vla"
RCLPYS_OWN = ("use_sim_time", "start_type_description_service", "qos_overrides.")
"""Parameters that rclpy itself declares, or prefixes of their names. `ros2 param dump` writes them, too."""


NO_FEEDBACK = {"guard.follow_timeout_s": 0.0, "guard.ramp_in_steps": 0}
"""These values apply in a rehearsal and in a replay. There the recorded arm does not follow the new commands:
it would seem to stand still or to be moved away, and ramps would follow holds that a live arm never has."""


@dataclass(frozen=True)
class Declaration:
    """One parameter. low, high: bounds of a number. live: may change while the node runs, between two steps.

    is_budget: the budget checks the value, against the range that is feasible at that moment, and not rclpy.
    """

    name: str
    default: Any
    description: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    live: bool = False
    is_budget: bool = False

    def checked(self, value: Any, where: str) -> Any:
        """The value in the parameter's type. Raises UserError, `where` first, if the node would refuse it."""
        kind, value = type(self.default), self.typed(value)
        given = f"{where}: {self.name} is {shown(value)}"
        if type(value) is not kind:
            raise UserError(f"{given}: give a {kind.__name__}")
        if kind is list and not (
            len(value) == len(self.default) and all(type(each) is float for each in value)
        ):
            raise UserError(f"{given}: give {len(self.default)} numbers")
        if kind is str and any(character < " " for character in value):
            raise UserError(f"{given}: give a text without control characters")
        if self.choices and value not in self.choices:
            raise UserError(f"{given}: use one of {', '.join(self.choices)}")
        if self.low is not None and not self.low <= value <= self.high:
            raise UserError(f"{given}: give {self.low:g} to {self.high:g}")
        return value

    def typed(self, value: Any) -> Any:
        """Converts whole numbers to float for a double or an array of doubles. Keeps other values."""
        if isinstance(self.default, float):
            return _as_float(value)
        if isinstance(self.default, list) and not isinstance(value, (str, bytes, set, dict)):
            if hasattr(value, "__iter__"):
                return [_as_float(each) for each in value] or value
        return value

    def descriptor(self) -> ParameterDescriptor:
        """The declaration in the form that rclpy takes."""
        unit = f" [{self.unit}]" if self.unit else ""
        descriptor = ParameterDescriptor(description=self.description + unit, read_only=not self.live)
        if self.choices:
            descriptor.additional_constraints = f"one of: {', '.join(self.choices)}"
        if self.is_budget:
            descriptor.additional_constraints = (
                "0, or not below the cost of the first exit: ~/budget tells the feasible range"
            )
        elif self.low is not None and isinstance(self.default, float):
            descriptor.floating_point_range = [FloatingPointRange(from_value=self.low, to_value=self.high)]
        elif self.low is not None:
            descriptor.integer_range = [IntegerRange(from_value=int(self.low), to_value=int(self.high))]
        return descriptor


DECLARATIONS = (
    Declaration(
        "autostart",
        True,
        "True: the node configures and activates itself. False: a lifecycle manager does it.",
    ),
    Declaration(
        "overlay.rate_hz",
        2.0,
        "How often ~/overlay is drawn while it has a subscriber. 0: there is no such topic.",
        "Hz",
        0.0,
        30.0,
    ),
    Declaration(
        "model.path", "", "Checkpoint folder. Empty: the checkpoint that is embedded in the package."
    ),
    Declaration(
        "model.device",
        "auto",
        "Where the network runs. auto: on the GPU if there is one.",
        choices=("auto", "cpu", "cuda"),
    ),
    Declaration(
        "model.dtype",
        "auto",
        "Number type of the weights. auto: float16 on a GPU, float32 on a CPU. bfloat16 changes the deltas "
        "by 0.002 in the median: it does not go with thresholds below 0.01. int8, int4: the matrices of the "
        "language model's layers are quantised to 8 or 4 bits while they are read, all else is as with auto. "
        "They change the deltas as well: run calibrate again with the same --dtype.",
        choices=("auto", "float32", "bfloat16", "float16", "int8", "int4"),
    ),
    Declaration(
        "model.backend",
        "auto",
        "What steps run with. eager: operator by operator. compiled: torch.compile, which takes minutes at "
        "the first start on a machine. graphs: CUDA graphs. auto: graphs on a GPU, eager on a CPU. A backend "
        "whose decisions differ from eager ones is refused with a warning, and steps run eagerly.",
        choices=("auto", "eager", "compiled", "graphs"),
    ),
    Declaration(
        "model.cpu_threads",
        1,
        "Threads of the network on a CPU. The embedded network is fastest with 1. 0: torch chooses.",
        low=0,
        high=256,
    ),
    Declaration(
        "model.warm_up_s",
        10.0,
        "configure runs every exit a few times, the deepest first, and starts no more runs after this time. "
        "One run always takes place.",
        "s",
        0.0,
        3600.0,
    ),
    Declaration(
        "control.rate_hz",
        10.0,
        "Most steps per second of ROS time. A hold is repeated at this rate.",
        "Hz",
        0.1,
        200.0,
    ),
    Declaration(
        "control.start_held",
        False,
        "True: the arm holds from the start, until ~/hold is called with false.",
    ),
    Declaration(
        "control.enable_timeout_s",
        0.0,
        "Deadman switch: the arm holds unless the topic `enable` said true within this time. 0: there is no "
        "such topic.",
        "s",
        0.0,
        10.0,
    ),
    Declaration(
        "control.rehearsal",
        False,
        "True: the node plays along with a recording, without an arm. Then nobody has to listen to the "
        "commands, no arm has to follow them, and every hold ends by itself. Never set it with an arm.",
    ),
    Declaration(
        "control.allow_other_commanders",
        False,
        "True: the node moves the arm even if another node commands the same arm.",
    ),
    Declaration(
        "inputs.image_transport",
        "raw",
        "The camera topics: raw: .../image_raw. compressed: .../image_raw/compressed.",
        choices=("raw", "compressed"),
    ),
    Declaration(
        "inputs.max_age_s",
        0.3,
        "The arm holds if the newest camera frame is older than this.",
        "s",
        0.01,
        10.0,
        live=True,
    ),
    Declaration(
        "inputs.max_pose_age_s",
        0.3,
        "The arm holds if the newest measured TCP pose is older than this.",
        "s",
        0.01,
        10.0,
        live=True,
    ),
    Declaration(
        "inputs.max_skew_s",
        0.05,
        "The arm holds if the stamps of both cameras are further apart than this, or if a stamp lies further "
        "in the future.",
        "s",
        0.001,
        1.0,
        live=True,
    ),
    Declaration(
        "budget.average_gmac",
        0.0,
        "Largest mean cost of the language part of a step. 0: no limit.",
        "GMAC",
        0.0,
        1e6,
        live=True,
        is_budget=True,
    ),
    Declaration(
        "budget.average_fraction",
        0.0,
        "Largest mean cost of the language part of a step, as a share of full depth. 0: no limit.",
        "",
        0.0,
        1e6,
        live=True,
        is_budget=True,
    ),
    Declaration(
        "budget.peak_gmac",
        0.0,
        "Largest cost of the language part of a single step. The first exit is always allowed. 0: no limit.",
        "GMAC",
        0.0,
        1e6,
        live=True,
        is_budget=True,
    ),
    Declaration(
        "budget.memory_gib",
        0.0,
        "Most memory on the device for the weights of the language model's layers. Layers that do not fit "
        "leave the device, and no step goes there. 0: no limit.",
        "GiB",
        0.0,
        1e6,
        live=True,
        is_budget=True,
    ),
    Declaration(
        "budget.average_ms",
        0.0,
        "Largest mean time of a whole step, by the latency that was measured on this device. 0: no limit.",
        "ms",
        0.0,
        1e6,
        live=True,
        is_budget=True,
    ),
    Declaration(
        "budget.deadline_ms",
        0.0,
        "Longest time of a single step: no step goes to an exit for which 1 of 100 steps is predicted to "
        "take longer. The first exit is always allowed. 0: no limit.",
        "ms",
        0.0,
        1e6,
        live=True,
        is_budget=True,
    ),
    Declaration(
        "budget.governor",
        True,
        "True: thresholds are corrected while the node runs, so that achieved means are the requested ones.",
        live=True,
    ),
    Declaration(
        "action.mode", "both", "Which motion commands are published.", choices=("pose", "twist", "both")
    ),
    Declaration(
        "action.frame", "", "Frame of motions, measured poses and targets. Empty: the checkpoint's frame."
    ),
    Declaration(
        "action.translation_m",
        0.0,
        "Motion per step for a normalised translation of 1. 0: the checkpoint's value.",
        "m",
        0.0,
        1.0,
    ),
    Declaration(
        "action.rotation_rad",
        0.0,
        "Motion per step for a normalised rotation of 1. 0: the checkpoint's value.",
        "rad",
        0.0,
        3.14,
    ),
    Declaration(
        "action.gripper_open",
        0.0,
        "Gripper command for open. If it equals action.gripper_closed, both are the checkpoint's.",
        "",
        -1e3,
        1e3,
    ),
    Declaration(
        "action.gripper_closed",
        0.0,
        "Gripper command for closed. If it equals action.gripper_open, both are the checkpoint's.",
        "",
        -1e3,
        1e3,
    ),
    Declaration(
        "action.gripper_interface",
        "topic",
        "How gripper commands are sent: on a topic, or to an action server. The actions need control_msgs.",
        choices=INTERFACES,
    ),
    Declaration("action.gripper_action", "gripper_controller/gripper_cmd", "Name of the gripper's action."),
    Declaration(
        "action.gripper_joint",
        "",
        "Joint that a ParallelGripperCommand names. Empty: none, for a controller with one joint.",
    ),
    Declaration(
        "action.gripper_max_effort",
        0.0,
        "Largest effort that a GripperCommand allows. 0: the controller's own limit.",
        "N",
        0.0,
        1e4,
    ),
    Declaration(
        "action.gripper_hysteresis",
        0.05,
        "The gripper changes only if its probability of being open is at least this far from 0.5. 0: the "
        "rule of the reference.",
        low=0.0,
        high=0.5,
        live=True,
    ),
    Declaration(
        "action.gripper_dwell_s",
        0.0,
        "The least time between two changes of the gripper command.",
        "s",
        0.0,
        10.0,
        live=True,
    ),
    Declaration(
        "guard.max_translation_m",
        0.06,
        "Largest motion of the target in one step.",
        "m",
        1e-4,
        1.0,
        live=True,
    ),
    Declaration(
        "guard.max_rotation_rad",
        0.3,
        "Largest rotation of the target in one step.",
        "rad",
        1e-4,
        3.14,
        live=True,
    ),
    Declaration(
        "guard.leash_m",
        0.15,
        "Largest distance of the target from the measured TCP.",
        "m",
        1e-3,
        1.0,
        live=True,
    ),
    Declaration(
        "guard.leash_rad",
        0.6,
        "Largest rotation between the target and the measured TCP.",
        "rad",
        1e-3,
        3.14,
        live=True,
    ),
    Declaration(
        "guard.workspace_min",
        [-0.8, -0.8, 0.0],
        "Lower corner x, y, z of the box that targets stay in, in the action frame. Set it to your cell.",
        "m",
        live=True,
    ),
    Declaration(
        "guard.workspace_max",
        [0.8, 0.8, 1.2],
        "Upper corner x, y, z of the box that targets stay in, in the action frame. Set it to your cell.",
        "m",
        live=True,
    ),
    Declaration(
        "guard.max_linear_speed_m_s",
        0.6,
        "Largest speed of the target. 0: no limit.",
        "m/s",
        0.0,
        10.0,
        live=True,
    ),
    Declaration(
        "guard.max_angular_speed_rad_s",
        3.0,
        "Largest angular speed of the target. 0: no limit.",
        "rad/s",
        0.0,
        31.4,
        live=True,
    ),
    Declaration(
        "guard.max_linear_acceleration_m_s2",
        0.0,
        "Largest change of the target's velocity. A hold stops at once. 0: no limit.",
        "m/s2",
        0.0,
        100.0,
        live=True,
    ),
    Declaration(
        "guard.max_angular_acceleration_rad_s2",
        0.0,
        "Largest change of the target's angular velocity. A hold stops at once. 0: no limit.",
        "rad/s2",
        0.0,
        1000.0,
        live=True,
    ),
    Declaration(
        "guard.ramp_in_steps",
        3,
        "Number of steps after a hold that use at most a third of the step and speed limits.",
        low=0,
        high=100,
        live=True,
    ),
    Declaration(
        "guard.follow_timeout_s",
        3.0,
        "The arm holds if its measured pose has not changed for this time while its target was more than "
        "half the step limit ahead. 0: never.",
        "s",
        0.0,
        60.0,
        live=True,
    ),
)


def declare(node: Node) -> None:
    """Declares all parameters, with their overrides as values. A double may be given as a whole number, now
    and when it is set later. rclpy refuses an override outside its range, and UserError names one of a wrong
    type. What rclpy declared from an override by itself is declared anew, with type and range."""
    for declaration in DECLARATIONS:
        if node.has_parameter(declaration.name):
            node.undeclare_parameter(declaration.name)
        try:
            node.declare_parameter(declaration.name, declaration.default, declaration.descriptor())
        except InvalidParameterTypeException:
            _declare_typed(node, declaration)
    node.add_pre_set_parameters_callback(_typed)


def _declare_typed(node: Node, declaration: Declaration) -> None:
    """Declares a parameter whose override has another type: reads and converts the override."""
    anything = ParameterDescriptor(dynamic_typing=True)
    given = node.declare_parameter(declaration.name, declaration.default, anything).value
    node.undeclare_parameter(declaration.name)
    value = declaration.checked(given, "given at start")
    node.declare_parameter(declaration.name, value, declaration.descriptor(), ignore_override=True)


def _typed(given: list[Parameter]) -> list[Parameter]:
    """Parameters that are about to be set, converted to their declared types where possible."""
    declared = {declaration.name: declaration for declaration in DECLARATIONS}

    def typed(parameter: Parameter) -> Parameter:
        if parameter.name not in declared or parameter.value is None:
            return parameter
        value = declared[parameter.name].typed(parameter.value)
        return Parameter(parameter.name, value=value) if value is not parameter.value else parameter

    return [typed(parameter) for parameter in given]


def unknown(node: Node) -> list[str]:
    """Names of parameters that neither this package nor rclpy has: a typing error, or a wrong file. The node
    must have been made with automatically_declare_parameters_from_overrides."""
    ours = {declaration.name for declaration in DECLARATIONS}
    names = node.list_parameters([], ListParameters.Request.DEPTH_RECURSIVE).names
    return sorted(name for name in names if name not in ours and not name.startswith(RCLPYS_OWN))


def values(node: Node, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The effective value of every parameter, by name: `changes` replace the node's values, and in a
    rehearsal NO_FEEDBACK applies. Raises UserError for a value that is none of its choices."""
    current = {
        declaration.name: node.get_parameter(declaration.name).value for declaration in DECLARATIONS
    } | (changes or {})
    for declaration in DECLARATIONS:
        if declaration.choices and current[declaration.name] not in declaration.choices:
            raise UserError(
                f"{declaration.name} is '{current[declaration.name]}': "
                f"use one of {', '.join(declaration.choices)}"
            )
    return current | (NO_FEEDBACK if current["control.rehearsal"] else {})


def controller_settings(given: dict[str, Any]) -> ControllerSettings:
    """The controller's settings from parameter values. Raises UserError with value, limit and remedy."""
    return ControllerSettings(
        rate_hz=given["control.rate_hz"],
        inputs=InputLimits(
            max_age_ns=int(given["inputs.max_age_s"] * SECOND),
            max_pose_age_ns=int(given["inputs.max_pose_age_s"] * SECOND),
            max_skew_ns=int(given["inputs.max_skew_s"] * SECOND),
        ),
        guard=guard_limits(given),
        gripper_hysteresis=given["action.gripper_hysteresis"],
        gripper_dwell_ns=int(given["action.gripper_dwell_s"] * SECOND),
        follow_timeout_ns=int(given["guard.follow_timeout_s"] * SECOND),
    )


def guard_limits(given: dict[str, Any]) -> GuardLimits:
    """The guard's limits from parameter values; raises UserError."""
    values = {field.name: given[f"guard.{field.name}"] for field in dataclasses.fields(GuardLimits)}
    return GuardLimits(**values | {name: tuple(values[name]) for name in ("workspace_min", "workspace_max")})


def action_space(given: dict[str, Any], checkpoint: ActionSpace) -> ActionSpace:
    """The checkpoint's action space with the changes that parameters ask for. Raises UserError."""
    changes = {
        name: given[f"action.{name}"]
        for name in ("frame", "translation_m", "rotation_rad")
        if given[f"action.{name}"]
    }
    if given["action.gripper_open"] != given["action.gripper_closed"]:
        changes |= {name: given[f"action.{name}"] for name in ("gripper_open", "gripper_closed")}
    return dataclasses.replace(checkpoint, **changes)


def budget(given: dict[str, Any]) -> Budget:
    """The budget from parameter values."""
    return Budget(**{field.name: given[f"budget.{field.name}"] for field in dataclasses.fields(Budget)})


def budget_names(changed: Iterable[str]) -> list[str]:
    """The fields of `Budget` that are amounts and whose parameters are among the names in `changed`."""
    names = (name.removeprefix("budget.") for name in changed if name.startswith("budget."))
    return [name for name in names if name in UNITS]


def changes(changed: Iterable[str], given: dict[str, Any]) -> dict[str, Callable[[Controller], None]]:
    """Functions that apply the changed parameters to a controller between two ticks, by what they change.

    changed: names of parameters. given: all values, as from `values`.
    """
    changed, found = list(changed), {}
    if any(name.startswith(("inputs.", "guard.", "action.")) for name in changed):
        settings = controller_settings(given)
        found["settings"] = lambda controller: setattr(controller, "settings", settings)
    if budget_names(changed) or "budget.governor" in changed:
        asked = budget(given)
        found["budget"] = lambda controller: controller.policy.set(asked)
    return found


def from_file(path: Path | None, node: str = "", recording: Path | None = None) -> dict[str, Any]:
    """Every parameter's value if the node gets this ROS parameter file. Parameters that it leaves out, or all
    if path is None, have their defaults.

    node: full name of the node, such as /left/deer_vla. As in ROS 2, the sections of the file whose names
    match it apply, the last one wins, `*` is one part of a name and `**` any number of parts. Empty: a node
    with the name deer_vla, in any namespace that the file names; the values must be the same in all of them.
    recording: the node's name follows from the topics of this recording.

    Raises UserError for a file that cannot be read (see `read_yaml`), that has no parameters for the node or
    different ones for several nodes, a name that no parameter has, or a value that the node would refuse.
    """
    if path is None:
        return with_defaults({}, "defaults")
    sections = _sections(path)
    nodes = [full_name(node)] if node else _policy_nodes(sections)
    given = [_of_node(sections, each) for each in nodes]
    if not any(given):
        names = ", ".join(dict.fromkeys(name for name, _ in sections))
        found = f"only for {_short(names)}" if names else "none at all"
        is_chosen = node and recording is None
        other = "" if is_chosen or not names else ", or name the policy node with --node"
        of = f" of {recording}" if recording else ""
        raise UserError(
            f"{path}: no ros__parameters for the node {node or NODE_NAME}{of}, {found}: "
            f"give them as config/deer_vla.yaml does{other}"
        )
    if any(each != given[0] for each in given):
        raise UserError(
            f"{path}: different parameters for the nodes {_short(', '.join(nodes))}: "
            "choose one with --node NAME"
        )
    return with_defaults(given[0], str(path))


def full_name(node: str) -> str:
    """The full name of a node, with one slash before each part. Raises UserError for what is no name."""
    parts = node.strip("/").split("/")
    if not all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", part) for part in parts):
        raise UserError(f"--node is {shown(node)}: give the full name of a node, such as /left/{NODE_NAME}")
    return "/" + "/".join(parts)


def _sections(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The sections of a parameter file in their order: full name of the node, perhaps with wildcards, and the
    values by parameter. Sections without any value are left out."""
    tree, found = read_yaml(path, "config/deer_vla.yaml"), []

    def search(tree: dict, parts: tuple[str, ...]) -> None:
        for key, value in tree.items():
            if key == "ros__parameters":
                if not isinstance(value, dict | None):
                    raise UserError(
                        f"{path}: ros__parameters is {shown(value)}: "
                        "give names of parameters with their values"
                    )
                name = "/" + "/".join(parts)
                if not all(re.fullmatch(r"\*\*?|[A-Za-z_][A-Za-z0-9_]*", part) for part in parts):
                    raise UserError(f"{path}: {shown(name)} is no name of a node: correct it")
                if values := _flat(value or {}):
                    found.append((name, values))
            elif isinstance(value, dict):
                search(value, (*parts, *str(key).strip("/").split("/")))

    search(tree if isinstance(tree, dict) else {}, ())
    return found


def _policy_nodes(sections: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """The nodes deer_vla that the sections name. Without any, an example of a name for each wildcard."""
    names = list(dict.fromkeys(name for name, _ in sections if _is_policy(name)))
    if exact := [name for name in names if "*" not in name]:
        return exact
    examples = (re.sub(r"/\*\*?$", f"/{NODE_NAME}", name).replace("/**", "") for name in names)
    return list(dict.fromkeys(example.replace("/*", "/any") for example in examples))


def _is_policy(name: str) -> bool:
    return name.rpartition("/")[2] in (NODE_NAME, "*", "**")


def _of_node(sections: list[tuple[str, dict[str, Any]]], node: str) -> dict[str, Any]:
    """The values that the node of this full name gets from the sections."""
    found: dict[str, Any] = {}
    for name, values in sections:
        if _matches(name.split("/")[1:], node.split("/")[1:]):
            found |= values
    return found


def _matches(pattern: list[str], name: list[str]) -> bool:
    """Whether the parts of a name match a pattern, in which `*` is one part and `**` any number of parts."""
    ends = {0}  # how many parts of the name the pattern so far can match
    for part in pattern:
        if not ends:
            return False
        if part == "**":
            ends = set(range(min(ends), len(name) + 1))
        else:
            ends = {end + 1 for end in ends if end < len(name) and part in ("*", name[end])}
    return len(name) in ends


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _as_float(value: Any) -> Any:
    """A whole number of at most 64 bits as a float; any other value as it is."""
    return float(value) if type(value) is int and abs(value) < 2**63 else value


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."


def with_defaults(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Every parameter's value: `values` (by name), checked as the node does, and defaults for others.

    Raises UserError, whose text begins with `where`.
    """
    found = {declaration.name: declaration.default for declaration in DECLARATIONS}
    declared = {declaration.name: declaration for declaration in DECLARATIONS}
    for name, value in values.items():
        if name.startswith(RCLPYS_OWN):
            continue
        if name not in declared:
            text = name if name.isprintable() and len(name) <= 100 else shown(name)
            raise UserError(f"{where}: no parameter {text}: see config/deer_vla.yaml")
        found[name] = declared[name].checked(value, where)
    try:
        controller_settings(found)
        budget(found).check()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return found


def render_yaml() -> str:
    """The text of `config/deer_vla.yaml`: every parameter with its default, unit, range and meaning."""
    about = (
        "Parameters of the deer_vla node, all with their default values. Copy this file, change what your "
        "robot needs, and pass it as params_file.",
        "`python -m deer_vla_ros.commands.reference_pages` writes it; a test compares it with what the "
        "node declares.",
        "live: the value may change while the node runs (`ros2 param set`), between two steps. The others "
        "are read when the node starts.",
    )
    lines = [
        *(line for text in about for line in _comment(text, "# ")),
        "/**:",
        f"  {NODE_NAME}:",
        "    ros__parameters:",
    ]
    group = ""
    for declaration in DECLARATIONS:
        prefix = declaration.name.partition(".")[0]
        if prefix != group:
            lines.append("")
            group = prefix
        facts = [
            declaration.unit,
            f"{declaration.low:g} to {declaration.high:g}" if declaration.low is not None else "",
        ]
        facts += [" | ".join(declaration.choices), "live" if declaration.live else ""]
        suffix = ", ".join(fact for fact in facts if fact)
        value = yaml.safe_dump(declaration.default, default_flow_style=True).removesuffix("\n...\n").strip()
        lines += _comment(f"{declaration.description}{f' ({suffix})' if suffix else ''}", "      # ")
        lines.append(f"      {declaration.name}: {value}")
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str) -> list[str]:
    """The lines of a comment in a YAML file."""
    return textwrap.wrap(text, 110, initial_indent=indent, subsequent_indent=indent)
