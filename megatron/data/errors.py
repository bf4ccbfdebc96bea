"""Errors of data and tokenizer files, whose messages are shown to the user."""

from __future__ import annotations


class DataError(Exception):
    """Wrong or missing data or tokenizer files.

    The message says what is wrong and what to do; it is shown as it is, without a traceback, and the program exits with
    status 2.
    """


class ForeignIdError(DataError):
    """Token ids outside the vocabulary, found after training has begun; exit status 2 as for other wrong data."""

    status = 2  # the exit status of the job
