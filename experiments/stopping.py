"""Told to stop (SIGTERM, SIGUSR1 before a time limit): save at the next step and leave with the code for "requeue"."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lora_ga.errors import REQUEUE

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopping:
    """Remembers a signal while a training is at work, which asks for it step by step; elsewhere it ends the process.

    Outside training nothing is lost by that: what was trained is kept, and answers are on disk one by one.
    """

    def __init__(self) -> None:
        self.requested = False
        self._training = False

    def __call__(self) -> bool:
        return self.requested

    @contextmanager
    def at_step_ends(self) -> Iterator[None]:
        """Within, a signal is only remembered."""
        self._training = True
        try:
            yield
        finally:
            self._training = False

    @contextmanager
    def listening(self) -> Iterator[Stopping]:
        """Within, the signals come here."""
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self._training:
            raise SystemExit(REQUEUE)
