"""What the world outside asks of a run: Slurm, spot machines and users send signals, the loop looks at them."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)


class RunInterrupted(Exception):
    """
    A signal ended the run, after a checkpoint.

    Attributes:
        exit_code: What a process that is ended by this signal leaves, 128 + its number.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class SignalWatch:
    """
    Notes signals, so that the loop can answer them between two steps; a context manager.

    SIGUSR1 asks for a checkpoint and the run goes on; SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a closed terminal, unless
    `nohup` has it ignored) ask for a checkpoint and the end. A second SIGINT does not wait for it. Outside
    of the main thread, where Python allows no handlers, nothing is noted.

    Attributes:
        save: Whether a checkpoint was asked for. The loop sets it back.
        stop: Number of the signal that asked for the end, else 0.
    """

    def __init__(self) -> None:
        self.save = False
        self.stop = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):  # Windows has the first two
                number = getattr(signal, name, None)
                if number is not None and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.stop == signal.SIGINT:
            raise KeyboardInterrupt
        self.save = True
        if number != getattr(signal, "SIGUSR1", None):
            self.stop = int(number)
