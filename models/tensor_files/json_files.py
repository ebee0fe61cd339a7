"""JSON objects in files that come from anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file; ``what`` it should be, for messages.

    Raises:
        ValueError: no such file, not readable as JSON, or no object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; expected {what}") from error
    # Python's reader goes down into nested values by recursion.
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); expected {what}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds a {type(data).__name__}; expected {what}, a JSON object")
    return data
