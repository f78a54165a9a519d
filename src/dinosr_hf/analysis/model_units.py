"""
The units of a model, frame by frame, and how well they tell phones apart.

`S` samples, `T` frames, `D` hidden size, `N` codebooks, `V` codewords, `P` phones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..model.modeling_dinosr import DinoSRForPreTraining
from .quality import UnitQuality, contingency

Source = Literal["student", "teacher"]


class LabelledSpeech(NamedTuple):
    """
    An utterance to judge units on.

    Attributes:
        waveform: float32 (S,) at 16 kHz, normalised as for the model.
        labels: The phone of each frame, (T,).
    """

    waveform: NDArray[np.float32]
    labels: Sequence[str]


@torch.no_grad()
def target_features(model: DinoSRForPreTraining, waveform: NDArray[np.float32]) -> torch.Tensor:
    """
    What the codebooks cluster: the teacher's top layers, normalised over the utterance.

    Args:
        model: In evaluation mode.
        waveform: float32 (S,).

    Returns:
        float32 (N, T, D).
    """
    input_values = torch.from_numpy(waveform)[None].to(model.device)
    features = model.dinosr.feature_extractor(input_values).transpose(1, 2)
    _, normalised = model.dinosr.feature_projection(features)
    return model.compute_targets(input_values, normalised)[:, 0]


@torch.no_grad()
def frame_units(
    model: DinoSRForPreTraining, waveform: NDArray[np.float32], source: Source = "teacher"
) -> torch.Tensor:
    """
    Units of a whole utterance, from every codebook.

    Args:
        model: In evaluation mode.
        waveform: float32 (S,).
        source: "teacher": the nearest codeword of each layer's codebook, which is what the student is trained on.
            "student": the most probable codeword by each head, from the unmasked utterance.

    Returns:
        int64 (N, T).
    """
    input_values = torch.from_numpy(waveform)[None].to(model.device)
    codes, _ = model.encode_units(input_values, layers=model.config.codebook_layers, source=source)
    return codes[:, 0]


def layer_tables(
    model: DinoSRForPreTraining, speech: Iterable[LabelledSpeech], source: Source = "teacher"
) -> tuple[list[NDArray[np.int64]], list[str]]:
    """
    Count how often each phone meets each codeword.

    Args:
        model: In evaluation mode.
        speech: Utterances with labels.
        source: As for `frame_units`.

    Returns:
        A table int64 (P, V) for each codebook, lowest layer first, and the P phones.

    Raises:
        ValueError: If an utterance has not one label a frame, or there is no utterance.
    """
    labels: list[str] = []
    codes: list[NDArray[np.int64]] = []
    for waveform, phones in speech:
        labels += phones
        codes.append(frame_units(model, waveform, source).cpu().numpy())
    if not codes:
        raise ValueError("There is no utterance to judge the units on. Give at least one.")
    joined = np.concatenate(codes, axis=1)
    tables = [contingency(labels, layer, num_codes=model.config.codebook_size) for layer in joined]
    return [table for table, _ in tables], list(tables[0][1])


def layer_qualities(
    model: DinoSRForPreTraining, speech: Iterable[LabelledSpeech], source: Source = "teacher"
) -> list[UnitQuality]:
    """All metrics of every codebook, lowest layer first; arguments and errors as for `layer_tables`."""
    tables, _ = layer_tables(model, speech, source)
    return [UnitQuality.from_table(table) for table in tables]
