"""Comparison of the network and its training with tensors recorded from the reference implementation."""
