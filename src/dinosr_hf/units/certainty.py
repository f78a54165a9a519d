"""
Units with how sure the model is of each.

`T` frames, `D` hidden size, `V` codewords.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..data import SAMPLING_RATE, SpeechSource
from ..model.modeling_dinosr import DinoSRForPreTraining
from ..model.units_dinosr import check_layers
from .extraction import Progress, UnitExtractor

# Rows of a recording that are scored at once.
_ROWS_AT_ONCE = 10_000


class ScoredUnits(NamedTuple):
    """
    Units of a recording, of one layer.

    Attributes:
        id: Of the recording.
        codes: int64 (T,).
        scores: float32 (T,), more is surer. Of the student the probability of the unit by the layer's head; of the
            teacher minus the distance between its output and the codeword, which is the root of the mean square
            over the D dimensions.
    """

    id: str
    codes: NDArray[np.int64]
    scores: NDArray[np.float32]


def _score(model: DinoSRForPreTraining, rows: torch.Tensor, layer: int, source: str) -> tuple[torch.Tensor, ...]:
    """Codes and scores (T,) of features (T, D)."""
    number = layer - model.config.codebook_layers[0]
    if source == "student":
        best = model.heads[number](rows.to(model.dtype)).float().softmax(dim=-1).max(dim=-1)
        return best.indices, best.values
    codes = model.codebooks.assign(rows[None], [number])[0]
    distance = (rows - model.codebooks.codewords[number][codes]).square().mean(dim=-1).sqrt()
    return codes, -distance


@torch.no_grad()
def scored_units(
    model: DinoSRForPreTraining,
    recordings: SpeechSource,
    *,
    layer: int = 5,
    source: str = "student",
    batch_seconds: float = 120.0,
    on_progress: Progress = None,
) -> Iterator[ScoredUnits]:
    """
    Units of all recordings, as `UnitExtractor.units` gives them, with their scores.

    Args:
        model: In any precision, on any device; put into evaluation mode.
        recordings: As `open_source` or `open_recordings` opens them.
        layer: Transformer layer that has a codebook, the lowest is 1.
        source: "student" or "teacher", see `DinoSRForPreTraining.encode_units`.
        batch_seconds: Audio of a batch, padding included.
        on_progress: Called after each batch with the seconds of audio that it was.

    Yields:
        `ScoredUnits`, the longest recording first; none of recordings that cannot be read, which are warned of.

    Raises:
        ValueError: If the layer has no codebook, or there is no such source.
    """
    check_layers(model.config, [layer], with_codebooks=True)
    # The heads stand on the student's last layer.
    features_of = model.config.num_hidden_layers if source == "student" else layer
    if model.config.reference_padding:
        # Padding would reach into the features: two frames are less than two recordings.
        batch_seconds = 2 * model.config.inputs_to_logits_ratio / SAMPLING_RATE
    extractor = UnitExtractor(
        model,
        layers=[features_of],
        source=source,
        batch_seconds=batch_seconds,
    )
    for name, rows in extractor.features(recordings, on_progress=on_progress):
        pieces = [
            _score(
                model,
                torch.from_numpy(np.array(rows[start : start + _ROWS_AT_ONCE, 0])).to(model.device),
                layer,
                source,
            )
            for start in range(0, len(rows), _ROWS_AT_ONCE)
        ]
        codes = [piece.cpu().numpy() for piece, _ in pieces] or [np.empty(0, np.int64)]
        scores = [piece.float().cpu().numpy() for _, piece in pieces] or [np.empty(0, np.float32)]
        yield ScoredUnits(name, np.concatenate(codes), np.concatenate(scores))
