"""Signals from users, Slurm and spot machines, noted for a training loop to answer between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class RunInterrupted(Exception):
    """A signal ended the run after so many steps; the `exit_code` of the process is 128 + its number."""

    def __init__(self, number: int, step: int, saved: str) -> None:
        super().__init__(f"{signal.Signals(number).name}: stopped after step {step}, {saved}.")
        self.exit_code = 128 + number


class SignalWatch:
    """
    Context manager that notes signals instead of dying from them.

    SIGUSR1 asks for a checkpoint. SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a closed terminal, unless `nohup` ignores it)
    ask for a checkpoint and the end of the run; a second SIGINT ends it at once. Outside of the main thread, where
    Python allows no handlers, nothing is noted.
    """

    def __init__(self) -> None:
        self.save = False  # whether a checkpoint was asked for; the loop sets it back
        self.stop = 0  # number of the signal that asked for the end
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):  # Windows has the first two
                number = getattr(signal, name, None)
                if number is not None and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                    self._previous_handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.stop == signal.SIGINT:
            raise KeyboardInterrupt
        self.save = True
        if number != getattr(signal, "SIGUSR1", None):
            self.stop = int(number)
