"""The CALVIN benchmark: its chains of instructions, and its simulator as a process of its own."""
