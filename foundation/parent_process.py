"""Processes that must not outlive the one that started them. Imports nothing heavy."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from foundation.errors import ExitCode

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with(parent: int) -> None:
    """Be killed when the process ``parent``, which started this one, is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before the line above
        os._exit(ExitCode.REQUEUE)
