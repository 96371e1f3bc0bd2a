"""What a model does with its channels: watched, traced, followed; and which are still alive."""
