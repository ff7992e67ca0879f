"""Transformers' own adapter methods, where they ask for a newer PEFT than is released."""

from contextlib import contextmanager

import pytest


@contextmanager
def transformers_takes_this_peft():
    """Skip a test where Transformers' own adapter methods ask for a newer PEFT than is installed."""
    try:
        yield
    except ValueError as error:
        if "version of PEFT you are using is not compatible" not in str(error):
            raise
        pytest.skip(str(error))
