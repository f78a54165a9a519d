"""
Units and features of recordings of any length, by codebooks or by k-means.

`B` batch, `S` samples at 16 kHz, `T` frames, `D` hidden size, `L` layers, `K` clusters.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from transformers import PreTrainedModel

from ..analysis.kmeans import MAX_FRAMES, KMeans, fit_kmeans
from ..data import SAMPLING_RATE, SpeechSource
from ..inference.windowed import RunningMoments, WindowedInference, model_batch, without_padding
from ..model.modeling_dinosr import (
    SOURCES,
    UNIT_SOURCES,
    DinoSRForPreTraining,
    check_layers,
    check_source,
    check_unit_layers,
)
from ..utils.damaged_files import explain_damage, safetensors_shapes
from ..utils.digests import model_digest, value_digest
from ..utils.extras import import_extra
from ..utils.files import write_atomically
from ..utils.model_folder import has_codebooks, open_config, open_weights, torch_dtype
from ..utils.names import one_line
from ..utils.text_files import check_regular_file

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


@dataclass(frozen=True)
class LayerKMeans(KMeans):
    """Clusters of the features of a transformer layer, counted from 1; `source` is that of `UnitExtractor`."""

    layer: int
    source: str
    is_smoothed: bool = False  # as for `UnitExtractor`
    # Of the model that they were fitted on; None: not known, as in files of earlier releases.
    dtype: str | None = None
    model_sha256: str | None = None

    @property
    def digest(self) -> str:
        """Digest of the clusters and of what they are clusters of, whatever file they come from."""
        return value_digest([self.layer, self.source, self.is_smoothed, self.centroids.tolist()])

    def save(self, file: str | Path) -> Path:
        """Write a safetensors file atomically, and return its path."""
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        about = {name: value for name, value in vars(self).items() if name != "centroids"}
        metadata = {"kmeans": json.dumps(about)}
        return write_atomically(file, save({"centroids": np.ascontiguousarray(self.centroids)}, metadata=metadata))

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """Read a file that `save` wrote. Raises `ValueError` for any other file, and for centroids that are none."""
        try:
            check_regular_file(file)
            safetensors_shapes(file)  # refuses what would take long
            with safe_open(file, "numpy") as opened:
                about = json.loads((opened.metadata() or {})["kmeans"])
                kmeans = cls(np.asarray(opened.get_tensor("centroids"), dtype=np.float32), **about)
                kmeans.check()
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            damage = explain_damage(file) if Path(file).is_file() else None
            problem = damage or f"{file} is not a k-means file: {one_line(error)}."
            raise ValueError(f"{problem} Give a file that `dinosr kmeans` wrote.") from error
        return kmeans

    def check(self) -> None:
        """Raise `ValueError` unless the fields are those of clusters."""
        if self.centroids.ndim != 2 or 0 in self.centroids.shape:
            raise ValueError(f"its centroids have shape {self.centroids.shape}; expected (clusters, hidden size)")
        if not np.isfinite(self.centroids).all():
            raise ValueError("its centroids are not all finite: fit them again")
        is_layer = isinstance(self.layer, int) and self.layer >= 1
        if not is_layer or self.source not in SOURCES or not isinstance(self.is_smoothed, bool):
            found = f"layer={self.layer!r}, source={self.source!r} and is_smoothed={self.is_smoothed!r}"
            raise ValueError(f"it has {found}; expected a number from 1, {' or '.join(SOURCES)}, and true or false")


class UnitExtractor:
    """
    Extracts units or features from recordings.

    A recording longer than a window is cut into windows with context (`WindowedInference`), and its samples are
    normalised by its mean and variance. The teacher's output is normalised over the complete recording too. Raises
    `ValueError` if the model has no such layer, or the source or a number of seconds is out of range.

    Args:
        model: In any precision, on any device; it is put into evaluation mode.
        layers: Numbers of transformer layers, from 1; units by codebook need layers that have one.
        source: "student" or "teacher"; for units alone "anchor", see `DinoSRForPreTraining.encode_units`; for features
            and k-means alone "student_feed_forward", the output of the layer's feed-forward network.
        is_smoothed: Whether the student's features are normalised over the recording, as the teacher's always are, and
            averaged over three frames. Their clusters tell more of phones and less of speakers.
        windows: `window_seconds`, `context_seconds` and `batch_seconds` of `WindowedInference`. If the model has
            `reference_padding`, a batch is one window.
    """

    def __init__(
        self,
        model: DinoSRForPreTraining,
        *,
        layers: Sequence[int] = (5,),
        source: str = "student",
        is_smoothed: bool = False,
        **windows: float,
    ) -> None:
        check_source(source, (*UNIT_SOURCES, "student_feed_forward"))
        self._network: PreTrainedModel = model.eval()
        self.model, self.config, self.source = model, model.config, source
        self.is_smoothed = is_smoothed and source != "teacher"
        if source == "anchor":
            self.layers = check_unit_layers(model.config, layers, source)
        else:
            self.layers = check_layers(model.config, layers, with_codebooks=False)
        if model.config.reference_padding:  # features depend on the batch: process each recording alone
            windows["batch_seconds"] = 2 * self.frame_seconds
        self._runner = WindowedInference(model.config, normalizes=True, **windows)

    @property
    def unreadable(self) -> dict[str, str]:
        """Id -> error message of the recordings that the last `units` or `features` could not read."""
        return self._runner.unreadable

    @property
    def name(self) -> str:
        """Folder of the model, or its name on the Hub."""
        return str(self._network.name_or_path)

    @property
    def about_model(self) -> dict[str, str]:
        """The model's precision, and the digest of its weights in that, which is the same wherever the model is."""
        return {"dtype": str(self._network.dtype).removeprefix("torch."), "model_sha256": model_digest(self._network)}

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
        own = self.about_model
        if kmeans.dtype == own["dtype"] and kmeans.model_sha256 != own["model_sha256"]:
            raise ValueError(
                f"k-means was fitted on another model: its digest is {kmeans.model_sha256}, and that of"
                f" {self.name or 'this one'} is {own['model_sha256']}. Use it with the model that it was fitted on, or"
                " fit it again."
            )

    def units(
        self,
        recordings: SpeechSource,
        *,
        kmeans: LayerKMeans | None = None,
        indices: Sequence[int] | None = None,
        on_progress: Progress = None,
    ) -> Iterator[Units]:
        """
        Extract the units of recordings, the longest first, each as soon as they are complete.

        Recordings that cannot be read are skipped with a warning and listed in `unreadable`; one shorter than a frame
        has no codes.

        Args:
            recordings: As `open_source` or `open_recordings` opens them.
            kmeans: Clusters to use as units, see `check_kmeans`; None: codewords, which every layer must have, or the
                anchor's labels.
            indices: Indices of the recordings to process; None: all.
            on_progress: Called after each batch with its seconds of audio, without context.
        """
        if kmeans is not None:
            self.check_kmeans(kmeans)
        else:
            check_unit_layers(self.config, self.layers, self.source)
        # Some units wait for the mean and variance of the complete recording.
        if self.source == "teacher" or (kmeans is not None and self.is_smoothed):
            for name, features in self.features(recordings, indices=indices, on_progress=on_progress):
                yield Units(name, self._nearest(features, kmeans))
            return
        compute = partial(self._codes, kmeans=kmeans)
        for index, rows in self._runner.run(recordings, compute, indices=indices, on_progress=on_progress):
            codes = np.empty((0, len(self.layers))) if rows is None else rows
            yield Units(recordings.utterances[index].id, codes.T.astype(np.int64))

    def features(
        self, recordings: SpeechSource, *, indices: Sequence[int] | None = None, on_progress: Progress = None
    ) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """
        Extract the continuous features of recordings, float32 (T, L, D) each; the arguments are those of `units`.

        Features are the student's layer outputs, as they are or `is_smoothed`, or what the teacher's codebooks
        cluster, normalised over the recording. Hours of features are a memory-mapped temporary file. Raises
        `ValueError` for the anchor, which has none.
        """
        check_source(self.source)
        for index, rows in self._runner.run(recordings, self._features, indices=indices, on_progress=on_progress):
            if rows is None:
                rows = np.empty((0, len(self.layers), self.config.hidden_size), np.float32)
            elif self.source == "teacher" or self.is_smoothed:
                _normalize_rows(rows)
                if self.is_smoothed:
                    filters = import_extra("scipy.ndimage", "analysis")
                    filters.uniform_filter1d(rows, 3, axis=0, mode="nearest", output=rows)
            yield recordings.utterances[index].id, rows

    def _layer_features(self, waves: Sequence[np.ndarray]) -> tuple[torch.Tensor, list[int]]:
        """Compute features float32 (B, T, L, D) of waves (S,), and their numbers of frames."""
        values, mask, num_frames = model_batch(self.model, waves)
        found = self.model.layer_features(values, mask, self.layers, self.source)
        return found.permute(1, 2, 0, 3).float(), num_frames

    def _features(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        return without_padding(*self._layer_features(waves))

    def _codes(self, waves: Sequence[np.ndarray], kmeans: LayerKMeans | None) -> list[np.ndarray]:
        """Compute the student's or the anchor's units int32 (T, L) of each wave (S,)."""
        if kmeans is None:
            values, mask, num_frames = model_batch(self.model, waves)
            codes = self.model.encode_units(values, mask, layers=self.layers, source=self.source)[0].permute(1, 2, 0)
        else:
            features, num_frames = self._layer_features(waves)
            codes = kmeans.assign(features)
        return without_padding(codes.int(), num_frames)

    def _nearest(self, features: NDArray[np.float32], kmeans: LayerKMeans | None) -> NDArray[np.int64]:
        """Assign normalised features (T, L, D) to codewords or clusters (L, T)."""
        found = []
        for chunk in _chunks(features):
            rows = torch.tensor(chunk, device=self._network.device)
            codes = kmeans.assign(rows).T if kmeans else self.model.teacher_units(rows.transpose(0, 1), self.layers)
            found.append(codes.cpu().numpy())
        return np.concatenate(found, axis=1)


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
    Extract the units of recordings with their scores, the longest recording first.

    Scores of student and anchor are the probabilities that the head gives the units; those of the teacher minus the
    distances from its output to the codewords, the root mean square over the D dimensions. The arguments are those of
    `UnitExtractor` and its `units`, for a single layer, which must have units of the source (else `ValueError`).
    """
    check_unit_layers(model.config, [layer], source)
    number = layer - model.config.codebook_layers[0]
    head = model.anchor_head if source == "anchor" else model.heads[number]
    feature_layer, features_of = layer, "teacher"
    # CODEPATH: "own_layer" for SpidR's checkpoints, "last_layer" for all others; the anchor's head is on the last.
    if source == "student" and model.config.head_input == "own_layer":
        features_of = "student_feed_forward"
    elif source != "teacher":
        feature_layer, features_of = model.config.num_hidden_layers, "student"
    extractor = UnitExtractor(model, layers=[feature_layer], source=features_of, batch_seconds=batch_seconds)
    for name, features in extractor.features(recordings, on_progress=on_progress):
        codes, scores = [], []
        for chunk in _chunks(features[:, 0]):
            rows = torch.tensor(chunk, device=model.device)  # (T, D)
            if source != "teacher":
                assert head is not None
                chunk_scores, chunk_codes = head(rows.to(model.dtype)).float().softmax(dim=-1).max(dim=-1)
            else:
                chunk_codes = model.codebooks(rows[None], [number])[0]
                distances = rows - model.codebooks.codewords[number][chunk_codes]
                chunk_scores = -distances.square().mean(dim=-1).sqrt()
            codes.append(chunk_codes.cpu().numpy())
            scores.append(chunk_scores.cpu().numpy())
        yield ScoredUnits(name, np.concatenate(codes), np.concatenate(scores))


def fit_layer_kmeans(
    extractor: UnitExtractor,
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
    share = min(1.0, max_frames / max(1, total))
    generator = np.random.default_rng(seed)
    drawn = [np.empty((0, extractor.config.hidden_size), np.float32)]
    for _, rows in extractor.features(recordings, on_progress=on_progress):
        drawn.append(np.array(rows[generator.random(len(rows)) < share, 0]))
    clusters = fit_kmeans(np.concatenate(drawn), num_clusters, seed, max_frames=max_frames)
    about: dict[str, Any] = {"source": extractor.source, "is_smoothed": extractor.is_smoothed, **extractor.about_model}
    return LayerKMeans(clusters.centroids, extractor.layers[0], **about)
