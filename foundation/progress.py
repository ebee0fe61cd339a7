"""What a person sees while something runs: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")
PLAIN_INTERVAL = 10.0  # seconds between plain lines: a log that is followed, not flooded


def say(message: str) -> None:
    """Print one line to the user, at once."""
    print(message, flush=True)


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items of ``iterable``, showing how far it is.

    Args:
        iterable: what to go through.
        description: what is being done ("Encoding 128x128").
        total: the number of items, where ``iterable`` has no length.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if sys.stdout.isatty():
        yield from _bar(iterable, description, total)
    else:
        yield from _plain_lines(iterable, description, total)


def _bar(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        yield from progress.track(iterable, total=total, description=description)


def _plain_lines(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    started = last = time.monotonic()
    for done, item in enumerate(iterable, start=1):
        yield item
        now = time.monotonic()
        if now - last >= PLAIN_INTERVAL:
            last = now
            of = f"/{total}" if total else ""
            say(f"{description}: {done}{of}, {done / (now - started):.3g}/s")
