"""A trained model at work: opened from a checkpoint, predicting, generating."""
