"""Plays a recording to the policy node in real time, and records its decisions (a rehearsal).

    ros2 launch deer_vla_ros replay.launch.py bag:=/data/monday out:=/data/monday_replayed \\
        params_file:=my_cell.yaml
    python -m deer_vla_ros replay /data/monday_replayed --params my_cell.yaml --follow --out out/replay

The time is that of the recording (`ros2 bag play --clock`). The node publishes real commands, so do not start
the arm's driver. All inputs and decisions are recorded in `out`, so that `replay --follow` can repeat them in
lock step.

If `bag`, `out` or `params_file` is wrong, nothing is started. The recording plays as soon as the node is
active. When the player has finished, launch ends all processes. If the player, the recorder or the node fails
or ends earlier, launch says which one, and has exit status 1.
"""

import asyncio

from launch.actions import (
    DeclareLaunchArgument,
    ExecuteProcess,
    IncludeLaunchDescription,
    OpaqueCoroutine,
    OpaqueFunction,
    RegisterEventHandler,
    Shutdown,
)
from launch.event_handlers import OnProcessExit
from launch.events import IncludeLaunchDescription as Include
from launch.events.process import ProcessExited
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution, ThisLaunchFileDir
from launch_ros.ros_adapters import get_ros_node
from launch_ros.substitutions import FindPackageShare
from lifecycle_msgs.msg import State
from lifecycle_msgs.srv import GetState

from deer_vla_ros.commands import launch_checks
from deer_vla_ros.errors import UserError
from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity

OUTPUTS = (
    "target_pose",
    "target_twist",
    "gripper_command",
    "deer_vla/step",
    "deer_vla/budget",
    "deer_vla/overlay",
    "diagnostics",
    "parameter_events",
)
"""The topics that the node publishes. Recorded messages of these topics are played under other names."""
ASK_S = 0.5
"""Seconds between two requests for the state of the node."""


def generate_launch_description() -> LaunchDescription:
    default_params = PathJoinSubstitution([FindPackageShare("deer_vla_ros"), "config", "deer_vla.yaml"])
    policy = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(PathJoinSubstitution([ThisLaunchFileDir(), "deer_vla.launch.py"])),
        launch_arguments={
            "params_file": LaunchConfiguration("params_file"),
            "use_sim_time": "true",
            "rehearsal": "true",
        }.items(),
    )
    recorder = ExecuteProcess(
        cmd=[
            "ros2",
            "bag",
            "record",
            "--all",
            "--use-sim-time",
            "--storage",
            "mcap",
            "--output",
            LaunchConfiguration("out"),
        ],
        name="recorder",
        output="screen",
        sigterm_timeout="30",  # it still has to write messages from its memory
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
        name="player",
        output="screen",
    )

    def on_exit(event: ProcessExited, context: LaunchContext) -> list[LaunchDescriptionEntity]:
        """Ends the launch: in order after the player has finished, with UserError if another process ends."""
        ended = (event.process_name, event.returncode, context.is_shutdown)
        if event.action is player and event.returncode == 0:
            return [Shutdown(reason="the recording is over")]
        if event.action is recorder:
            reason = launch_checks.recorder_end(*ended, LaunchConfiguration("out").perform(context))
        else:
            reason = launch_checks.early_end(*ended)
        if reason:
            raise UserError(reason)
        return []

    async def play(context: LaunchContext) -> None:
        """Starts the player when the node is active."""
        if await _is_active(context, float(LaunchConfiguration("wait").perform(context))):
            await context.emit_event(Include(LaunchDescription([player])))

    return LaunchDescription(
        [
            DeclareLaunchArgument("bag", description="The recording to play."),
            DeclareLaunchArgument("out", description="Where the new recording goes; must not exist."),
            DeclareLaunchArgument("rate", default_value="1.0", description="Speed of the player."),
            DeclareLaunchArgument(
                "wait", default_value="120.0", description="Seconds until the node must be active."
            ),
            DeclareLaunchArgument(
                "params_file", default_value=default_params, description="Parameters of the node (YAML)."
            ),
            OpaqueFunction(function=_check),
            RegisterEventHandler(OnProcessExit(on_exit=on_exit)),
            policy,  # before the recorder: it checks its parameters
            recorder,
            OpaqueCoroutine(coroutine=play),
        ]
    )


def _check(context: LaunchContext) -> None:
    """Raises UserError, which ends the launch, if the recording or the place for the new one is wrong."""
    bag, out = (LaunchConfiguration(name).perform(context) for name in ("bag", "out"))
    launch_checks.check(bag=bag, out=out)


async def _is_active(context: LaunchContext, wait_s: float) -> bool:
    """True as soon as the node is active, False if the launch ends before. Raises UserError after wait_s
    seconds.

    It requests the state, because the message about a transition is lost if DDS has not connected the two
    nodes yet.
    """
    client = get_ros_node(context).create_client(GetState, "/deer_vla/get_state")
    loop = asyncio.get_running_loop()
    until = loop.time() + wait_s
    try:
        while loop.time() < until:
            answer = client.call_async(GetState.Request()) if client.service_is_ready() else None
            await asyncio.sleep(ASK_S)
            if answer and answer.done() and answer.result().current_state.id == State.PRIMARY_STATE_ACTIVE:
                return True
    # The launch ends. If this error went on, launch would not wait for its processes.
    except asyncio.CancelledError:
        return False
    what = f"deer_vla is not active after {wait_s:g} s"
    raise UserError(f"{what}: see its output above, or give more with wait:=")
