"""
Worker processes that ignore signals meant for the run, and exit with it.

A terminal, Slurm or a shell sends SIGINT, SIGTERM, SIGHUP or SIGUSR1 to every process of a group. The training process
decides what to do: it may have a step to finish and a checkpoint to save, and needs its workers for that.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing import resource_tracker
from typing import Any

from torch.utils.data import DataLoader

_POLL_SECONDS = 1.0

# Windows has only the first two.
_SIGNALS = {signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)}


@contextmanager
def block_signals_in_workers(start_method: str | None = None) -> Iterator[None]:
    """
    Start processes within this block with the signals blocked; one to this process is handled when the block ends.

    Otherwise a signal would kill a worker that has not yet called `initialize_worker`: a fresh interpreter needs
    seconds for that. `start_method` None is Python's default.
    """
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        if multiprocessing.get_context(start_method).get_start_method() != "fork":
            # The first process started in these ways starts this one too, which unblocks signals in Python 3.11.
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def initialize_worker(worker_id: int = 0) -> None:
    """
    Make this process ignore signals and exit with its parent: `worker_init_fn` of `DataLoader`, or `initializer`.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 are ignored, except a SIGTERM from the parent, which `DataLoader` sends to a
    worker that does not end by itself. (macOS and Windows do not tell the sender; there it is ignored too.) The
    process exits within a second after its parent has gone, even by SIGKILL, whatever it is doing.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "only for processes that multiprocessing started"
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    else:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with, args=(parent, os.getppid()), name="exit with parent", daemon=True).start()


class WorkerLoader(DataLoader[Any]):
    """`DataLoader` whose workers, if it has any, ignore signals meant for the run, and exit with it."""

    def __init__(self, dataset: Any, **options: Any) -> None:
        super().__init__(dataset, worker_init_fn=initialize_worker, **options)

    def __iter__(self) -> Any:
        with block_signals_in_workers(self._start_method) if self.num_workers else nullcontext():
            return super().__iter__()

    @property
    def _start_method(self) -> str | None:
        context: Any = self.multiprocessing_context
        return None if context is None else context.get_start_method()


def _exit_with(parent: multiprocessing.process.BaseProcess, parent_pid: int) -> None:
    # Each check alone fails: forked siblings keep each other's sentinels open, and the parent of a process from a fork
    # server is the server, which lives as long as its children.
    while parent.is_alive() and os.getppid() == parent_pid:
        if sys.platform != "linux":
            parent.join(_POLL_SECONDS)
            continue
        received = signal.sigtimedwait(_SIGNALS, _POLL_SECONDS)
        if received is not None and received.si_signo == signal.SIGTERM and received.si_pid == parent.pid:
            os._exit(0)
    os._exit(1)
