"""This folder attacks the running policy node with random faults and judges it from outside."""
