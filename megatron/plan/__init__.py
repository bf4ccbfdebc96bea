"""A run on paper: stages, sizes, memory and time."""
