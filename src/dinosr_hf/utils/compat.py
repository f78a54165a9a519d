"""Differences between the releases of transformers that we support, each with the release that ends it."""

from __future__ import annotations

from importlib.metadata import version

import torch
from transformers import PreTrainedModel

from .command_line import ArgumentError


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass. Remove when transformers >= 5.23 is required: only the new name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def check_resumable(device: torch.device, num_processes: int) -> None:
    """
    Raise `ArgumentError` if `Trainer` cannot resume in several processes on CPUs: it would load for a device `cpu:0`.

    Remove when transformers >= 5.18 is required.
    """
    release = version("transformers")
    if device.type == "cpu" and num_processes > 1 and tuple(map(int, release.split(".")[:2])) < (5, 18):
        raise ArgumentError(
            f"transformers {release} cannot resume a run in several processes without GPUs. Install"
            " 5.18 or newer, or resume in one process."
        )
