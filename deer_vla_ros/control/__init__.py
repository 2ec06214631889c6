"""Control of the arm: input gate, motion from an action, guard, holds and the controller. Without ROS."""
