"""What the commands are made of: options, datasets, the training loop, reports."""
