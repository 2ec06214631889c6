"""One control step: preprocessing, the exit rule, the policy and the layers that it keeps in memory."""
