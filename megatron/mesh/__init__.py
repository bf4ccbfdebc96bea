"""Place every rank in a grid of parallel axes, and open the process groups of its axes."""
