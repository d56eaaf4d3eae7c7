"""Evaluation of trained models: loss, loss by position, recall, and plots."""
