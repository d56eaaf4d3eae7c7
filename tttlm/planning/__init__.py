"""Plans: compiles the training step for devices that this machine does not have, and reports its memory."""
