"""The compute budget: what a step costs, and the exit rule that a budget allows."""
