"""Command lines: train, eval, generate, prepare, compare. Each parses its arguments and calls the library."""
