"""Names of files and folders that are being made, and which of them nobody works on any more.

Something under way lies beside its final place and is called `.NAME.HOST.PID.XXXXXXXX.partial`: no other's
name, and one that tells whose it is. A process that is killed leaves its partials behind. On their own host
they are known by their process being gone. Whether a process of another host lives cannot be asked on a
shared file system (its locks are not always shared, too), so there a partial counts as left behind once
nothing in it has changed for long.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PARTIAL_SUFFIX = ".partial"
# Of one whose process cannot be asked for. Whatever we make writes at least every few minutes.
ABANDONED_SECONDS = 24 * 3600.0
_OWNER = re.compile(r"\.(\d+)\.[0-9a-f]{8}" + re.escape(PARTIAL_SUFFIX))


def partial_path(final: str | Path) -> Path:
    """A new name beside `final` for what will become it; nothing is created."""
    final = Path(final)
    owner = f"{platform.node()}.{os.getpid()}"
    return final.with_name(f".{final.name}.{owner}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}")


def final_of(path: str) -> str:
    """The final path of one that lies in a partial of this process, for messages; any other as it is."""
    owner = re.escape(f".{platform.node()}.{os.getpid()}.")
    return re.sub(rf"(^|/)\.([^/]+){owner}[0-9a-f]{{8}}{re.escape(PARTIAL_SUFFIX)}.*", r"\1\2", path)


def sweep_abandoned(paths: Iterable[Path]) -> None:
    """Remove those of the partials that nobody works on any more; the others stay as they are."""
    for path in paths:
        if not _abandoned(path):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def last_change(path: Path) -> float:
    """When a file, or anything in a folder, last changed (seconds since 1970); 0 where it has just gone.

    What goes from the folder meanwhile is passed over: its owner is at work.
    """
    inside = (Path(top, name) for top, folders, files in os.walk(path) for name in (*folders, *files))
    newest = 0.0
    for place in (path, *inside):
        with suppress(FileNotFoundError):
            newest = max(newest, place.stat().st_mtime)
    return newest


def owner_has_ended(path: Path) -> bool:
    """Whether a partial is of a process of this host that lives no more; False where that cannot be asked."""
    owner = _OWNER.search(path.name)
    here = owner is not None and path.name[: owner.start()].endswith(f".{platform.node()}")
    return owner is not None and here and not _alive(int(owner[1]))


def _abandoned(path: Path) -> bool:
    if owner_has_ended(path):
        return True
    return time.time() - last_change(path) > ABANDONED_SECONDS


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
