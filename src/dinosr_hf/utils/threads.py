"""Number of CPU threads of a process, in training and in extraction."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

MAX_THREADS = 4096  # beyond what a machine has; torch would try to make them


def _threads_of_environment() -> int:
    """Return the number in OMP_NUM_THREADS, of which a list gives the first; 0: none that somebody chose."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    number = min(int(first), MAX_THREADS) if first.isdecimal() and len(first) < 10 else 0
    is_launched = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    return 0 if number == 1 and is_launched else number


def _on_this_machine(num_processes: int) -> int:
    """Return how many of the processes run on this machine: all, unless LOCAL_WORLD_SIZE says otherwise."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, min(int(local), num_processes)) if local.isdecimal() else num_processes


def set_cpu_threads(num_threads: int, num_processes: int = 1) -> int:
    """
    Set the number of threads that torch computes with in this process, and return it.

    0 is what OMP_NUM_THREADS says; without it, the share of the cores that this process may run on, which
    `num_processes` share, or those of them on this machine, if LOCAL_WORLD_SIZE says how many. A 1 that `accelerate
    launch` or `torchrun` may have set does not count: they do so by themselves. Raises `ValueError` for numbers out of
    range.
    """
    if not 0 <= num_threads <= MAX_THREADS:
        raise ValueError(
            f"num_threads={num_threads} must be at least 0, where 0 is the process's share of the cores, and at most"
            f" {MAX_THREADS}."
        )
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    share = max(1, cores // _on_this_machine(num_processes))
    torch.set_num_threads(num_threads or _threads_of_environment() or share)
    return torch.get_num_threads()


@contextmanager
def threads_of_all_processes(num_processes: int) -> Iterator[None]:
    """Let this process compute with the threads of all processes of this machine, while the others wait for it."""
    own = torch.get_num_threads()
    torch.set_num_threads(min(own * _on_this_machine(num_processes), MAX_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(own)
