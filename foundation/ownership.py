"""Whose an output folder is, by one rule for all rooms.

A folder belongs to the recipe that made it. A recipe that names another one's folder, or one that holds
something else, is itself the mistake (exit code 78), and what is in the folder stays. A damaged file in a
recipe's own folder is a mistake of the data (exit code 65).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foundation.errors import RecipeError
from foundation.recipes import differing_keys

KEYS_SHOWN = 6


class FolderTaken(RecipeError):
    """The folder that a recipe wants to write to is another recipe's, or something else's."""


def taken_by_another(
    folder: str | Path, there: dict[str, Any], here: dict[str, Any], advice: str
) -> FolderTaken | None:
    """What to raise where the recipe that made a folder is not the one that wants it now; None where it is.

    Args:
        folder: whose it is is asked.
        there: values of the recipe that made it, without keys that may differ.
        here: all values of the one that wants it, as far.
        advice: what to do about it.
    """
    lines = differing_keys(there, here)
    if not lines:
        return None
    if 2 * len(there.keys() & here.keys()) < len(there):
        keys = ", ".join(sorted(there)[:KEYS_SHOWN]) + (", ..." if len(there) > KEYS_SHOWN else "")
        return FolderTaken(f"{folder} was made by a recipe of another kind (its keys: {keys}). {advice}")
    differences = "\n".join(f"  {line}" for line in lines)
    return FolderTaken(
        f"{folder} belongs to another recipe. It differs in (there -> here):\n{differences}\n{advice}"
    )
