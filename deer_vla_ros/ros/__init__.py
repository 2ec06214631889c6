"""How does the package meet the robot? The only room that imports rclpy."""
