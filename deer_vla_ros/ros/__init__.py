"""The ROS 2 side of the package: the policy node, its watchdog, parameters, topics and messages."""
