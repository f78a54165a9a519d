"""
Worker processes that neither die of a signal meant for the run nor outlive it.

A terminal, Slurm or a shell sends SIGINT, SIGTERM, SIGHUP or SIGUSR1 to every process of a group. What it means is for
the training process to decide: it may have a step to finish and a checkpoint to save, and needs its workers for that.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

_POLL_SECONDS = 1.0


def _signals() -> set[signal.Signals]:
    return {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}


@contextmanager
def shielded_workers(start_method: str | None = None) -> Iterator[None]:
    """
    Processes started in here begin with SIGINT, SIGTERM, SIGHUP and SIGUSR1 blocked; a signal for this one waits till
    the end.

    Without it a worker would be unprotected from its start until it gets to `watch_parent`, which is seconds where it
    is a fresh interpreter.

    Args:
        start_method: By which they are started; None for Python's default.
    """
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _signals())
    try:
        if multiprocessing.get_context(start_method).get_start_method() != "fork":
            # The first process started in these ways starts this one too, which unblocks signals in Python 3.11.
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, _signals())
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def watch_parent(worker_id: int = 0) -> None:
    """
    Make this process a worker that leaves signals to its parent, and ends with it.

    A `worker_init_fn` of `DataLoader`, or an `initializer` of `ProcessPoolExecutor`.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 do nothing, unless it is the parent that sends SIGTERM, as `DataLoader` does to
    a worker that does not end by itself. (macOS and Windows do not say who sent it: there it does nothing, too.) When
    the parent is gone, even by SIGKILL, the worker ends within a second, whatever it is doing.

    Args:
        worker_id: Not needed; what `DataLoader` passes.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "only for processes that multiprocessing started"
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, _signals())
    else:
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            if name in signal.Signals.__members__:
                signal.signal(signal.Signals[name], signal.SIG_IGN)
    threading.Thread(target=_watch, args=(parent, os.getppid()), name="watch parent", daemon=True).start()


def _watch(parent: multiprocessing.process.BaseProcess, parent_pid: int) -> None:
    # Of two signs each fails alone: forked siblings keep each other's sentinels open, and the parent of a process from
    # a fork server is the server, which lives as long as its children.
    while parent.is_alive() and os.getppid() == parent_pid:
        if sys.platform != "linux":
            parent.join(_POLL_SECONDS)
            continue
        received = signal.sigtimedwait(_signals(), _POLL_SECONDS)
        if received is not None and received.si_signo == signal.SIGTERM and received.si_pid == parent.pid:
            os._exit(0)
    os._exit(1)
