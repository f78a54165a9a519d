"""What a run leaves on disk."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Wav2Vec2FeatureExtractor

from ..data import SAMPLING_RATE
from ..modeling_dinosr import DinoSRForPreTraining


def feature_extractor() -> Wav2Vec2FeatureExtractor:
    """What turns audio into the model's input: 16 kHz, zero mean and unit variance, padding at the end."""
    return Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=SAMPLING_RATE, padding_value=0.0, do_normalize=True, return_attention_mask=True
    )


def save_model(model: DinoSRForPreTraining, folder: str | os.PathLike) -> Path:
    """
    Write a folder that `from_pretrained` opens: weights, configuration, code, feature extractor.

    The files are written aside first, and then moved, so that a file that is there is whole.

    Args:
        model: What to save, teacher and codebooks included.
        folder: Where to; made if it does not exist. Files of other names in it stay.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder, prefix=".unfinished-"))
    try:
        model.save_pretrained(aside)
        feature_extractor().save_pretrained(aside)
        mode = (aside / "config.json").stat().st_mode  # safetensors writes for the owner alone
        for file in sorted(aside.iterdir()):
            file.chmod(mode)
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def append_metrics(folder: str | os.PathLike, metrics: Mapping[str, Any]) -> None:
    """Add a line to the run's `metrics.jsonl`."""
    with open(Path(folder) / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")
