"""Error that ends training with a message for the user."""

from __future__ import annotations


class TrainingError(Exception):
    """Training cannot continue; the message states the reason and what to do. Programs print it and exit with status 1."""
