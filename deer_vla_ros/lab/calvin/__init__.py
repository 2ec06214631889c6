"""CALVIN as a benchmark: its simulator as a process of its own, and the client of that process."""
