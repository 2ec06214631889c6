"""LeRobotDataset folders: reading them as episodes of training data, and writing them."""
