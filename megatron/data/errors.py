"""Errors of data and tokenizer files, whose messages are shown to the user."""

from __future__ import annotations


class DataError(Exception):
    """Wrong or missing data or tokenizer files.

    The message states what is wrong and what to do. It is shown without a traceback, and the program exits with status 2.
    """


class ForeignIdError(DataError):
    """Token ids outside the vocabulary, found after training has begun; the exit status is 2, as for other wrong data."""

    status = 2  # exit status of the job
