"""The trainer: optimiser, sharding, the train step, the loop, checkpoints and metrics."""
