"""Namespaces, cables and the bridge that the nodes of the small cluster hang on; needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

PREFIX = "bdt"  # of bridges and namespaces, with the pid of the test run behind it
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])


def may_make_namespaces() -> bool:
    """Whether this user may give a node its own network, hostname and processes (some roots may not)."""
    if os.geteuid() != 0 or shutil.which("ip", path=PATH) is None:
        return False
    return subprocess.run(["unshare", "-n", "-u", "-m", "-p", "-f", "true"], check=False).returncode == 0


def ip(*arguments: str) -> None:
    """One command of iproute2."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def remove_network(tag: str) -> None:
    """Namespaces, cables and bridge of one cluster."""
    for path in Path("/run/netns").glob(f"{tag}n*"):
        subprocess.run(["ip", "netns", "del", path.name], check=False)
    for path in Path("/sys/class/net").glob(f"{tag}*"):
        subprocess.run(["ip", "link", "del", path.name], check=False, capture_output=True)


def remove_leftovers() -> None:
    """What killed test runs have left: networks whose number is that of no living process."""
    names = [p.name for where in ("/run/netns", "/sys/class/net") for p in Path(where).glob(f"{PREFIX}*")]
    for tag in {name.partition("n")[0] for name in names}:
        if not Path(f"/proc/{tag.removeprefix(PREFIX)}").exists():
            remove_network(tag)
