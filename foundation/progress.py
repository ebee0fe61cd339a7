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


def track(iterable: Iterable[T], description: str, total: int | None = None, done: int = 0) -> Iterator[T]:
    """Yield the items of ``iterable``, showing how far it is.

    Args:
        iterable: what to go through.
        description: what is being done ("Encoding 128x128").
        total: the number of items and of those that were done before, where ``iterable`` has no length.
        done: items that an earlier start has done; ``iterable`` holds the others.
    """
    if total is None and isinstance(iterable, Sized):
        total = done + len(iterable)
    show = _bar if sys.stdout.isatty() else _plain_lines
    yield from show(iterable, description, total, done)


def _bar(iterable: Iterable[T], description: str, total: int | None, done: int) -> Iterator[T]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        # Not `progress.track`, which at its end forgets what it was told to be completed before.
        task = progress.add_task(description, total=total, completed=done)
        for item in iterable:
            yield item
            progress.advance(task)


def _plain_lines(iterable: Iterable[T], description: str, total: int | None, done: int) -> Iterator[T]:
    started = last = time.monotonic()
    for new, item in enumerate(iterable, start=1):
        yield item
        now = time.monotonic()
        if now - last >= PLAIN_INTERVAL:
            last = now
            of = f"/{total}" if total else ""
            say(f"{description}: {done + new}{of}, {new / (now - started):.3g}/s")
