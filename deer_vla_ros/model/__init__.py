"""What is the network? Vision tower, resampler, decoder layers, action head, checkpoints."""
