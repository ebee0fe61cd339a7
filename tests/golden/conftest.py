"""The golden values were computed on one thread."""

import pytest


@pytest.fixture(autouse=True)
def as_the_golden_values(one_thread: None) -> None:
    """Every test here computes as they were computed."""
