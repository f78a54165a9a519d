"""Model folders: read their configuration, save them atomically."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoConfig, PreTrainedModel, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import has_file

from ..model.configuration_dinosr import DinoSRConfig
from .command_line import ArgumentError
from .files import atomic_folder


class FolderTokenizer(Wav2Vec2CTCTokenizer):
    """Tokenizer that `AutoTokenizer` uses for a DinoSR folder that names none; its error says if there is none."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Wav2Vec2CTCTokenizer:
        """Read the vocabulary of a folder or a Hub repository. Raises `ArgumentError` if it has none."""
        place: dict[str, Any] = {name: kwargs.get(name) for name in ("revision", "token", "cache_dir")}
        if not has_file(pretrained_model_name_or_path, "vocab.json", **place):
            raise ArgumentError(
                f"{pretrained_model_name_or_path} has no tokenizer: vocab.json is not there. Pre-training writes none:"
                " fine-tune the model with CTC (docs/fine-tuning.md), and give the folder of that run. If a recogniser"
                " was saved without its tokenizer, add it with `processor.save_pretrained(folder)`."
            )
        return Wav2Vec2CTCTokenizer.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


@contextmanager
def opening(name: str | os.PathLike, advice: str) -> Iterator[None]:
    """
    Run a body that opens something of the model `name`, a folder or a repository on the Hub.

    If it fails, raises `ValueError` with the name, the reason and the advice; an `ArgumentError` is passed on.
    """
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # it warns at each attempt to connect
    try:
        yield
    except ArgumentError:
        raise
    except (OSError, TypeError, ValueError) as error:
        problem = f"cannot be opened: {' '.join(str(error).split()).rstrip('.')}"
        if type(error.__cause__) in (HFValidationError, RepositoryNotFoundError):
            problem = "is neither a folder nor a model on the Hub"
        elif isinstance(error.__cause__, LocalEntryNotFoundError):
            problem = "is not a folder, and the Hub cannot be reached to look for a model of this name"
        raise ValueError(f"{name} {problem}. {advice}") from error
    finally:
        hub_logging.set_verbosity(verbosity)


def open_config(name: str | os.PathLike, advice: str = "Give a folder with a model, or a name on the Hub.") -> Any:
    """
    Read the configuration of a model in a folder or on the Hub.

    Raises `ValueError` if there is none; the message has the name, the reason and the advice.
    """
    with opening(name, advice):
        config = AutoConfig.from_pretrained(name)
    return config


def open_dinosr_config(name: str | os.PathLike) -> DinoSRConfig:
    """Read the configuration of a DinoSR. Raises `ValueError` if there is none, or it is of another kind of model."""
    config = open_config(name, "Give the folder of a DinoSR, such as one that pre-training wrote, or its Hub name.")
    if config.model_type != DinoSRConfig.model_type:
        raise ValueError(f"{name} is a {config.model_type}, not a DinoSR. Give a DinoSR's folder or name.")
    return config


def feature_extractor() -> Wav2Vec2FeatureExtractor:
    """Return the model's feature extractor: 16 kHz, zero mean and unit variance, padding at the end."""
    return Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=16_000, padding_value=0.0, do_normalize=True, return_attention_mask=True
    )


def save_folder(model: PreTrainedModel, folder: str | os.PathLike) -> Path:
    """
    Write weights, configuration, the model's code and the feature extractor, as `atomic_folder` does; return the path.

    No progress bar is shown, since a run has its own.
    """
    had_progress_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary)
            feature_extractor().save_pretrained(temporary)
    finally:
        if had_progress_bar:
            transformers_logging.enable_progress_bar()
    return Path(folder)
