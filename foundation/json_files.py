"""JSON files that our commands have written: a damaged one is told by name, with how to mend it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from foundation.errors import DataError


def read_json(path: Path, mend: str, *keys: str) -> dict[str, Any]:
    """The object in a local file; see `parse_json`. Raises FileNotFoundError where there is none."""
    return parse_json(path.read_bytes(), path, mend, *keys)


def parse_json(text: str | bytes, where: str | Path, mend: str, *keys: str) -> dict[str, Any]:
    """The object in a file's content.

    Args:
        text: the content.
        where: its path or address, for the message.
        mend: what a user does to get a whole one, for the message.
        keys: what the object must hold.

    Raises:
        DataError: no JSON, no object, or one without these keys.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"no JSON: {error.msg}, line {error.lineno}, column {error.colno}"
    except UnicodeDecodeError as error:
        problem = f"no text: byte {error.start} is not UTF-8"
    except RecursionError:
        problem = "no JSON of ours: nested too deeply"
    else:
        absent = [key for key in keys if key not in values] if isinstance(values, dict) else []
        if isinstance(values, dict) and not absent:
            return values
        problem = f"without {', '.join(absent)}" if absent else "no JSON object"
    raise DataError(f"{where} is damaged ({problem}): {mend}") from None
