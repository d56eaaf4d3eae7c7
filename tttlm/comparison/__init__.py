"""Comparison of models trained on the same batches: matched in cost, trained, scored, and reported with errors."""
