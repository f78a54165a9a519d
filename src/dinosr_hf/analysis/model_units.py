"""
Units of a model in evaluation mode, frame by frame, and tables of their phones.

`S` samples, `T` frames, `D` hidden size, `N` codebooks, `V` codewords, `P` phones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..model.configuration_dinosr import DinoSRConfig
from ..model.modeling_dinosr import DinoSRForPreTraining, normalize_over_time
from .quality import contingency

Source = Literal["student", "teacher", "anchor"]


class LabelledSpeech(NamedTuple):
    """An utterance to evaluate units on."""

    waveform: NDArray[np.float32]  # (S,) at 16 kHz, normalised as for the model
    labels: Sequence[str]  # (T,), phone of each frame


def target_features(model: DinoSRForPreTraining, waveform: NDArray[np.float32]) -> torch.Tensor:
    """Return what the codebooks cluster of an utterance (S,): the teacher's normalised layers, float32 (N, T, D)."""
    layers = model.config.codebook_layers
    input_values = torch.from_numpy(waveform)[None].to(model.device)  # (1, S)
    features = model.layer_features(input_values, layers=layers, source="teacher")  # (N, 1, T, D)
    return normalize_over_time(features, None)[:, 0]


def unit_layers(config: DinoSRConfig, source: str) -> list[int]:
    """Return the layers, from 1, with units of a source: those with a codebook, or for "anchor" the last one."""
    return [config.num_hidden_layers] if source == "anchor" else list(config.codebook_layers)


def frame_units(
    model: DinoSRForPreTraining, waveform: NDArray[np.float32], source: Source = "teacher"
) -> torch.Tensor:
    """
    Return the units of an utterance (S,) from every codebook, int64 (N, T), as `encode_units` does.

    From the teacher: the nearest codewords, which the student is trained on. From the student: the most probable ones.
    From the anchor: its head's most probable labels, (1, T).
    """
    input_values = torch.from_numpy(waveform)[None].to(model.device)  # (1, S)
    codes, _ = model.encode_units(input_values, layers=unit_layers(model.config, source), source=source)
    return codes[:, 0]


def layer_tables(
    model: DinoSRForPreTraining, speech: Iterable[LabelledSpeech]
) -> tuple[list[NDArray[np.int64]], list[str]]:
    """
    Count how often each phone occurs with each of the teacher's units: int64 (P, V) by codebook, and the P phones.

    Raises `ValueError` if an utterance has not one label per frame, or there is no utterance.
    """
    utterances = list(speech)
    if not utterances:
        raise ValueError("There is no utterance to evaluate the units on. Give at least one.")
    labels = [phone for utterance in utterances for phone in utterance.labels]
    codes = [frame_units(model, utterance.waveform).cpu().numpy() for utterance in utterances]
    joined = np.concatenate(codes, axis=1)  # (N, T)
    tables = [contingency(labels, layer, num_codes=model.config.codebook_size) for layer in joined]
    return [table for table, _ in tables], tables[0][1]
