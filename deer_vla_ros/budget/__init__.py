"""How much may a step cost? Cost tables, and the exit rule that a budget allows."""
