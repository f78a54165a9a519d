"""Bring checkpoints of other code over to a Transformers folder."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..folders import save_folder
from ..modeling_dinosr import DinoSRForPreTraining
from .fairseq import CheckpointError, config_from_fairseq, state_dict_from_fairseq

__all__ = ["CheckpointError", "convert"]


def _read(file: Path) -> dict:
    if not file.is_file():
        raise CheckpointError(f"{file} is not a file. Give the path of a checkpoint.")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises a different class for each way in which a file can be wrong; all mean the same to the user
        raise CheckpointError(
            f"{file} cannot be opened as a checkpoint without running code from it ({error.__class__.__name__}). It is"
            " damaged, or holds objects other than tensors and plain containers."
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{file} holds a {type(checkpoint).__name__}, not a checkpoint's dictionary.")
    return checkpoint


def convert(file: str | os.PathLike, out_dir: str | os.PathLike) -> DinoSRForPreTraining:
    """
    Convert a checkpoint of the authors' code, written by fairseq with its configuration as a plain dictionary.

    Opening the file runs none of its code: it is read with `torch.load(weights_only=True)`, and the convolutions'
    sizes in its configuration, a Python expression, are parsed and not evaluated. Every weight of the file is used.

    Args:
        file: The checkpoint.
        out_dir: Folder to write: weights as safetensors, configuration, feature extractor and the model's code. It
            must not exist yet, in which case it appears whole or not at all, or be empty.

    Returns:
        The converted model, in evaluation mode: student, teacher, codebooks and heads. The teacher is the one of the
        last forward pass, as the file has it (docs/parity.md, D3).

    Raises:
        CheckpointError: For a file that is not such a checkpoint, or has settings or weights that the model has not;
            the message names them.
        ValueError: If `out_dir` has something in it.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"{out_dir} exists and is not empty. Give another folder, or remove it first.")
    checkpoint = _read(Path(file))
    config = config_from_fairseq(checkpoint)
    model = DinoSRForPreTraining(config)
    model.load_state_dict(state_dict_from_fairseq(checkpoint, model))
    model.eval()
    save_folder(model, out_dir)
    return model
