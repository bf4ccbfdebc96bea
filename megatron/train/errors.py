"""Failures of a run that a person must act on."""

from __future__ import annotations


class TrainingError(Exception):
    """Training cannot go on; the message says why and what to do. Programs print it and exit with status 1."""
