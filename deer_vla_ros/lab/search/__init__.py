"""The search for thresholds in closed loop."""
