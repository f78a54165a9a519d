"""Number of CPU threads of a process, in training and in extraction."""

from __future__ import annotations

import os

import torch

MAX_THREADS = 4096  # beyond what a machine has; torch would try to make them


def set_cpu_threads(num_threads: int, num_processes: int = 1) -> int:
    """
    Set the number of threads that torch computes with in this process, and return it.

    0 is this process's share of the cores that it may run on, which `num_processes` on this machine share. `accelerate
    launch` and `torchrun` leave a process a single thread otherwise. Raises `ValueError` for numbers out of range.
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
    torch.set_num_threads(num_threads or max(1, cores // num_processes))
    return torch.get_num_threads()
