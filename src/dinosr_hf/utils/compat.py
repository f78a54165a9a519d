"""Differences between the releases of transformers that we support, each with the release that ends it."""

from __future__ import annotations

from transformers import PreTrainedModel


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass. Remove when transformers >= 5.23 is required: only the new name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
