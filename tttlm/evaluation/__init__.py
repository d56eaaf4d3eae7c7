"""What a trained model is worth: loss, loss by position, recall, and their plots."""
