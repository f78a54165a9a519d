"""Convert checkpoints of other code to a Transformers folder, and a folder to the authors' layout."""

from __future__ import annotations

import json
import logging
import os
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from ...model.configuration_dinosr import DinoSRConfig
from ...model.modeling_dinosr import DinoSRForCTC, DinoSRForPreTraining, DinoSRModel
from ...recognition.text import SPECIAL_TOKENS, WORD_DELIMITER, TextNormalization, make_processor
from ...utils.command_line import check_choice
from ...utils.files import atomic_file, atomic_folder, write_atomically
from ...utils.model_folder import feature_extractor, open_weights
from ..card import render_card
from .checkpoint_file import ConversionError, open_checkpoint
from .data2vec import read_data2vec_folder
from .downloads import download_checkpoint, is_hub_name
from .fairseq import (
    DATA2VEC,
    check_inputs,
    config_from_fairseq,
    is_recogniser,
    model_settings,
    read_data2vec,
    read_fairseq,
    read_recogniser,
    to_fairseq,
)
from .layout import Layout, build, read_settings
from .spidr import OBJECTIVES, config_from_settings, is_spidr, read_spidr, to_spidr
from .verification import statistics_table, unit_statistics

__all__ = [
    "ConversionError",
    "convert",
    "convert_to_fairseq",
    "convert_to_spidr",
    "statistics_table",
    "unit_statistics",
]

logger = logging.getLogger(__name__)

# Model class and task of each architecture.
CLASSES: dict[str, tuple[type[PreTrainedModel], str]] = {
    "pretraining": (DinoSRForPreTraining, "feature-extraction"),
    "model": (DinoSRModel, "feature-extraction"),
    "ctc": (DinoSRForCTC, "automatic-speech-recognition"),
}
# Settings of pre-training that do not follow from the weights.
PRETRAINING = (
    *("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "layerdrop"),
    *("attention_init", "qkv_bias", "codebook_decay", "codebook_end_decay", "codebook_end_decay_step"),
    *("codebook_update_steps", "codebook_revival_share", "num_anchor_labels", "ema_decay", "ema_schedule"),
    *("ema_end_decay", "ema_anneal_steps", "ema_timescale", "ema_threshold", "teacher_init", "freeze_teacher_step"),
    *("freeze_front_end_step", "freeze_mode", "mask_prob", "mask_length", "mask_min_spans", "reference_padding"),
)
# Arguments of `convert` that only some layouts use.
LAYOUT_ARGUMENTS = {"spidr": ("config", "num_attention_heads", "objective"), "fairseq, CTC": ("dictionary",)}


def _read_layout(file: Path, given: Mapping[str, Any]) -> Layout:
    """Open a checkpoint and recognise its layout by its content."""
    if (file / "config.json").is_file():
        layout = read_data2vec_folder(file)
    else:
        checkpoint = open_checkpoint(file)
        if is_spidr(checkpoint):
            beside = file.with_name("config.json")  # as on the Hub
            settings_file = given["config"] or (beside if beside.is_file() else None)
            settings = None if settings_file is None else read_settings(settings_file)
            if settings is not None and given["num_attention_heads"] is not None:
                raise ValueError(
                    f"num_attention_heads={given['num_attention_heads']} is for a checkpoint without config.json, and"
                    f" {settings_file} tells the number. Leave it out."
                )
            layout = read_spidr(checkpoint, settings, given["num_attention_heads"], given["objective"])
        else:
            check_inputs(checkpoint)
            if is_recogniser(checkpoint):
                layout = read_recogniser(checkpoint, given["dictionary"])
            elif model_settings(checkpoint).get("_name") == DATA2VEC:
                layout = read_data2vec(checkpoint)
            else:
                layout = read_fairseq(checkpoint)
    for name, value in given.items():
        if value is not None and name not in LAYOUT_ARGUMENTS.get(layout.name, ()):
            raise ValueError(f"{name}={str(value)!r} does not apply to this checkpoint ({layout.name}). Leave it out.")
    return layout


def _text_normalization(vocabulary: Mapping[str, int]) -> TextNormalization | None:
    """Return the rule that a dictionary of single letters of one case tells; None if it tells none."""
    labels = vocabulary.keys() - {*SPECIAL_TOKENS, WORD_DELIMITER}
    letters = "".join(sorted(labels))
    if len(letters) > len(labels) or not (letters.isupper() or letters.islower()) or {*"İı"} & labels:
        return None
    signs = (letter for letter in letters if unicodedata.category(letter)[0] in "PS")
    return TextNormalization(case="upper" if letters.isupper() else "lower", keep="".join(signs))


def convert(
    file: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    as_: str | None = None,
    dictionary: str | os.PathLike | None = None,
    config: str | os.PathLike | None = None,
    num_attention_heads: int | None = None,
    objective: str | None = None,
    license: str | None = None,
) -> PreTrainedModel:
    """
    Convert a checkpoint of the authors' code, of fairseq's fine-tuning, of package spidr, or of data2vec.

    No code of the file is run (docs/converting.md): the sizes of its convolutions, a Python expression, are parsed
    without being evaluated. Every entry of the file is used, or named in a warning and on the card with the reason
    why it is not.

    Args:
        file: Path of the checkpoint; for data2vec of transformers, of its folder. Or a name on the Hub, of which the
            checkpoint and its config.json are downloaded, see `download_checkpoint`.
        out_dir: Path of the folder to write, which must not exist or be empty. It gets weights as safetensors,
            configuration, feature extractor or processor, text normalisation if the dictionary has single letters of
            one case, a card and the model's code, atomically.
        as_: "pretraining", "ctc", or "model" (the encoder alone); None: everything in the file.
        dictionary: Path of a recogniser's `dict.ltr.txt` from fairseq; None: convert its encoder alone.
        config: Path of a spidr checkpoint's config.json; None: the one beside the file, or if there is none, derive
            the sizes from the weights' shapes.
        num_attention_heads: Number of heads of a spidr checkpoint without a config.json; None: heads of 64 channels.
        objective: Objective of a spidr checkpoint, "dinosr" or "spidr", if neither file nor config.json tells it.
        license: Licence for the card, by the Hub's identifier; None: the card asks for it.

    Returns:
        The converted model, in evaluation mode. The teacher is the one of the last forward pass, as in the file
        (docs/parity.md, D3). Its weights are mapped from the file: keep the file unchanged while you use the model, or
        load the folder.

    Raises:
        ConversionError: If the file is not such a checkpoint, or has settings or weights that are not supported.
        ValueError: If `out_dir` is not empty, or an argument does not apply to such a checkpoint.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"{out_dir} exists and is not empty. Give another folder, or remove it first.")
    if objective is not None:
        check_choice("objective", objective, OBJECTIVES)
    given = {"dictionary": dictionary, "config": config, "num_attention_heads": num_attention_heads}
    path = download_checkpoint(str(file)) if is_hub_name(str(file)) else Path(file)
    layout = _read_layout(path, given | {"objective": objective})
    if as_ not in (None, "model", layout.architecture):
        if as_ == "ctc" and layout.name == "fairseq, CTC":
            raise ValueError("as_='ctc' needs the recogniser's labels. Give its dictionary too, dict.ltr.txt.")
        choices = " or ".join(dict.fromkeys((layout.architecture, "model")))
        raise ValueError(f"as_={as_!r} does not apply to this checkpoint ({layout.name}). Choose {choices}.")
    if as_ == "model" and layout.architecture != "model":
        layout = layout.encoder_only()
    model = build(CLASSES[layout.architecture][0], layout.config, layout.weights)
    for note in layout.notes:
        logger.warning("To check: %s.", note)
    if layout.unused:
        logger.warning("Not used: %s.", "; ".join(f"{name} ({reason})" for name, reason in layout.unused.items()))
    processor = feature_extractor() if layout.vocabulary is None else make_processor(layout.vocabulary)
    normalization = None if layout.vocabulary is None else _text_normalization(layout.vocabulary)
    pipeline_tag, tags = CLASSES[layout.architecture][1], ["dinosr", "speech", "audio"]
    metadata = ModelCardData(license=license, library_name="transformers", pipeline_tag=pipeline_tag, tags=tags)
    card = render_card(metadata, model, title=Path(file).resolve().name, layout=layout)
    with atomic_folder(out_dir) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        if normalization is not None:
            normalization.save(temporary)
        card.save(temporary / "README.md")
    return model


def _open_to_write(folder: Path, file: Path, layout: str) -> DinoSRForPreTraining:
    if file.exists():
        raise ValueError(f"{file} exists. Give another name, or remove it first.")
    names: Any = read_settings(folder / "config.json").get("architectures")
    if names != ["DinoSRForPreTraining"]:
        raise ValueError(
            f"{folder} is a {', '.join(names or ['model of no name'])}. {layout} needs a DinoSRForPreTraining:"
            " student, teacher, codebooks and heads."
        )
    return open_weights(DinoSRForPreTraining, folder)


def _warn_of_losses(config: DinoSRConfig, written: DinoSRConfig) -> None:
    """Name the settings that are other ones when the file is read again."""
    pairs = {name: (getattr(config, name), getattr(written, name)) for name in PRETRAINING}
    lost = [f"{name}={own} (read back as {other})" for name, (own, other) in pairs.items() if own != other]
    if lost:
        logger.warning("The file has no place for %s.", ", ".join(lost))


def _save_checkpoint(file: Path, checkpoint: Mapping[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary, temporary.open("wb") as stream:  # torch.save refuses the name of the file
        torch.save(checkpoint, stream)
    return file


def convert_to_fairseq(folder: str | os.PathLike, file: str | os.PathLike) -> Path:
    """
    Write a `DinoSRForPreTraining` in the authors' layout and return the path; converting it back is bit-exact.

    Settings that the layout has no place for are named in a warning.

    Args:
        folder: Path of the model's folder, from `convert` or pre-training.
        file: Path of the checkpoint to write, atomically. `ValueError` if it exists, or the folder has another model.
    """
    model = _open_to_write(Path(folder), Path(file), "The authors' layout")
    checkpoint = to_fairseq(model)
    _warn_of_losses(model.config, config_from_fairseq(checkpoint))
    return _save_checkpoint(Path(file), checkpoint)


def convert_to_spidr(folder: str | os.PathLike, file: str | os.PathLike) -> Path:
    """
    Write a `DinoSRForPreTraining` in the layout of package spidr, with its config.json beside it.

    The arguments are those of `convert_to_fairseq`; `ValueError` also if there is a config.json beside the file.
    """
    settings_file = Path(file).with_name("config.json")
    if settings_file.exists():
        raise ValueError(f"{settings_file} exists, and {file} needs one of its own. Give a file in another folder.")
    model = _open_to_write(Path(folder), Path(file), "spidr's layout")
    checkpoint, settings = to_spidr(model)
    objective = "spidr" if model.config.head_input == "own_layer" else "dinosr"
    _warn_of_losses(model.config, config_from_settings(settings["model"], objective))
    written = _save_checkpoint(Path(file), checkpoint)
    write_atomically(settings_file, json.dumps(settings, indent=1) + "\n")
    return written
