"""A folder that many processes and hosts need, and that one of them makes while the others wait.

    .NAME.HOST.PID.XXXXXXXX.partial    being made
    .NAME.claim                        a link to the one that counts; making a link either succeeds or finds
                                       another's, also on NFS

Nobody depends on the claim being right: where two make the folder all the same (one took the other for
dead), the second to finish gives way.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from foundation.files import commit_folder
from foundation.partials import ABANDONED_SECONDS, PARTIAL_SUFFIX, last_change, partial_path, sweep_abandoned
from foundation.progress import say

POLL_SECONDS = 1.0
# After which a maker that has written nothing is not waited for any more: it may be of a host that is gone.
SILENT_SECONDS = 600.0


def make_once(final: Path, make: Callable[[Path], None]) -> None:
    """Have the folder `final`, whole: found, made here, or made by another process meanwhile.

    Args:
        final: the folder.
        make: fills an empty folder with what it contains.
    """
    claim = final.with_name(f".{final.name}.claim")
    waiting = False
    while not final.is_dir():
        sweep_abandoned(final.parent.glob(f".{glob.escape(final.name)}.*{PARTIAL_SUFFIX}"))
        working = partial_path(final)
        working.mkdir()
        try:
            claimed = _claim(claim, working)
            if claimed and not final.is_dir():  # it may have come since we looked
                _make(working, final, make)
        finally:
            shutil.rmtree(working, ignore_errors=True)
            if _holder(claim) == working:
                claim.unlink(missing_ok=True)
        if not claimed:
            if not waiting:
                say(f"Another process is making {final}; waiting for it")
            waiting = True
            time.sleep(POLL_SECONDS)


def touch(folder: Path) -> None:
    """Say that a folder that was made is in use, as far as that is allowed here."""
    with contextlib.suppress(OSError):
        os.utime(folder)


def sweep_unused(folders: Iterable[Path]) -> None:
    """Remove those of the folders, made by `make_once`, that were made or touched last more than a day ago.

    Whoever uses one touches it with each task. One who has been silent for longer all the same loses nothing
    on this host: files that are open or mapped stay readable until they are closed. (On NFS another host's
    would not, which is why the day.)
    """
    for folder in folders:
        with contextlib.suppress(OSError):  # another's, or gone meanwhile
            if time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
                # At once, since nobody is to find half of it; under a name that tells of whom it was.
                gone = partial_path(folder)
                os.rename(folder, gone)
                shutil.rmtree(gone)


def _make(working: Path, final: Path, make: Callable[[Path], None]) -> None:
    make(working)
    try:
        commit_folder(working, final)
    except FileExistsError:
        say(f"{final}: another process has finished it meanwhile")


def _claim(claim: Path, working: Path) -> bool:
    """Whether `claim` leads to `working` now; one of a maker that is gone or silent is removed meanwhile."""
    try:
        os.symlink(working.name, claim)
        return True
    except FileExistsError:
        holder = _holder(claim)
        if holder is not None and time.time() - last_change(holder) > SILENT_SECONDS:
            claim.unlink(missing_ok=True)
        return False


def _holder(claim: Path) -> Path | None:
    try:
        return claim.with_name(os.readlink(claim))
    except FileNotFoundError:
        return None
