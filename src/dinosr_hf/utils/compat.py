"""What differs between the releases of transformers that we work with, and from which one on it can go."""

from __future__ import annotations

from transformers import PreTrainedModel


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass. Goes when the least transformers is 5.23: the newer name alone."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
