"""Processes of the small cluster: started so that they cannot be left behind, found, killed, waited for."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """In a child, before it starts its program: a killed test run leaves no daemon behind.

    As root it also goes before the processes that train: a daemon that answers late because the cores are
    busy is taken for dead, and what Slurm told it is told again, which may hit the job's next start.
    """
    if os.geteuid() == 0:
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """All processes below ``pid``."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [inner for child in map(int, children) for inner in (child, *descendants(child))]


def kill(pid: int) -> None:
    """SIGKILL, if it still lives."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_until(happened: Callable[[], object], seconds: float, what: str) -> float:
    """Wait for something; the seconds that it took. AssertionError where it does not happen."""
    started = time.monotonic()
    while not happened():
        assert time.monotonic() - started < seconds, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)
    return time.monotonic() - started
