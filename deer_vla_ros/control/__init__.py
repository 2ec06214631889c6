"""What does the arm get told, and when nothing? Input gate, action to target, guard, hold, controller. No ROS
in here."""
