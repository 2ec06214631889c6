"""A gripper controller as the policy node meets one: `python gripper_server.py TYPE ACTION`; refuses the first goal, prints all."""

import sys

import rclpy
from control_msgs import action
from rclpy.action import ActionServer, GoalResponse


def main(interface: str, name: str) -> None:
    goal_type = getattr(action, interface)
    rclpy.init()
    node = rclpy.create_node("gripper_controller")
    seen: list = []

    def on_goal(goal) -> GoalResponse:
        seen.append(goal)
        command = goal.command
        told = (
            [command.position, command.max_effort] if interface == "GripperCommand" else [list(command.name), *command.position]
        )
        print("refused" if len(seen) == 1 else "accepted", told, flush=True)
        return GoalResponse.REJECT if len(seen) == 1 else GoalResponse.ACCEPT

    def on_accepted(handle):
        handle.succeed()
        return goal_type.Result(reached_goal=True)

    ActionServer(node, goal_type, name, on_accepted, goal_callback=on_goal)
    rclpy.spin(node)


if __name__ == "__main__":
    main(*sys.argv[1:])
