"""What a trained model is worth: its scores on known tasks."""
