"""Starts the policy node on a robot.

    ros2 launch deer_vla_ros deer_vla.launch.py params_file:=my_cell.yaml
    ros2 launch deer_vla_ros deer_vla.launch.py namespace:=left model_path:=/data/my_checkpoint device:=cuda

Topic names are relative: `namespace` moves all of them, and an including launch file renames single ones with
SetRemap. For an argument that is empty, params_file decides. If params_file is wrong, nothing is started:
launch says why and ends with exit status 1.
"""

from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import LifecycleNode
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare
from launch_ros.utilities import make_namespace_absolute, prefix_namespace

from deer_vla_ros.commands import launch_checks
from launch import LaunchContext, LaunchDescription

PARAMETERS = {
    "model_path": ("model.path", str),
    "device": ("model.device", str),
    "use_sim_time": ("use_sim_time", bool),
    "autostart": ("autostart", bool),
    "rehearsal": ("control.rehearsal", bool),
}
"""The node's parameter and its type, by launch argument."""
SIGTERM_S, SIGKILL_S = "10", "5"
"""Seconds that the node has after Ctrl-C, and then after SIGTERM. It needs 2 s, or more on a busy machine."""


def generate_launch_description() -> LaunchDescription:
    default_params = PathJoinSubstitution([FindPackageShare("deer_vla_ros"), "config", "deer_vla.yaml"])
    on_off = ["", "true", "false"]
    return LaunchDescription(
        [
            DeclareLaunchArgument(
                "params_file", default_value=default_params, description="Parameters of the node (YAML)."
            ),
            DeclareLaunchArgument(
                "model_path", default_value="", description="Checkpoint folder; overrides params_file."
            ),
            DeclareLaunchArgument(
                "namespace", default_value="", description="Namespace of the node and of all its topics."
            ),
            DeclareLaunchArgument(
                "device",
                default_value="",
                choices=["", "auto", "cpu", "cuda"],
                description="Where the network runs; overrides params_file.",
            ),
            DeclareLaunchArgument(
                "use_sim_time", default_value="", choices=on_off, description="Take time from /clock."
            ),
            DeclareLaunchArgument(
                "autostart",
                default_value="",
                choices=on_off,
                description="false: wait for a lifecycle manager; overrides params_file.",
            ),
            DeclareLaunchArgument(
                "rehearsal",
                default_value="",
                choices=on_off,
                description="true: a recording is played, no arm is there; overrides params_file.",
            ),
            OpaqueFunction(function=_check),
            OpaqueFunction(function=_start_node),
        ]
    )


def _check(context: LaunchContext) -> None:
    """Raises UserError, which ends the launch, if the parameter file is wrong or has nothing for the node."""
    including = context.launch_configurations.get("ros_namespace")  # of a launch file that includes this one
    namespace = prefix_namespace(including, LaunchConfiguration("namespace").perform(context))
    node = f"{make_namespace_absolute(namespace).rstrip('/')}/deer_vla"
    launch_checks.check(params=LaunchConfiguration("params_file").perform(context), node=node)


def _start_node(context: LaunchContext) -> list[LifecycleNode]:
    given = {
        parameter: ParameterValue(LaunchConfiguration(argument), value_type=kind)
        for argument, (parameter, kind) in PARAMETERS.items()
        if LaunchConfiguration(argument).perform(context)
    }
    # A launch file that includes this one can react to the transitions of a LifecycleNode, or cause them. The
    # action's own `autostart` stays off: the node's parameter of that name does the same, and a second
    # transition would be refused.
    node = LifecycleNode(
        package="deer_vla_ros",
        executable="deer_vla_node",
        name="deer_vla",
        namespace=LaunchConfiguration("namespace"),
        parameters=[LaunchConfiguration("params_file"), *([given] if given else [])],
        output="screen",
        sigterm_timeout=SIGTERM_S,
        sigkill_timeout=SIGKILL_S,
    )
    return [node]
