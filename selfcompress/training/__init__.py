"""The trainer behind train.py: configuration, data, training loop, checkpoints and output."""
