"""Download a checkpoint from the Hub: its file and the settings beside it, no other file of the repository."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from ...utils.names import one_line
from .checkpoint_file import ConversionError

# What a repository calls its model, in the order of preference.
_FILES = ("final.pt", "best.pt", "model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".pt", ".ckpt", ".pth", ".bin", ".safetensors")
_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:/(.+))?")


def is_hub_name(name: str) -> bool:
    """Return whether this is `organisation/name` on the Hub, or a checkpoint in it, and nothing on the disk."""
    match = _NAME.fullmatch(name)
    if match is None or Path(name).exists() or name.startswith("."):
        return False
    return not match[1].endswith(_SUFFIXES) and (match[2] is None or match[2].endswith(_SUFFIXES))


def _download(repository: str, file: str, name: str) -> Path | None:
    """Return the path of a file in the cache, None if the repository has none of this name."""
    try:
        return Path(hf_hub_download(repository, file))
    except LocalEntryNotFoundError as error:
        problem = "the Hub cannot be reached to download it"
        raise ConversionError(f"{name} is not a file, and {problem}: {one_line(error)}.") from error
    except EntryNotFoundError:
        return None
    except GatedRepoError as error:
        advice = "Accept its terms on its page, then log in: hf auth login"
        raise ConversionError(f"{repository} on the Hub is gated. {advice}.") from error
    except RepositoryNotFoundError as error:
        advice = "or it is private, and you are not logged in (hf auth login)"
        raise ConversionError(f"{name} is neither a file nor a model on the Hub, {advice}.") from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise ConversionError(f"{name} is neither a file nor a model on the Hub: {one_line(error)}.") from error


def download_checkpoint(name: str) -> Path:
    """
    Download a checkpoint and return its path; that of the folder for a model of transformers.

    Args:
        name: `organisation/name`, or that and the path of a checkpoint in the repository, such as
            `coml/discophon-finetuned-baselines/spidr-vp20/ft-deu-1h/best.pt`.

    Raises:
        ConversionError: If there is no such file, or the Hub cannot be reached.
    """
    match = _NAME.fullmatch(name)
    assert match is not None
    repository, files = match[1], _FILES if match[2] is None else (match[2],)
    found = next(filter(None, (_download(repository, file, name) for file in files)), None)
    if found is None:
        raise ConversionError(
            f"{repository} on the Hub has no {' or '.join(files)}. Give the name of the repository and the path of its"
            f" checkpoint: {repository}/FILE."
        )
    beside = Path(match[2] or _FILES[0])
    _download(repository, beside.with_name("config.json").as_posix(), name)
    if found.name not in ("model.safetensors", "pytorch_model.bin"):
        return found
    _download(repository, beside.with_name("preprocessor_config.json").as_posix(), name)
    return found.parent
