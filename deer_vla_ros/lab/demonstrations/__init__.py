"""Demonstrations of the scripted expert on the table, as training data."""
