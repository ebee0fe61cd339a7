"""What tests of several rooms share."""

import os
from collections.abc import Iterator

import pytest

# Before torch is loaded: a process that is forked from one with threads of OpenMP hangs at its first product.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes on one thread; long sums depend on it in their last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
