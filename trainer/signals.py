"""The wish to stop, as the scheduler, the operating system or a person expresses it."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopFlag:
    """Remembers that one of `STOP_SIGNALS` has come; the loop looks at it at the end of each step."""

    def __init__(self) -> None:
        self.signal: str | None = None

    @property
    def asked(self) -> bool:
        return self.signal is not None

    def install(self) -> None:
        """From now on these signals only set the flag. To be called first of all, in the main thread."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
