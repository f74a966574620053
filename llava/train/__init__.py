"""Training: datasets to batches, batches to a better model."""
