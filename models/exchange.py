"""For a while, another attribute in a module or class of a library that offers no other way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def exchanged(owner: Any, **attributes: Any) -> Iterator[None]:
    """In the block `owner` has these `attributes`; after it, its own again, whatever was set meanwhile.

    Raises:
        AttributeError: it has none of such a name, so nothing that reads it would notice.
    """
    own = {name: getattr(owner, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in own.items():
            setattr(owner, name, value)
