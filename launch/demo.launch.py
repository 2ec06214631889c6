"""Starts the simulated table and the policy node with the embedded checkpoint. It needs no robot.

    ros2 launch deer_vla_ros demo.launch.py seed:=3
    ros2 topic pub --times 5 /instruction std_msgs/msg/String "{data: lift the red block}"

The arm holds until an instruction comes. If one of the two processes ends by itself, launch ends the other
one, says which one has ended, and has exit status 1.
"""


from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription, RegisterEventHandler
from launch.event_handlers import OnProcessExit
from launch.events.process import ProcessExited
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution, ThisLaunchFileDir
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from deer_vla_ros.commands import launch_checks
from deer_vla_ros.commands.arguments import TABLE_GUARD
from deer_vla_ros.errors import UserError
from launch import LaunchContext, LaunchDescription


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
            policy,  # first, because it checks the parameters before the table starts
            table,
        ]
    )


def _on_exit(event: ProcessExited, context: LaunchContext) -> None:
    """Raises UserError, which ends the launch, if a process has ended by itself."""
    if reason := launch_checks.early_end(event.process_name, event.returncode, context.is_shutdown):
        raise UserError(reason)
