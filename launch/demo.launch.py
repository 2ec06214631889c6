"""The simulated table and the policy node, with the embedded checkpoint: no robot needed.

    ros2 launch deer_vla_ros demo.launch.py seed:=3
    ros2 topic pub --times 5 /instruction std_msgs/msg/String "{data: lift the red block}"

The arm holds until an instruction comes. When one of the two processes ends by itself, the other one is ended
too. Launch then names the one that ended, and its exit status is 1.
"""

from pathlib import Path

from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription, RegisterEventHandler
from launch.event_handlers import OnProcessExit
from launch.events.process import ProcessExited
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution, ThisLaunchFileDir
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

import deer_vla_ros
from deer_vla_ros.commands import launch_checks
from deer_vla_ros.errors import UserError
from launch import LaunchContext, LaunchDescription

TABLE_GUARD = Path(deer_vla_ros.__file__).parent / "sim" / "assets" / "guard.yaml"
"""The policy node's limits on this table."""


def generate_launch_description() -> LaunchDescription:
    namespace = LaunchConfiguration("namespace")
    table = Node(
        package="deer_vla_ros",
        executable="table_node",
        name="table",
        namespace=namespace,
        parameters=[{"seed": ParameterValue(LaunchConfiguration("seed"), value_type=int)}],
        output="screen",
        sigterm_timeout="10",  # after Ctrl-C, on a busy machine
        sigkill_timeout="5",
    )
    policy = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(PathJoinSubstitution([ThisLaunchFileDir(), "deer_vla.launch.py"])),
        launch_arguments={"namespace": namespace, "params_file": str(TABLE_GUARD)}.items(),
    )
    return LaunchDescription(
        [
            DeclareLaunchArgument("seed", default_value="0", description="Arrangement of the table."),
            DeclareLaunchArgument(
                "namespace", default_value="", description="Namespace of both nodes and of all their topics."
            ),
            RegisterEventHandler(OnProcessExit(on_exit=_on_exit)),
            policy,  # first: it checks its parameters, and the table must not start when they are wrong
            table,
        ]
    )


def _on_exit(event: ProcessExited, context: LaunchContext) -> None:
    """UserError, which ends the launch, where a process ends that nobody asked to."""
    if reason := launch_checks.early_end(event.process_name, event.returncode, context.is_shutdown):
        raise UserError(reason)
