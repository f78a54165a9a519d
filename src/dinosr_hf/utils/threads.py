"""How many threads a process computes with on a CPU, in training and in extraction."""

from __future__ import annotations

import os

import torch


def set_cpu_threads(num_threads: int, num_processes: int = 1) -> int:
    """
    Set the threads that torch computes with in this process.

    `accelerate launch` and `torchrun` leave a process one thread, whatever there is, unless they are told otherwise.

    Args:
        num_threads: How many; 0: this process's share of the cores that it may run on.
        num_processes: Processes on this machine that share its cores.

    Returns:
        How many it has now, at least one.

    Raises:
        ValueError: If `num_threads` is negative.
    """
    if num_threads < 0:
        raise ValueError(f"num_threads={num_threads} must be at least 0, which means a process's share of the cores.")
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    torch.set_num_threads(num_threads or max(1, cores // num_processes))
    return torch.get_num_threads()
