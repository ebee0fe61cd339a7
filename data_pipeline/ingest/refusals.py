"""How many of the samples may be of no use before something is wrong with all of them."""

from __future__ import annotations

from foundation.errors import DataError

MAX_BAD_FRACTION = 0.2  # what a recipe allows by default
REASONS_SHOWN = 5


class TooManyRefused(DataError):
    """More bad samples than the recipe allows; `refused` lists them, key and reason each."""

    def __init__(self, message: str, refused: list[dict[str, str]]):
        super().__init__(message)
        self.refused = refused


def check_refused(
    where: str, refused: list[dict[str, str]], considered: int, max_bad_fraction: float
) -> None:
    """Raise TooManyRefused where more than the share `max_bad_fraction` of samples was refused.

    Args:
        where: what the samples lie in, for the message.
        refused: `key` and `reason` of each that was.
        considered: samples in all, those among them.
        max_bad_fraction: the recipe's.
    """
    if len(refused) <= max_bad_fraction * considered:
        return
    shown = "".join(f"\n    {line['key']}: {line['reason']}" for line in refused[:REASONS_SHOWN])
    more = f"\n    ... and {len(refused) - REASONS_SHOWN} more" if len(refused) > REASONS_SHOWN else ""
    raise TooManyRefused(
        f"{where}: {len(refused)} of {considered} samples cannot be used, over max_bad_fraction = "
        f"{max_bad_fraction:g} (which may be raised on the way):{shown}{more}",
        refused,
    )
