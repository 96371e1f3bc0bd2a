"""The trainer behind train.py: configuration, data, loop, checkpoints and what one sees of them."""
