"""A recording played into the policy node in real time, and what it decides recorded: a whole installation's rehearsal.

    ros2 launch deer_vla_ros replay.launch.py bag:=/data/monday out:=/data/monday_replayed params_file:=my_cell.yaml
    python -m deer_vla_ros replay /data/monday_replayed --params my_cell.yaml --follow --out out/replay

Time is the recording's (`ros2 bag play --clock`); the node takes part in no motion unless an arm listens: leave the arm's driver off. Everything
that was played and decided lies in `out`, so that `replay --follow` can do it once more, in lock step. When the player is through, all ends.
"""

from launch.actions import (
    DeclareLaunchArgument,
    ExecuteProcess,
    IncludeLaunchDescription,
    RegisterEventHandler,
    Shutdown,
    TimerAction,
)
from launch.event_handlers import OnProcessExit
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution, ThisLaunchFileDir
from launch_ros.substitutions import FindPackageShare

from launch import LaunchDescription

OUTPUTS = (
    "target_pose",
    "target_twist",
    "gripper_command",
    "deer_vla/step",
    "deer_vla/budget",
    "diagnostics",
    "parameter_events",
)
"""What the node publishes: recorded ones are played under other names."""


def generate_launch_description() -> LaunchDescription:
    default_params = PathJoinSubstitution([FindPackageShare("deer_vla_ros"), "config", "deer_vla.yaml"])
    policy = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(PathJoinSubstitution([ThisLaunchFileDir(), "deer_vla.launch.py"])),
        launch_arguments={"params_file": LaunchConfiguration("params_file"), "use_sim_time": "true"}.items(),
    )
    recorder = ExecuteProcess(
        cmd=["ros2", "bag", "record", "--all", "--use-sim-time", "--storage", "mcap", "--output", LaunchConfiguration("out")],
        output="screen",
    )
    remaps = ["--remap", *(f"{topic}:=recorded/{topic}" for topic in OUTPUTS)]
    player = ExecuteProcess(
        cmd=[
            "ros2",
            "bag",
            "play",
            LaunchConfiguration("bag"),
            "--clock",
            "100",
            "--delay",
            "3",
            "--rate",
            LaunchConfiguration("rate"),
            *remaps,
        ],
        output="screen",
    )
    return LaunchDescription(
        [
            DeclareLaunchArgument("bag", description="The recording to play."),
            DeclareLaunchArgument("out", description="Where the new recording goes; must not exist."),
            DeclareLaunchArgument("rate", default_value="1.0", description="Speed of the player."),
            DeclareLaunchArgument(
                "wait", default_value="15.0", description="Seconds until it plays: the node loads and warms up."
            ),
            DeclareLaunchArgument("params_file", default_value=default_params, description="Parameters of the node (YAML)."),
            policy,
            recorder,
            TimerAction(period=LaunchConfiguration("wait"), actions=[player]),
            RegisterEventHandler(OnProcessExit(target_action=player, on_exit=[Shutdown(reason="the recording is over")])),
        ]
    )
