"""Tests that launch files name only what exists.

`launch` is not on PyPI. Without it the tests read the files as text; with it (apt Jazzy) they load them.
"""

import ast
import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import rclpy
import yaml
from paths import ROOT
from rclpy.context import Context

from deer_vla_ros.errors import UserError
from deer_vla_ros.ros import interface
from deer_vla_ros.ros.parameters import DECLARATIONS, NODE_NAME

POLICY, DEMO, REPLAY = (ROOT / "launch" / f"{name}.launch.py" for name in ("deer_vla", "demo", "replay"))
ARGUMENTS = {
    POLICY: {"params_file", "model_path", "namespace", "device", "use_sim_time", "autostart", "rehearsal"},
    DEMO: {"seed", "namespace"},
    REPLAY: {"bag", "out", "rate", "wait", "params_file"},
}
NO_LAUNCH = "launch_ros comes with apt Jazzy and is not on PyPI"
FILES = pytest.mark.parametrize("path", ARGUMENTS, ids=lambda path: path.name)


def calls(path, name):
    """All calls of `name` in the file."""
    tree = ast.parse(path.read_text(), str(path))
    return [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == name
    ]


def keyword(call, name):
    """The value of a call's keyword argument `name`; None if it is not a literal."""
    value = {given.arg: given.value for given in call.keywords}[name]
    return value.value if isinstance(value, ast.Constant) else None


def nodes(path):
    return calls(path, "Node") + calls(path, "LifecycleNode")


def load(path):
    spec = importlib.util.spec_from_file_location(path.name.partition(".")[0], path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@FILES
def test_a_launch_file_compiles_and_declares_the_arguments_that_users_are_told(path):
    compile(path.read_text(), str(path), "exec")
    assert {call.args[0].value for call in calls(path, "DeclareLaunchArgument")} == ARGUMENTS[path]


@FILES
def test_every_launch_argument_is_used(path):
    used = {
        call.args[0].value
        for call in calls(path, "LaunchConfiguration")
        if isinstance(call.args[0], ast.Constant)
    }
    table = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assign)]
    used |= {key.value for value in table if isinstance(value, ast.Dict) for key in value.keys}
    assert used == ARGUMENTS[path]


@pytest.mark.parametrize("path", [POLICY, DEMO], ids=lambda path: path.name)
def test_launched_nodes_are_executables_of_this_package(path):
    assert nodes(path)
    for node in nodes(path):
        script = ROOT / "scripts" / keyword(node, "executable")
        assert keyword(node, "package") == "deer_vla_ros"
        assert os.access(script, os.X_OK), f"{script} cannot be run"
        assert script.name in (ROOT / "CMakeLists.txt").read_text()


def test_the_policy_node_keeps_the_name_that_the_parameter_file_gives_it():
    (node,) = nodes(POLICY)
    assert keyword(node, "name") == NODE_NAME
    assert yaml.safe_load((ROOT / "config" / "deer_vla.yaml").read_text())["/**"].keys() == {NODE_NAME}


def test_launch_arguments_set_parameters_that_the_node_declares_and_with_their_type():
    declared = {declaration.name: type(declaration.default).__name__ for declaration in DECLARATIONS} | {
        "use_sim_time": "bool"
    }
    (table,) = [
        node.value
        for node in ast.walk(ast.parse(POLICY.read_text()))
        if isinstance(node, ast.Assign) and is_parameters(node)
    ]
    for value in table.values:
        parameter, kind = value.elts
        assert declared[parameter.value] == kind.id, parameter.value


def is_parameters(node):
    return getattr(node.targets[0], "id", "") == "PARAMETERS"


@pytest.mark.parametrize("namespace", ["/", "/left"])
def test_what_launch_gives_wins_over_the_parameter_file(namespace, tmp_path):
    """The command line is launch_ros's: first the file, then a file of its own with the node's full name."""
    given = tmp_path / "launch_params.yaml"
    full_name = f"{namespace.rstrip('/')}/{NODE_NAME}"
    given.write_text(
        yaml.safe_dump({full_name: {"ros__parameters": {"model.path": "/data/mine", "autostart": False}}})
    )
    files = ["--params-file", str(ROOT / "config" / "deer_vla.yaml"), "--params-file", str(given)]
    context = Context()
    rclpy.init(context=context)
    try:
        node = rclpy.create_node(
            "named_by_launch",
            context=context,
            cli_args=["--ros-args", "-r", f"__node:={NODE_NAME}", "-r", f"__ns:={namespace}", *files],
            automatically_declare_parameters_from_overrides=True,
        )
        assert node.get_fully_qualified_name() == full_name
        assert node.get_parameter("model.path").value == "/data/mine"
        assert node.get_parameter("autostart").value is False
        # This value comes from deer_vla.yaml, in any namespace.
        assert node.get_parameter("control.rate_hz").value == 10.0
        node.destroy_node()
    finally:
        rclpy.shutdown(context=context)


def test_a_replay_plays_on_the_recordings_clock_and_keeps_recorded_outputs_apart():
    """This holds for every topic of the node: with two publishers, old decisions would mix with new ones."""
    (outputs,) = (
        node.value.elts
        for node in ast.walk(ast.parse(REPLAY.read_text()))
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "OUTPUTS"
    )
    published = {topic.name.lstrip("/").replace("~", "deer_vla") for topic in interface.OUTPUTS}
    # `replay --follow` follows the parameter events that it finds.
    assert {each.value for each in outputs} == {*published, "parameter_events"}
    text = REPLAY.read_text()
    assert '"--clock"' in text and '"use_sim_time": "true"' in text and '"--use-sim-time"' in text


@FILES
def test_a_launch_file_loads(path):
    pytest.importorskip("launch_ros", reason=NO_LAUNCH)
    description = load(path).generate_launch_description()
    declared = {argument.name for argument in description.get_launch_arguments()}
    assert declared >= ARGUMENTS[path]


def test_the_policy_node_is_launched_with_only_the_parameters_given():
    pytest.importorskip("launch_ros", reason=NO_LAUNCH)
    from launch import LaunchContext

    context = LaunchContext()
    context.launch_configurations.update({name: "" for name in ARGUMENTS[POLICY]} | {"device": "cpu"})
    (node,) = load(POLICY)._start_node(context)
    assert node.node_executable == "deer_vla_node"


# --- With launch: the handling of errors.

RUN = """
import sys
from launch import LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch import LaunchDescription
given = [argument.split(":=", 1) for argument in sys.argv[2:]]
file = IncludeLaunchDescription(PythonLaunchDescriptionSource(sys.argv[1]), launch_arguments=given)
service = LaunchService(argv=sys.argv[2:])
service.include_launch_description(LaunchDescription([file]))
sys.exit(service.run())
"""
"""Does what `ros2 launch` does with a file and its arguments."""


@pytest.mark.parametrize(
    ("path", "given", "expected"),
    [
        (POLICY, ["params_file:=/nope/my.yaml"], "params_file /nope/my.yaml: no such file"),
        (REPLAY, ["bag:=/nope", "out:=NEW"], "/nope: no such recording"),
        (REPLAY, ["bag:=BAG", "out:=."], "it exists already"),
        (REPLAY, ["bag:=BAG", "out:=NEW", "params_file:=/nope/my.yaml"], "/nope/my.yaml: no such file"),
    ],
)
def test_nothing_is_started_or_made_when_an_argument_is_wrong(tmp_path, path, given, expected):
    pytest.importorskip("launch_ros", reason=NO_LAUNCH)
    places = {"NEW": tmp_path / "new", "BAG": ROOT / "test" / "data" / "table"}
    pairs = [each.split(":=") for each in given]
    given = [f"{name}:={places.get(value, value)}" for name, value in pairs]
    done = subprocess.run([sys.executable, "-c", RUN, str(path), *given], capture_output=True, text=True)
    output = done.stdout + done.stderr
    errors = [line for line in output.splitlines() if "[ERROR]" in line]
    assert done.returncode == 1
    assert len(errors) == 1 and expected in errors[0]
    assert "process started" not in output and not (tmp_path / "new").exists()


@pytest.mark.parametrize("is_shutdown", [False, True])
def test_a_process_of_the_demo_that_ends_by_itself_ends_the_launch_with_an_error(is_shutdown):
    pytest.importorskip("launch_ros", reason=NO_LAUNCH)
    event = SimpleNamespace(process_name="table_node-2", returncode=0)
    context = SimpleNamespace(is_shutdown=is_shutdown)
    if is_shutdown:
        assert load(DEMO)._on_exit(event, context) is None
    else:
        with pytest.raises(UserError, match="table_node-2 ended by itself"):
            load(DEMO)._on_exit(event, context)


def test_programs_that_launch_files_run_are_dependencies_of_the_package():
    package = ElementTree.parse(ROOT / "package.xml").getroot()
    needed = {child.text for child in package if child.tag in ("depend", "exec_depend")}
    assert needed >= {"launch", "launch_ros", "lifecycle_msgs", "ros2launch"}
    assert needed >= {"ros2bag", "rosbag2_storage_mcap", "rosbag2_storage_sqlite3"}
