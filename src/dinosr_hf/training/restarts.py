"""Let the processes of a run find each other, also after `torchrun --max_restarts` has started them anew."""

from __future__ import annotations

import os

from ..utils.command_line import ArgumentError

_HIGHEST_PORT = 65_535


def separate_restarts() -> None:
    """
    Give each attempt of torchrun a port of its own; to be called before the processes meet.

    torchrun's store outlives the processes, and those of a later attempt would take the addresses of the dead ones
    from it (https://github.com/pytorch/pytorch/issues/135712). With several machines, which do not count the attempts
    together, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun instead.
    """
    attempt, environment = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), os.environ
    is_shared = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if attempt and is_shared and environment.get("GROUP_WORLD_SIZE") == "1":
        port = int(environment["MASTER_PORT"])
        attempt = -attempt if port + attempt > _HIGHEST_PORT else attempt
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port + attempt)}


def check_connected(num_processes: int, advice: str = "Without GPUs, set ACCELERATE_USE_CPU=true.") -> None:
    """
    Raise `ArgumentError`, with the advice, if several processes were started but are not connected.

    Each would do all of the work, and all would write the same files. `num_processes` are those that this one sees.
    """
    num_started = int(os.environ.get("WORLD_SIZE", "1"))
    if num_started > 1 and num_processes == 1:
        raise ArgumentError(f"{num_started} processes were started, but they are not connected. {advice}")
