"""
Units and features of recordings of any length, by codebooks or by k-means.

`B` batch, `S` samples at 16 kHz, `T` frames, `D` hidden size, `L` layers, `K` clusters.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ..analysis.kmeans import MAX_FRAMES, check_num_clusters, fit_kmeans
from ..data import SAMPLING_RATE, SpeechSource
from ..inference.windowed import RunningMoments, WindowedInference, model_batch, without_padding
from ..model.configuration_dinosr import DinoSRConfig
from ..model.modeling_dinosr import (
    SOURCES,
    UNIT_SOURCES,
    DinoSRForPreTraining,
    check_layers,
    check_source,
    check_unit_layers,
)
from ..utils.digests import model_digest
from ..utils.extras import import_extra
from ..utils.model_folder import has_codebooks, open_config, open_weights, torch_dtype
from .layer_kmeans import LayerKMeans

Progress = Callable[[float], Any] | None


class Units(NamedTuple):
    """Units of the recording `id`: `codes` int64 (L, T), one per layer and frame."""

    id: str
    codes: NDArray[np.int64]


class ScoredUnits(NamedTuple):
    """Units of the recording `id` in one layer, with scores of which higher is surer, see `scored_units`."""

    id: str
    codes: NDArray[np.int64]  # (T,)
    scores: NDArray[np.float32]  # (T,)


def load_model(
    name: str | Path, *, device: str | torch.device = "cpu", dtype: str = "float32"
) -> DinoSRForPreTraining:
    """
    Load a pre-training checkpoint from a folder or the Hub, in evaluation mode.

    `dtype` is "float32", "bfloat16" or "float16"; the codebooks stay in float32. Raises `ValueError` if it is another,
    or the model is not a pre-training checkpoint.
    """
    precision = torch_dtype(dtype)
    config = open_config(name, "Give the folder that pre-training wrote.")
    if not has_codebooks(config):
        kinds = ", ".join(config.architectures or ["no known architecture"])
        raise ValueError(
            f"{name} has {kinds}, but units come from a DinoSRForPreTraining, which has a teacher and codebooks. Give"
            " the folder that pre-training wrote."
        )
    model: DinoSRForPreTraining = open_weights(DinoSRForPreTraining, name, device=device, dtype=precision)
    return model.eval()


def _chunks(rows: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Views of at most 10,000 of the rows (T, ...), which may be a memory-mapped file; one empty view if T is 0."""
    return (rows[start : start + 10_000] for start in range(0, max(1, len(rows)), 10_000))


def _normalize_rows(rows: NDArray[np.float32]) -> None:
    """Normalise rows (T, ...) to zero mean and unit variance over time (paper, Section 3.1), in place."""
    moments = RunningMoments(parts=_chunks(rows))
    for chunk in _chunks(rows):
        chunk[:] = (chunk - moments.mean) * (1 / np.sqrt(moments.variance + 1e-5))


class LayerExtractor(ABC):
    """
    Extracts features of a model's transformer layers from recordings, and their clusters as units.

    A recording longer than a window is cut into windows with context (`WindowedInference`).

    Args:
        model: In any precision, on any device; it is put into evaluation mode.
        config: A configuration with the layers, sizes and frames of the model.
        layers: Numbers of its transformer layers, from 1.
        source: Says what the features are taken from, one of `SOURCES`; for units alone, "anchor".
        is_smoothed: Whether the student's features are normalised over the recording, as the teacher's always are, and
            averaged over three frames. Their clusters tell more of phones and less of speakers. The teacher's are not
            averaged, whatever this says.
        normalizes: Whether the model expects samples of zero mean and unit variance.
        is_padding_safe: Whether its outputs are independent of padding; if not, a batch is one window.
        windows: `window_seconds`, `context_seconds` and `batch_seconds` of `WindowedInference`.
    """

    model: PreTrainedModel

    def __init__(
        self,
        model: PreTrainedModel,
        config: DinoSRConfig,
        *,
        layers: list[int],
        source: str,
        is_smoothed: bool,
        normalizes: bool,
        is_padding_safe: bool,
        **windows: float,
    ) -> None:
        if is_smoothed and source == "anchor":
            raise ValueError("is_smoothed applies to features, and source='anchor' has none. Leave it out.")
        self.model, self.config, self.layers, self.source = model.eval(), config, layers, source
        self.is_smoothed = is_smoothed and source != "teacher"
        if not is_padding_safe:
            windows["batch_seconds"] = 2 * self.frame_seconds
        self._runner = WindowedInference(config, normalizes=normalizes, **windows)

    @abstractmethod
    def _layer_features(self, waves: Sequence[np.ndarray]) -> tuple[torch.Tensor, list[int]]:
        """Compute features float32 (B, T, L, D) of waves (S,), and their numbers of frames."""

    @property
    def unreadable(self) -> dict[str, str]:
        """Id -> error message of the recordings that the last `units` or `features` could not read."""
        return self._runner.unreadable

    @property
    def name(self) -> str:
        """Folder of the model, or its name on the Hub."""
        return str(self.model.name_or_path)

    @property
    def about_model(self) -> dict[str, str]:
        """The model's precision, and the digest of its weights in that, which is the same wherever the model is."""
        return {"dtype": self._dtype, "model_sha256": model_digest(self.model)}

    @property
    def _dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def settings(self) -> dict[str, Any]:
        """What units and features depend on, apart from the layers; the model by its digest, so it can be moved."""
        return {**self.about_model, "source": self.source, "is_smoothed": self.is_smoothed, **self._runner.settings}

    @property
    def frame_seconds(self) -> float:
        """Seconds from one unit to the next: 0.02 for the base model."""
        return self.config.inputs_to_logits_ratio / SAMPLING_RATE

    def check_kmeans(self, kmeans: LayerKMeans) -> None:
        """
        Raise `ValueError` unless clusters are of this layer, source and model.

        Models are compared if they have the precision in which the clusters were fitted.
        """
        dimensions = (kmeans.centroids.shape[1], self.config.hidden_size)
        if self.layers != [kmeans.layer] or self.source != kmeans.source or dimensions[0] != dimensions[1]:
            raise ValueError(
                f"k-means is of layer {kmeans.layer} of the {kmeans.source} with {dimensions[0]} dimensions, but"
                f" units were asked for of layers {self.layers} of the {self.source} with {dimensions[1]}. Use it"
                " with the layer, source and model that it was fitted on."
            )
        if kmeans.is_smoothed != self.is_smoothed:
            raise ValueError(
                f"k-means was fitted with is_smoothed={kmeans.is_smoothed}, but the extractor has"
                f" is_smoothed={self.is_smoothed}. Use the same."
            )
        if kmeans.dtype != self._dtype:
            return
        digest = model_digest(self.model)
        if kmeans.model_sha256 != digest:
            raise ValueError(
                f"k-means was fitted on another model: its digest is {kmeans.model_sha256}, and that of"
                f" {self.name or 'this one'} is {digest}. Use it with the model that it was fitted on, or fit it"
                " again."
            )

    def check_features(self) -> None:
        """Raise `ValueError` if the source has no features."""
        if self.source not in SOURCES:
            raise ValueError(
                f"source={self.source} has units, but no features. Give {', '.join(SOURCES[:-1])} or {SOURCES[-1]}."
            )

    def units(
        self,
        recordings: SpeechSource,
        *,
        kmeans: LayerKMeans,
        indices: Sequence[int] | None = None,
        on_progress: Progress = None,
    ) -> Iterator[Units]:
        """
        Extract the units of recordings, the longest first, each as soon as they are complete.

        Recordings that cannot be read are skipped with a warning and listed in `unreadable`; one shorter than a frame
        has no codes.

        Args:
            recordings: As `open_source` or `open_recordings` opens them.
            kmeans: Clusters to use as units, see `check_kmeans`.
            indices: Indices of the recordings to process; None: all.
            on_progress: Called after each batch with its seconds of audio, without context.
        """
        self.check_kmeans(kmeans)
        if self.source == "teacher" or self.is_smoothed:
            yield from self._units_of_features(recordings, lambda rows: kmeans.assign(rows).T, indices, on_progress)
            return

        def assign(waves: Sequence[np.ndarray]) -> list[np.ndarray]:
            features, num_frames = self._layer_features(waves)
            return without_padding(kmeans.assign(features).int(), num_frames)

        yield from self._units_of_windows(recordings, assign, indices, on_progress)

    def _units_of_windows(
        self,
        recordings: SpeechSource,
        assign: Callable[[Sequence[np.ndarray]], list[np.ndarray]],
        indices: Sequence[int] | None,
        on_progress: Progress,
    ) -> Iterator[Units]:
        """Yield the units that `assign` computes, int32 (T, L) for each wave (S,)."""
        for index, rows in self._runner.run(recordings, assign, indices=indices, on_progress=on_progress):
            codes = np.empty((0, len(self.layers))) if rows is None else rows
            yield Units(recordings.utterances[index].id, codes.T.astype(np.int64))

    def _units_of_features(
        self,
        recordings: SpeechSource,
        assign: Callable[[torch.Tensor], torch.Tensor],
        indices: Sequence[int] | None,
        on_progress: Progress,
    ) -> Iterator[Units]:
        """Yield the units (L, T) that `assign` finds for features (T, L, D), which need the complete recording."""
        for name, features in self.features(recordings, indices=indices, on_progress=on_progress):
            found = [assign(torch.tensor(chunk, device=self.model.device)).cpu() for chunk in _chunks(features)]
            yield Units(name, torch.cat(found, dim=1).numpy())

    def features(
        self, recordings: SpeechSource, *, indices: Sequence[int] | None = None, on_progress: Progress = None
    ) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """
        Extract the continuous features of recordings, float32 (T, L, D) each; the arguments are those of `units`.

        Features are the student's layer outputs, as they are or `is_smoothed`, or what the teacher's codebooks
        cluster, normalised over the recording. Hours of features are a memory-mapped temporary file. Raises
        `ValueError` as `check_features`.
        """
        self.check_features()
        for index, rows in self._runner.run(recordings, self._features, indices=indices, on_progress=on_progress):
            if rows is None:
                rows = np.empty((0, len(self.layers), self.config.hidden_size), np.float32)
            elif self.source == "teacher" or self.is_smoothed:
                _normalize_rows(rows)
                if self.is_smoothed:
                    filters = import_extra("scipy.ndimage", "analysis")
                    filters.uniform_filter1d(rows, 3, axis=0, mode="nearest", output=rows)
            yield recordings.utterances[index].id, rows

    def _features(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        return without_padding(*self._layer_features(waves))


class UnitExtractor(LayerExtractor):
    """
    Extracts units or features from recordings with a pre-training checkpoint.

    The samples of a recording are normalised by its mean and variance. Raises `ValueError` if the model has no such
    layer, or the source or a number of seconds is out of range.

    Args:
        model: As for `LayerExtractor`.
        layers: Numbers of transformer layers, from 1; units by codebook need layers that have one. None:
            `DinoSRConfig.default_layer`.
        source: "student" or "teacher"; for units alone "anchor", see `DinoSRForPreTraining.encode_units`; for features
            and k-means alone "student_feed_forward", the output of the layer's feed-forward network.
        is_smoothed: As for `LayerExtractor`.
        windows: As for `LayerExtractor`. If the model has `reference_padding`, a batch is one window.
    """

    model: DinoSRForPreTraining

    def __init__(
        self,
        model: DinoSRForPreTraining,
        *,
        layers: Sequence[int] | None = None,
        source: str = "student",
        is_smoothed: bool = False,
        **windows: float,
    ) -> None:
        check_source(source, (*UNIT_SOURCES, "student_feed_forward"))
        config = model.config
        layers = [config.default_layer(source)] if layers is None else layers
        if source == "anchor":
            layers = check_unit_layers(config, layers, source)
        else:
            layers = check_layers(config, layers, with_codebooks=False)
        super().__init__(
            model,
            config,
            layers=layers,
            source=source,
            is_smoothed=is_smoothed,
            normalizes=True,
            is_padding_safe=not config.reference_padding,
            **windows,
        )

    def check_units(self, kmeans: LayerKMeans | None) -> None:
        """Raise `ValueError` if k-means does not fit, see `check_kmeans`, or a layer has no units without it."""
        if kmeans is not None:
            self.check_kmeans(kmeans)
            return
        if self.source not in UNIT_SOURCES:
            raise ValueError(
                f"source={self.source} has features and no units of its own. Give k-means of it, or extract features."
            )
        if self.is_smoothed:
            raise ValueError("is_smoothed applies to features and k-means, not to codewords. Leave it out.")
        check_unit_layers(self.config, self.layers, self.source)

    def units(
        self,
        recordings: SpeechSource,
        *,
        kmeans: LayerKMeans | None = None,
        indices: Sequence[int] | None = None,
        on_progress: Progress = None,
    ) -> Iterator[Units]:
        """
        Extract the units of recordings as `LayerExtractor.units` does.

        Without `kmeans` they are codewords or the anchor's labels, see `check_units`.
        """
        if kmeans is not None:
            yield from super().units(recordings, kmeans=kmeans, indices=indices, on_progress=on_progress)
            return
        self.check_units(None)
        if self.source == "teacher":
            yield from self._units_of_features(recordings, self._teacher_units, indices, on_progress)
        else:
            yield from self._units_of_windows(recordings, self._codes, indices, on_progress)

    def _layer_features(self, waves: Sequence[np.ndarray]) -> tuple[torch.Tensor, list[int]]:
        values, mask, num_frames = model_batch(self.model, waves)
        found = self.model.layer_features(values, mask, self.layers, self.source)
        return found.permute(1, 2, 0, 3).float(), num_frames

    def _codes(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Compute the student's or the anchor's units int32 (T, L) of each wave (S,)."""
        values, mask, num_frames = model_batch(self.model, waves)
        codes = self.model.encode_units(values, mask, layers=self.layers, source=self.source)[0]
        return without_padding(codes.permute(1, 2, 0).int(), num_frames)

    def _teacher_units(self, features: torch.Tensor) -> torch.Tensor:
        """Assign normalised features (T, L, D) to codewords (L, T)."""
        return self.model.teacher_units(features.transpose(0, 1), self.layers)


@torch.no_grad()
def scored_units(
    model: DinoSRForPreTraining,
    recordings: SpeechSource,
    *,
    layer: int | None = None,
    source: str = "student",
    batch_seconds: float = 120.0,
    on_progress: Progress = None,
) -> Iterator[ScoredUnits]:
    """
    Extract the units of a layer, by default `DinoSRConfig.default_layer`, with their scores; the longest recording
    comes first.

    Scores of student and anchor are the probabilities that the head gives the units; those of the teacher minus the
    distances from its output to the codewords, the root mean square over the D dimensions. The arguments are those of
    `UnitExtractor` and its `units`, for a single layer, which must have units of the source (else `ValueError`).
    """
    layer = model.config.default_layer(source) if layer is None else layer
    check_unit_layers(model.config, [layer], source)
    feature_layers, features_of = model.unit_features([layer], source)
    extractor = UnitExtractor(model, layers=feature_layers, source=features_of, batch_seconds=batch_seconds)
    for name, features in extractor.features(recordings, on_progress=on_progress):
        codes, scores = [], []
        for chunk in _chunks(features[:, 0]):
            rows = torch.tensor(chunk, device=model.device)  # (T, D)
            if source == "teacher":
                chunk_codes = model.teacher_units(rows[None], [layer])[0]
                codewords = model.codebooks.codewords[layer - model.config.codebook_layers[0]]
                chunk_scores = -(rows - codewords[chunk_codes]).square().mean(dim=-1).sqrt()
            else:
                logits = model.unit_head(layer, source)(rows.to(model.dtype))
                chunk_scores, chunk_codes = logits.float().softmax(dim=-1).max(dim=-1)
            codes.append(chunk_codes.cpu().numpy())
            scores.append(chunk_scores.cpu().numpy())
        yield ScoredUnits(name, np.concatenate(codes), np.concatenate(scores))


def fit_layer_kmeans(
    extractor: LayerExtractor,
    recordings: SpeechSource,
    num_clusters: int = 100,
    *,
    max_frames: int = MAX_FRAMES,
    seed: int = 0,
    on_progress: Progress = None,
) -> LayerKMeans:
    """
    Cluster the features of an extractor's single layer with `analysis.kmeans.fit_kmeans`.

    `max_frames` frames are drawn at random from all recordings and kept in memory; `seed` is that of the draw and of
    k-means. Raises `ValueError` if the extractor has several layers, or there are fewer frames than clusters;
    `ImportError` if scikit-learn is not installed.
    """
    if len(extractor.layers) != 1:
        raise ValueError(f"k-means clusters a single layer, but layers are {extractor.layers}. Give one layer.")
    import_extra("sklearn.cluster", "analysis", "K-means")  # fail before the features are computed
    total = sum(int(extractor.config.num_frames(utterance.num_samples)) for utterance in recordings.utterances)
    check_num_clusters(num_clusters, min(total, max_frames))
    share = min(1.0, max_frames / max(1, total))
    generator = np.random.default_rng(seed)
    drawn = [np.empty((0, extractor.config.hidden_size), np.float32)]
    for _, rows in extractor.features(recordings, on_progress=on_progress):
        drawn.append(np.array(rows[generator.random(len(rows)) < share, 0]))
    clusters = fit_kmeans(np.concatenate(drawn), num_clusters, seed, max_frames=max_frames)
    about: dict[str, Any] = {"source": extractor.source, "is_smoothed": extractor.is_smoothed, **extractor.about_model}
    return LayerKMeans(clusters.centroids, extractor.layers[0], **about)
