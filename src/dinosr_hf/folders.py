"""A folder that `from_pretrained` opens, written so that what is there is whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel, Wav2Vec2FeatureExtractor


def feature_extractor() -> Wav2Vec2FeatureExtractor:
    """What turns audio into the model's input: 16 kHz, zero mean and unit variance, padding at the end."""
    return Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=16_000, padding_value=0.0, do_normalize=True, return_attention_mask=True
    )


@contextmanager
def written_aside(folder: str | os.PathLike) -> Iterator[Path]:
    """
    Give an empty folder to write into, whose files are moved to `folder` once nothing has gone wrong.

    Its name begins with `.unfinished-`, and it is gone afterwards. A new folder then appears as a whole; in one that
    is there, each file does, and files of other names stay.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    place = folder.parent if is_new else folder  # on the same disk as the folder, even if that is a mount or a link
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=".unfinished-", ignore_cleanup_errors=True) as aside:
        whole = Path(aside) / "model"
        whole.mkdir()
        yield whole
        mode = (whole / "config.json").stat().st_mode  # safetensors writes for the owner alone
        for file in whole.iterdir():
            file.chmod(mode)
        if is_new:
            whole.rename(folder)
        else:
            for file in sorted(whole.iterdir()):
                file.replace(folder / file.name)


def save_folder(model: PreTrainedModel, folder: str | os.PathLike) -> Path:
    """
    Write weights, configuration, the model's code and the feature extractor, as `written_aside` does.

    Args:
        model: What to save.
        folder: Where to; made if it does not exist.

    Returns:
        The folder.
    """
    with written_aside(folder) as whole:
        model.save_pretrained(whole)
        feature_extractor().save_pretrained(whole)
    return Path(folder)
