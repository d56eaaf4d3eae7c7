"""What a trained model is worth: held-out loss by streaming, samples, plots."""
