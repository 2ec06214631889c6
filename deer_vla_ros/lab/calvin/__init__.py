"""The benchmark CALVIN: its chains of instructions, their wordings, and its simulator as a process."""
