"""The demo: table and node in closed loop, what happened, and a picture of it."""
