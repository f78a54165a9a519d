"""Model folders: read their configuration, save them atomically."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import has_file

from ..model.configuration_dinosr import DinoSRConfig
from .command_line import ArgumentError, check_choice
from .damaged_files import count_weights, explain_damage
from .files import atomic_folder
from .names import one_line
from .pickle_check import check_torch_file

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FolderTokenizer(Wav2Vec2CTCTokenizer):
    """Tokenizer that `AutoTokenizer` uses for a DinoSR folder that names none; its error says if there is none."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Wav2Vec2CTCTokenizer:
        """Read the vocabulary of a folder or a Hub repository. Raises `ArgumentError` if it has none."""
        options = ("revision", "token", "cache_dir", "local_files_only")
        place: dict[str, Any] = {name: kwargs[name] for name in options if name in kwargs}
        file = "/".join(filter(None, (kwargs.get("subfolder"), "vocab.json")))
        if not has_file(pretrained_model_name_or_path, file, **place):
            raise ArgumentError(
                f"{pretrained_model_name_or_path} has no tokenizer: vocab.json is not there. Pre-training writes none:"
                " fine-tune the model with CTC (docs/fine-tuning.md), and give the folder of that run. If a recogniser"
                " was saved without its tokenizer, add it with `processor.save_pretrained(folder)`."
            )
        return Wav2Vec2CTCTokenizer.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


def find_file(name: str | os.PathLike, file: str) -> Path | None:
    """
    Return the path of a file of a model, in a folder or on the Hub; None if the model has no such file.

    None as well, with a warning, if the Hub cannot be reached and the cache does not tell.
    """
    if Path(name).is_dir():
        return path if (path := Path(name, file)).is_file() else None
    try:
        return Path(hf_hub_download(str(name), file))
    except LocalEntryNotFoundError:
        if try_to_load_from_cache(str(name), file) is None:
            logger.warning(
                "The Hub cannot be reached, and %s is not in the cache: going on as if %s had none. If it has one,"
                " download it: hf download %s",
                file,
                *(name, name),
            )
        return None
    except EntryNotFoundError:
        return None


# What loading a model or its processor reads in a folder; the code of a model is not among them.
_MODEL_FILES = (
    *("config.json", "model*.index.json", "pytorch_model*.index.json", "model*.safetensors", "pytorch_model*.bin"),
    *("processor_config.json", "preprocessor_config.json"),
    *("vocab.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "text_normalization.json"),
)
_MAX_REASON = 300
_MAX_CONFIG_BYTES = 2**20  # 10,000 names of classes take less than half


def _missing_shard(index: Path) -> str | None:
    """Return which of the files that an index of weights names are not there."""
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if not missing:
        return None
    return f"{index.parent} lacks {missing[0]}, one of {len(names)} files that {index.name} names. Download it."


def explain_folder(name: str | os.PathLike) -> str | None:
    """Return what is wrong with a file of a model's folder; None if all look whole, or it is a name on the Hub."""
    for pattern in _MODEL_FILES:
        for file in sorted(Path(name).glob(pattern)) if Path(name).is_dir() else []:
            if (problem := explain_damage(file)) is not None:
                return problem
            if pattern.endswith(".index.json"):
                try:
                    problem = _missing_shard(file)
                except (ValueError, KeyError, TypeError, AttributeError):
                    problem = f"{file} is not an index of files of weights. Download it again."
                if problem is not None:
                    return problem
    return None


def check_config_size(file: Path) -> None:
    """Raise `ValueError` for a configuration that is so large that reading it takes minutes."""
    if file.is_file() and (size := file.stat().st_size) > _MAX_CONFIG_BYTES:
        raise ValueError(f"{file} has {size:,} bytes; a configuration has at most {_MAX_CONFIG_BYTES:,}.")


@contextmanager
def opening(name: str | os.PathLike, advice: str) -> Iterator[None]:
    """
    Run a body that opens something of the model `name`, a folder or a repository on the Hub.

    If it fails, raises `ValueError` with the name, or a damaged file in the folder, the reason and the advice; an
    `ArgumentError` or `ImportError` is passed on.
    """
    check_config_size(Path(name) / "config.json")
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # it warns at each attempt to connect
    try:
        yield
    except (ArgumentError, ImportError):
        raise
    except Exception as error:  # safetensors, pickle, json, torch and transformers each raise their own
        if (damage := explain_folder(name)) is not None:
            raise ValueError(damage) from error
        reason = one_line(error)
        problem = f"cannot be opened: {reason if len(reason) <= _MAX_REASON else reason[:_MAX_REASON] + '...'}"
        if "trust_remote_code" in reason:
            problem = "names Python code that would have to run to open it, which no command here does"
        elif type(error.__cause__) in (HFValidationError, RepositoryNotFoundError):
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
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    return config


def _pickled_weights(folder: str | os.PathLike) -> list[Path]:
    """Return the files of weights that are no safetensors, of a folder that has no others."""
    if any(Path(folder).glob("model*.safetensors")):
        return []
    return sorted(Path(folder).glob("pytorch_model*.bin"))


def _check_size(folder: str | os.PathLike, config: Any) -> None:
    """Refuse a DinoSR with more weights by its configuration than in its files, before it takes memory for them."""
    files = [file for file in sorted(Path(folder).glob("model*.safetensors")) if file.is_file()]
    pickled = _pickled_weights(folder)
    found = count_weights(files) or sum(file.stat().st_size for file in pickled) // 2  # at least two bytes for each
    if not files + pickled or not isinstance(getattr(config, "num_encoder_weights", None), int):
        return
    if getattr(config, "quantization_config", None) is not None:  # several weights in one number
        return
    if config.num_encoder_weights > found:
        raise ValueError(
            f"config.json describes an encoder of {config.num_encoder_weights:,} weights, but the folder's files have"
            f" {found:,}: they are of different models, or incomplete"
        )


def _check_device(device: str | torch.device) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = " ".join(str(error).split("\n")[0].split()).rstrip(".")
        raise ValueError(f"device={device} cannot be used: {reason}. Give cpu, or a device that torch has.") from error


def has_codebooks(config: PreTrainedConfig) -> bool:
    """Return whether a configuration is that of a pre-training checkpoint, which has a teacher and codebooks."""
    return config.model_type == DinoSRConfig.model_type and "DinoSRForPreTraining" in (config.architectures or ())


def torch_dtype(name: str) -> torch.dtype:
    """Return the precision of a name in `DTYPES`; raise `ValueError` for another name."""
    check_choice("dtype", name, DTYPES)
    return DTYPES[name]


def open_weights(
    model_class: Any,
    name: str | os.PathLike,
    *,
    device: str | torch.device = "cpu",
    advice: str = "Give a folder with a model, or a name on the Hub.",
    may_lack: str | None = None,
    **options: Any,
) -> Any:
    """
    Load a model by `model_class.from_pretrained(name, **options)`, with all of its weights, and move it to a device.

    `may_lack` is a regular expression of the names of weights that may start anew; None: none may. Raises `ValueError`
    for a folder that is damaged or made to do harm, for one that lacks weights or has some of other shapes, which
    transformers would initialise at random, and for a device that is not there.
    """
    _check_device(device)
    for file in _pickled_weights(name):
        check_torch_file(file)
    config = options.get("config")
    config = open_config(name, advice) if config is None else config
    with opening(name, advice):
        _check_size(name, config)
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # it prints a table of the weights that are lacking
        try:
            model, info = model_class.from_pretrained(
                name, output_loading_info=True, trust_remote_code=False, **options
            )
        finally:
            transformers_logging.set_verbosity(verbosity)
    mismatched = {key for key, *_ in info["mismatched_keys"]}
    allowed = {key for key in {*info["missing_keys"], *mismatched} if may_lack and re.match(may_lack, key)}
    if replaced := sorted(allowed & mismatched):
        logger.warning("%s has %s in another shape: they start anew, at random.", name, ", ".join(replaced))
    if lacking := {*info["missing_keys"], *mismatched} - allowed:
        raise ValueError(
            f"{name} lacks {len(lacking):,} weights of a {type(model).__name__}, or has them in another shape, such as"
            f" {min(lacking)}. It is another model, or incomplete. {advice}"
        )
    return model.to(device)


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


def save_folder(
    model: PreTrainedModel, folder: str | os.PathLike, weights: dict[str, torch.Tensor] | None = None
) -> Path:
    """
    Write weights, configuration, the model's code and the feature extractor, as `atomic_folder` does; return the path.

    `weights` are written in place of the model's own. No progress bar is shown, since a run has its own.
    """
    had_progress_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary, state_dict=weights)
            feature_extractor().save_pretrained(temporary)
    finally:
        if had_progress_bar:
            transformers_logging.enable_progress_bar()
    return Path(folder)
