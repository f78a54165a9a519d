"""Bring checkpoints of other code over to a Transformers folder, and back to the authors' layout."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ...model.modeling_dinosr import DinoSRForCTC, DinoSRForPreTraining, DinoSRModel
from ...recognition.text import make_processor
from ...utils.files import atomic_folder
from ...utils.model_folder import feature_extractor
from .checkpoint_file import CheckpointError, open_checkpoint
from .converted_card import converted_card
from .data2vec import read_data2vec_folder
from .fairseq import model_settings, read_fairseq, to_fairseq
from .fairseq_finetuned import DATA2VEC, is_finetuned, read_data2vec, read_finetuned
from .layout import Layout, build
from .spidr import is_spidr, read_spidr
from .verification import statistics_table, unit_statistics

__all__ = ["CheckpointError", "convert", "convert_to_fairseq", "read_layout", "statistics_table", "unit_statistics"]

logger = logging.getLogger(__name__)

CLASSES: dict[str, type[PreTrainedModel]] = {
    "pretraining": DinoSRForPreTraining,
    "model": DinoSRModel,
    "ctc": DinoSRForCTC,
}
OBJECTIVES = ("dinosr", "spidr")


def _read_settings(file: str | os.PathLike | None) -> dict[str, Any] | None:
    if file is None:
        return None
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is no configuration in JSON ({error}).") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file} must hold a dictionary, but holds a {type(settings).__name__}.")
    return settings


def read_layout(
    file: str | os.PathLike,
    *,
    dictionary: str | os.PathLike | None = None,
    config: str | os.PathLike | None = None,
    num_attention_heads: int | None = None,
    objective: str = "dinosr",
) -> Layout:
    """
    Open a checkpoint and find out what it is, by what is in it. Arguments and errors as for `convert`.

    Returns:
        Its configuration, weights by our names, and what is left and why.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r} is unknown. Choose one of {', '.join(OBJECTIVES)}.")
    if (Path(file) / "config.json").is_file():
        layout, used = read_data2vec_folder(Path(file)), set()
    else:
        checkpoint = open_checkpoint(file)
        settings = model_settings(checkpoint) or {}
        if is_spidr(checkpoint):
            used = {"config", "num_attention_heads", "objective"}
            layout = read_spidr(
                checkpoint, _read_settings(config), num_attention_heads=num_attention_heads, objective=objective
            )
        elif is_finetuned(checkpoint):
            layout, used = read_finetuned(checkpoint, dictionary), {"dictionary"}
        elif settings.get("_name") in DATA2VEC:
            layout, used = read_data2vec(checkpoint), set()
        else:
            layout, used = read_fairseq(checkpoint), set()
    given = {"dictionary": dictionary, "config": config, "num_attention_heads": num_attention_heads}
    given["objective"] = None if objective == "dinosr" else objective
    for name, value in given.items():
        if value is not None and name not in used:
            raise ValueError(
                f"{name}={str(value)!r} is not for a checkpoint of this layout ({layout.name}). Leave it out."
            )
    return layout


def _as(layout: Layout, as_: str | None) -> Layout:
    if as_ == "model" and layout.architecture != "model":
        return layout.encoder_alone()
    if as_ not in (None, "model", layout.architecture):
        raise ValueError(
            f"as_={as_!r} cannot be made of this checkpoint ({layout.name}). It can be"
            f" {' or '.join(dict.fromkeys((layout.architecture, 'model')))}."
        )
    return layout


def _say(layout: Layout) -> None:
    for note in layout.notes:
        logger.warning("To check: %s.", note)
    if layout.left:
        logger.warning("Left out: %s.", "; ".join(f"{name} ({why})" for name, why in layout.left.items()))


def convert(
    file: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    as_: str | None = None,
    dictionary: str | os.PathLike | None = None,
    config: str | os.PathLike | None = None,
    num_attention_heads: int | None = None,
    objective: str = "dinosr",
    license: str | None = None,
) -> PreTrainedModel:
    """
    Convert a checkpoint of the authors' code, of fairseq's fine-tuning, of package spidr, or of data2vec.

    Opening the file runs none of its code (docs/converting.md), and the convolutions' sizes in its configuration, a
    Python expression, are parsed and not evaluated. Every entry of the file is used, or named in a warning and on the
    card with the reason why it is left.

    Args:
        file: The checkpoint; for data2vec of transformers, its folder.
        out_dir: Folder to write: weights as safetensors, configuration, feature extractor or processor, a card and the
            model's code. It must not exist yet, in which case it appears whole or not at all, or be empty.
        as_: "pretraining", "ctc", or "model", the encoder alone; None: all that the file has.
        dictionary: Of a recogniser, fairseq's `dict.ltr.txt`; without, only its encoder is converted.
        config: Of a spidr checkpoint, its config.json; without, sizes come from the weights' shapes.
        num_attention_heads: Of a spidr checkpoint without a config.json; None: heads of 64 channels, as published.
        objective: Of a spidr checkpoint: "spidr" converts the encoder alone. Such a file does not tell it.
        license: For the card, by the Hub's identifier; None: it is left to be filled in.

    Returns:
        The converted model, in evaluation mode. The teacher is the one of the last forward pass, as the file has it
        (docs/parity.md, D3). Its weights are the file's, mapped: keep the file as it is while you use the model, or
        load the folder.

    Raises:
        CheckpointError: For a file that is not such a checkpoint, or has settings or weights that the model has not;
            the message names them.
        ValueError: If `out_dir` has something in it, or an argument is not for such a checkpoint.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"{out_dir} exists and is not empty. Give another folder, or remove it first.")
    layout = read_layout(
        file, dictionary=dictionary, config=config, num_attention_heads=num_attention_heads, objective=objective
    )
    layout = _as(layout, as_)
    model = build(CLASSES[layout.architecture], layout.config, layout.weights)
    _say(layout)
    processor = feature_extractor() if layout.vocabulary is None else make_processor(layout.vocabulary)
    with atomic_folder(out_dir) as whole:
        model.save_pretrained(whole)
        processor.save_pretrained(whole)
        converted_card(model, layout, Path(file).name, license).save(whole / "README.md")
    return model


def convert_to_fairseq(folder: str | os.PathLike, file: str | os.PathLike) -> Path:
    """
    Write the authors' layout from a folder of a `DinoSRForPreTraining`; converted again, it is the same bit for bit.

    Args:
        folder: What `convert` or pre-training wrote.
        file: The checkpoint to write; it must not exist, and appears whole or not at all.

    Returns:
        The file.

    Raises:
        ValueError: If the file exists, or the folder has another model.
    """
    folder, file = Path(folder), Path(file)
    if file.exists():
        raise ValueError(f"{file} exists. Give another name, or remove it first.")
    settings = _read_settings(folder / "config.json") or {}
    if settings.get("architectures") != ["DinoSRForPreTraining"]:
        raise ValueError(
            f"{folder} is a {', '.join(settings.get('architectures') or ['model of no name'])}, but the authors'"
            " layout is that of a DinoSRForPreTraining: student, teacher, codebooks and heads."
        )
    aside = file.with_name(f".unfinished-{file.name}")
    try:
        torch.save(to_fairseq(DinoSRForPreTraining.from_pretrained(folder)), aside)
        aside.rename(file)
    finally:
        aside.unlink(missing_ok=True)
    return file
