"""Predict a run from its configuration: stages, sizes, memory and time."""
