"""How a rank tells that the process of another one is gone. Imports no torch."""

from __future__ import annotations

from foundation.errors import ExitCode, UserError

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


class RankLost(UserError):
    """The process of another rank is gone. No fault of this one: the run goes on with the next start."""

    exit_code = ExitCode.REQUEUE


def lost_another(error: Exception) -> bool:
    """Whether this is what a rank meets in a collective when another one's process is gone: gloo's and NCCL's
    words, since their exceptions have no kinds.
    """
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)
