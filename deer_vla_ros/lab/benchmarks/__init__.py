"""Measurements: whether budgets are kept, what depth buys, how fast the node and the network are."""
