"""A table, an arm and two cameras in MuJoCo, behind the same topics as a robot."""
