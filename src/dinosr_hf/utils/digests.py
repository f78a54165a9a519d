"""Digests (SHA-256) by which a run recognises a model, a file or a value that its results depend on."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import torch
from transformers import PreTrainedModel

_LENGTH = 16
# Fields of a configuration that say where a model comes from, not what it computes.
_ORIGIN = ("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version")


def value_digest(value: Any) -> str:
    """Return the short digest of a value that JSON can express."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:_LENGTH]


def file_digest(path: str | os.PathLike) -> str:
    """Return the digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digest(model: PreTrainedModel) -> str:
    """Return the short digest of a model's configuration and weights, wherever they were loaded from."""
    config = {name: value for name, value in model.config.to_diff_dict().items() if name not in _ORIGIN}
    found = hashlib.sha256(value_digest(config).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:_LENGTH]
