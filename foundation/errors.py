"""Errors for people: what a user can get wrong ends in one message and an exit code, never in a traceback."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum


class ExitCode(IntEnum):
    """What the end of a job means to the scheduler that started it (the numbers are those of sysexits.h)."""

    DONE = 0
    DATA = 65  # the data are bad: a rerun will not help
    BUG = 70  # our fault
    REQUEUE = 75  # saved, wants to go on
    RECIPE = 78  # the recipe is bad


class UserError(Exception):
    """A user's mistake; ``str(error)`` is the whole message: what was found, where, what to do."""

    exit_code: ExitCode = ExitCode.DATA


class RecipeError(UserError):
    """A recipe, or a command line, that cannot be carried out."""

    exit_code = ExitCode.RECIPE


class DataError(UserError):
    """Input files that are missing, broken, or not what the recipe expects."""

    exit_code = ExitCode.DATA


@dataclass
class Problems:
    """Collects everything that is wrong, so that a user mends it in one go.

    >>> problems = Problems()
    >>> problems.add("pt.yaml:3", "steps is -1", "give a positive number")
    >>> problems.raise_if_any(RecipeError, "The recipe cannot be used")  # doctest: +SKIP
    """

    lines: list[str] = field(default_factory=list)

    def add(self, where: str, problem: str, fix: str = "") -> None:
        """Note one problem, once, at ``where`` (a file and line, a key, a shard) and how to mend it."""
        line = f"  {where}: {problem}" + (f" ({fix})" if fix else "")
        if line not in self.lines:
            self.lines.append(line)

    def raise_if_any(self, error: type[UserError], heading: str) -> None:
        """Raise ``error`` with all problems under ``heading``; do nothing where there are none."""
        if self.lines:
            count = "1 problem" if len(self.lines) == 1 else f"{len(self.lines)} problems"
            raise error("\n".join([f"{heading} ({count}):", *self.lines]))
