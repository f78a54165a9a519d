"""Model folders: read their configuration, save them atomically."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor
from transformers.utils.hub import has_file

from ..model.configuration_dinosr import DinoSRConfig
from .files import atomic_folder


class FolderTokenizer(Wav2Vec2CTCTokenizer):
    """What `AutoTokenizer` reads a DinoSR folder with that names no tokenizer itself: it says if there is none."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Wav2Vec2CTCTokenizer:
        """
        Read the vocabulary of a folder or a Hub repository.

        Raises:
            ValueError: If it has none, as after pre-training.
        """
        place: dict[str, Any] = {name: kwargs.get(name) for name in ("revision", "token", "cache_dir")}
        if not has_file(pretrained_model_name_or_path, "vocab.json", **place):
            raise ValueError(
                f"{pretrained_model_name_or_path} has no tokenizer: vocab.json is not there. Pre-training leaves none:"
                " fine-tune the model with CTC first (docs/fine-tuning.md), and give the folder that this leaves. To"
                " a recogniser that was saved alone, add its tokenizer with `processor.save_pretrained(folder)`."
            )
        return Wav2Vec2CTCTokenizer.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


def open_config(name: str | os.PathLike, advice: str = "Give a folder with a model, or a name on the Hub.") -> Any:
    """
    The configuration of a model that a user names.

    Args:
        name: Folder, or name on the Hub.
        advice: What to give instead, for the error.

    Raises:
        ValueError: If there is none; the message has the name, the reason and the advice.
    """
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be opened ({error}). {advice}") from error


def open_dinosr_config(name: str | os.PathLike) -> DinoSRConfig:
    """
    The configuration of the DinoSR that a run is to start from.

    Args:
        name: Folder, or name on the Hub.

    Raises:
        ValueError: If there is none, or it is another kind of model's.
    """
    config = open_config(name, "Give the folder of a DinoSR, as pre-training leaves it, or its name on the Hub.")
    if config.model_type != DinoSRConfig.model_type:
        raise ValueError(f"{name} is a {config.model_type}, not a DinoSR. Give a DinoSR's folder or name.")
    return config


def feature_extractor() -> Wav2Vec2FeatureExtractor:
    """What turns audio into the model's input: 16 kHz, zero mean and unit variance, padding at the end."""
    return Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=16_000, padding_value=0.0, do_normalize=True, return_attention_mask=True
    )


def save_folder(model: PreTrainedModel, folder: str | os.PathLike) -> Path:
    """
    Write weights, configuration, the model's code and the feature extractor, all of it or nothing.

    Args:
        model: What to save.
        folder: Where to, as for `atomic_folder`.

    Returns:
        The folder.
    """
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        feature_extractor().save_pretrained(temporary)
    return Path(folder)
