"""How does one control step run? Preprocessing, the exit rule, the policy's state."""
