"""The process of a gripper controller for the policy node: `python gripper_server.py TYPE ACTION MANNER`.

It prints every goal. MANNER is "hesitates": it refuses goals for three seconds, and accepts the next one only
after four seconds; "obeys": it reaches every goal; or "aborts": it accepts every goal and reaches none.
"""

import sys
import time

import rclpy
from control_msgs import action
from rclpy.action import ActionServer, GoalResponse


def main(interface: str, name: str, manner: str) -> None:
    goal_type = getattr(action, interface)
    rclpy.init()
    node = rclpy.create_node("gripper_controller")
    begun: list[float] = []
    accepted: list = []

    def on_goal(goal) -> GoalResponse:
        begun.append(time.monotonic())
        is_refused = manner == "hesitates" and begun[-1] - begun[0] < 3.0
        command = goal.command
        told = (
            [command.position, command.max_effort]
            if interface == "GripperCommand"
            else [list(command.name), *command.position]
        )
        print("refused" if is_refused else "accepted", told, flush=True)
        if is_refused:
            return GoalResponse.REJECT
        if manner == "hesitates" and not accepted:
            time.sleep(4.0)
        accepted.append(goal)
        return GoalResponse.ACCEPT

    def on_accepted(handle):
        if manner == "aborts":
            handle.abort()
            return goal_type.Result()
        handle.succeed()
        return goal_type.Result(reached_goal=True)

    ActionServer(node, goal_type, name, on_accepted, goal_callback=on_goal)
    rclpy.spin(node)


if __name__ == "__main__":
    main(*sys.argv[1:])
