"""Folders in TMPDIR for copies that several runs of a user may share."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from foundation.errors import DataError


def own_cache(purpose: str) -> Path:
    """The user's folder for a purpose; made, and refused where it is another user's.

    Raises:
        DataError: it is.
    """
    folder = Path(tempfile.gettempdir()) / f"bitdance-{purpose}-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():
        raise DataError(f"{folder} belongs to another user: set TMPDIR to a folder of your own")
    return folder
