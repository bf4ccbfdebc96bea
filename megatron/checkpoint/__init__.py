"""Weights and training state on disk, in a form that any parallel layout loads."""
