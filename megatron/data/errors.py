"""Errors of data and tokenizer files, as a user sees them."""

from __future__ import annotations


class DataError(Exception):
    """Wrong or missing data or tokenizer files.

    The message says what is wrong and what to do; it is shown as it is, without a traceback, and the program exits with
    status 2.
    """


class ForeignIdError(DataError):
    """Token ids that the tokenizer does not have, met when training had begun already; wrong data all the same."""

    status = 2  # the exit status of the job
