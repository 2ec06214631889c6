"""The network: vision tower, resampler, decoder layers, action head and checkpoints."""
