"""The life of a training run: its directory, checkpoints, data-set log-probs, and its plan."""
