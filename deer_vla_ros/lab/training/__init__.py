"""How are the weights made? Losses, parameter groups, augmentation."""
