"""
Recordings of any length to units, or to the features of layers.

`S` samples at 16 kHz, `T` frames, `D` hidden size, `L` layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from ..data import SpeechSource
from ..inference.windowed import DTYPES, WindowedInference, mean_and_variance, pad_batch
from ..model.configuration_dinosr import DinoSRConfig
from ..model.modeling_dinosr import DinoSRForPreTraining
from ..model.units_dinosr import check_layers, check_source
from ..utils.model_folder import open_config
from .kmeans import LayerKMeans

Progress = Callable[[float], Any] | None

# Rows of a recording that are on the model's device at once, after the model.
_ROWS_AT_ONCE = 10_000


class Units(NamedTuple):
    """
    Units of a recording.

    Attributes:
        id: Of the recording.
        codes: int64 (L, T), one a frame and layer.
    """

    id: str
    codes: NDArray[np.int64]


def has_codebooks(config: PreTrainedConfig) -> bool:
    """Whether it is the configuration of a pre-training checkpoint, which has teacher and codebooks."""
    return config.model_type == DinoSRConfig.model_type and "DinoSRForPreTraining" in (config.architectures or ())


def load_model(
    name: str | Path, *, device: str | torch.device = "cpu", dtype: str = "float32"
) -> DinoSRForPreTraining:
    """
    A pre-training checkpoint, in evaluation mode.

    Args:
        name: Folder, or name on the Hub.
        device: Where the model runs.
        dtype: "float32", "bfloat16" or "float16"; codebooks are float32 in any case.

    Raises:
        ValueError: If it is no pre-training checkpoint, or for another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown. Choose one of {', '.join(DTYPES)}.")
    config = open_config(name, "Give the folder that pre-training leaves.")
    if not has_codebooks(config):
        kinds = config.architectures or ["nothing known"]
        raise ValueError(
            f"{name} has {', '.join(kinds)}, but units come from a DinoSRForPreTraining, which has teacher and"
            " codebooks. Give the folder that pre-training leaves."
        )
    model: Any = DinoSRForPreTraining.from_pretrained(name, dtype=DTYPES[dtype])
    return model.to(device).eval()


def normalize_rows(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """
    Instance norm in place, piece by piece: zero mean and unit variance over time (paper, Section 3.1).

    Args:
        rows: float32 (T, ...); may be a file in memory.

    Returns:
        The same array.
    """
    pieces = [slice(start, start + _ROWS_AT_ONCE) for start in range(0, len(rows), _ROWS_AT_ONCE)]
    mean, variance = mean_and_variance(rows[piece] for piece in pieces)
    factor = 1 / np.sqrt(variance + 1e-5)
    for piece in pieces:
        rows[piece] = (rows[piece] - mean) * factor
    return rows


class UnitExtractor:
    """
    A model with all that it needs from recordings to units.

    A recording longer than a window is cut into windows with context (`recordings`), its samples normalised by mean
    and variance of the whole; the teacher's output is normalised over the whole recording too, once all its windows
    are there.

    Args:
        model: In any precision, on any device; put into evaluation mode.
        layers: Transformer layers, the lowest is 1; for units those that have a codebook.
        source: "student" or "teacher", see `DinoSRForPreTraining.encode_units`.
        window_seconds: Audio that the model sees at once, at most, context included.
        context_seconds: Audio on each side of a part of a recording that is longer than a window.
        batch_seconds: Audio of a batch, padding included; a longer window is a batch of its own. With
            `reference_padding` every one is.

    Raises:
        ValueError: If the model has no such layer, there is no such source, or a number of seconds cannot be.
    """

    def __init__(
        self,
        model: DinoSRForPreTraining,
        *,
        layers: Sequence[int] = (5,),
        source: str = "student",
        window_seconds: float = 30.0,
        context_seconds: float = 5.0,
        batch_seconds: float = 120.0,
    ) -> None:
        check_source(source)
        self.model, self.config = model.eval(), model.config
        self.layers = check_layers(model.config, layers, with_codebooks=False)
        self.source = source
        self._runner = WindowedInference(
            model.config,
            window_seconds=window_seconds,
            context_seconds=context_seconds,
            # With the authors' padding, what comes out depends on the batch: then each recording is one by itself.
            batch_seconds=2 * self.frame_seconds if model.config.reference_padding else batch_seconds,
        )

    @property
    def unreadable(self) -> dict[str, str]:
        """Id -> message of recordings that could not be read, filled by `units` and `features`."""
        return self._runner.unreadable

    @property
    def frame_seconds(self) -> float:
        """Seconds from one unit to the next: 0.02 for the base model."""
        return self.config.inputs_to_logits_ratio / 16_000

    def units(
        self,
        recordings: SpeechSource,
        *,
        kmeans: LayerKMeans | None = None,
        indices: Sequence[int] | None = None,
        on_progress: Progress = None,
    ) -> Iterator[Units]:
        """
        Units of all recordings, the longest first; those that cannot be read are left out and stand in `unreadable`.

        Args:
            recordings: As `open_source` or `open_recordings` opens them.
            kmeans: Its clusters are the units, instead of codewords; for its own layer and source only.
            indices: Of the recordings to take; None: all.
            on_progress: Called after each batch with the seconds of audio, without context, that it was.

        Yields:
            `Units`, each recording's as soon as they are there; of none shorter than a frame.

        Raises:
            ValueError: If a layer has no codebook, or k-means is of another layer or source.
        """
        if kmeans is not None:
            kmeans.check(self.layers, self.source, self.config.hidden_size)
        else:
            check_layers(self.config, self.layers, with_codebooks=True)
        is_whole = self.source == "student"  # else the units wait for the mean of the whole recording
        compute = self._features if not is_whole else self._codes if kmeans is None else self._clusters(kmeans)
        for index, rows in self._runner.run(recordings, compute, indices=indices, on_progress=on_progress):
            if rows is None:
                codes = np.empty((len(self.layers), 0), np.int64)
            elif is_whole:
                codes = rows.T.astype(np.int64)
            else:
                codes = self._nearest(normalize_rows(rows), kmeans)
            yield Units(recordings.utterances[index].id, codes)

    def features(
        self, recordings: SpeechSource, *, indices: Sequence[int] | None = None, on_progress: Progress = None
    ) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """
        Continuous features of all recordings, as `units` gives units.

        Yields:
            Id of a recording and its features float32 (T, L, D): of the student the layers' output, of the teacher
            what the codebooks cluster, normalised over the recording. Hours of them are an array in a file, which
            goes with the array.
        """
        for index, rows in self._runner.run(recordings, self._features, indices=indices, on_progress=on_progress):
            if rows is None:
                rows = np.empty((0, len(self.layers), self.config.hidden_size), np.float32)
            elif self.source == "teacher":
                rows = normalize_rows(rows)
            yield recordings.utterances[index].id, rows

    def _batch(self, waves: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        values, mask = pad_batch(waves)
        num_frames = self.config.num_frames(mask.sum(dim=1)).tolist()
        return values.to(self.model.device, self.model.dtype), mask.to(self.model.device), num_frames

    def _codes(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """int32 (T, L) of each wave (S,)."""
        values, mask, num_frames = self._batch(waves)
        codes, _ = self.model.encode_units(values, mask, layers=self.layers, source="student")
        rows = codes.permute(1, 2, 0).int().cpu().numpy()
        return [row[:length] for row, length in zip(rows, num_frames, strict=True)]

    def _layer_features(self, waves: Sequence[np.ndarray]) -> tuple[torch.Tensor, list[int]]:
        values, mask, num_frames = self._batch(waves)
        found = self.model.layer_features(values, mask, self.layers, self.source)
        return found.permute(1, 2, 0, 3).float(), num_frames

    def _features(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """float32 (T, L, D) of each wave (S,)."""
        found, num_frames = self._layer_features(waves)
        rows = found.cpu().numpy()
        return [row[:length] for row, length in zip(rows, num_frames, strict=True)]

    def _clusters(self, kmeans: LayerKMeans) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
        def compute(waves: Sequence[np.ndarray]) -> list[np.ndarray]:
            found, num_frames = self._layer_features(waves)
            rows = kmeans.assign(found).int().cpu().numpy()  # (B, T, 1)
            return [row[:length] for row, length in zip(rows, num_frames, strict=True)]

        return compute

    def _nearest(self, rows: NDArray[np.float32], kmeans: LayerKMeans | None) -> NDArray[np.int64]:
        """Normalised features (T, L, D) to codes (L, T)."""
        found = []
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            piece = torch.from_numpy(np.array(rows[start : start + _ROWS_AT_ONCE])).to(self.model.device)
            if kmeans is None:
                codes = self.model.teacher_units(piece.transpose(0, 1), self.layers)
            else:
                codes = kmeans.assign(piece).T
            found.append(codes.cpu().numpy())
        return np.concatenate(found, axis=1)
