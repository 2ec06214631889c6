"""Scores of policies on chains of instructions on the simulated table."""
