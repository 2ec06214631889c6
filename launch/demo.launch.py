"""The simulated table and the policy node, with the embedded checkpoint: no robot needed.

    ros2 launch deer_vla_ros demo.launch.py seed:=3
    ros2 topic pub --once /instruction std_msgs/msg/String "{data: lift the red block}"

The arm holds until an instruction comes. When one of the two processes ends, the other one is ended too.
"""

from pathlib import Path

from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription, RegisterEventHandler, Shutdown
from launch.event_handlers import OnProcessExit
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution, ThisLaunchFileDir
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

import deer_vla_ros
from launch import LaunchDescription

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
    )
    policy = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(PathJoinSubstitution([ThisLaunchFileDir(), "deer_vla.launch.py"])),
        launch_arguments={"namespace": namespace, "params_file": str(TABLE_GUARD)}.items(),
    )
    return LaunchDescription(
        [
            DeclareLaunchArgument("seed", default_value="0", description="Arrangement of the table."),
            DeclareLaunchArgument("namespace", default_value="", description="Namespace of both nodes and of all their topics."),
            RegisterEventHandler(OnProcessExit(on_exit=[Shutdown(reason="one half of the demo has ended")])),
            table,
            policy,
        ]
    )
