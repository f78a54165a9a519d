"""
Units by k-means on a layer's features, to compare with those of the codebooks.

`T` frames, `D` hidden size, `K` clusters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..data import SpeechSource
from ..utils.extras import import_extra

if TYPE_CHECKING:
    from .extraction import Progress, UnitExtractor


class LayerKMeans(NamedTuple):
    """
    Clusters of the features of a layer.

    Attributes:
        centroids: float32 (K, D).
        layer: Transformer layer, the lowest is 1.
        source: "student" or "teacher".
    """

    centroids: NDArray[np.float32]
    layer: int
    source: str

    def assign(self, features: torch.Tensor) -> torch.Tensor:
        """
        The nearest cluster, in Euclidean distance.

        Args:
            features: float32 (..., D).

        Returns:
            int64 (...).
        """
        centroids = torch.from_numpy(self.centroids).to(features.device)
        # |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2), and |x|^2 is the same for all clusters
        return (features @ centroids.T - centroids.square().sum(dim=1) / 2).argmax(dim=-1)

    def check(self, layers: Sequence[int], source: str, hidden_size: int) -> None:
        """Raises `ValueError` if features of these layers and this source are not those that were clustered."""
        if list(layers) != [self.layer] or source != self.source or hidden_size != self.centroids.shape[1]:
            raise ValueError(
                f"k-means is of layer {self.layer} of the {self.source} with {self.centroids.shape[1]} dimensions, but"
                f" it was asked for layers {list(layers)} of the {source} with {hidden_size}. Give its own layer and"
                " source, of its own model."
            )

    def save(self, file: str | Path) -> Path:
        """Write into a safetensors file, which is whole or not there; returns its path."""
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f".unfinished-{file.name}")
        about = {"kmeans": json.dumps({"layer": self.layer, "source": self.source})}
        save_file({"centroids": np.ascontiguousarray(self.centroids)}, aside, metadata=about)
        aside.replace(file)
        return file

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """
        Read what `save` has written.

        Raises:
            ValueError: If it is no such file.
        """
        try:
            with safe_open(file, "numpy") as opened:
                about = json.loads((opened.metadata() or {})["kmeans"])
                return cls(opened.get_tensor("centroids"), about["layer"], about["source"])
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(
                f"{file} is no k-means of ours ({error}). Give a file that examples/fit_kmeans.py has written."
            ) from error


def fit_kmeans(
    extractor: UnitExtractor,
    recordings: SpeechSource,
    num_clusters: int = 100,
    *,
    max_frames: int = 500_000,
    seed: int = 0,
    on_progress: Progress = None,
) -> LayerKMeans:
    """
    Cluster the features of a layer with scikit-learn's `MiniBatchKMeans`.

    Args:
        extractor: Of one layer, of student or teacher.
        recordings: To learn from.
        num_clusters: K.
        max_frames: Frames to learn from, drawn at random from all recordings; they are in memory at once.
        seed: Of the draw and of k-means.
        on_progress: As for `UnitExtractor.features`.

    Raises:
        ValueError: If the extractor has several layers, or there are fewer frames than clusters.
        ImportError: Without scikit-learn.
    """
    if len(extractor.layers) != 1:
        raise ValueError(f"k-means is of one layer, but layers are {extractor.layers}. Name one.")
    cluster = import_extra("sklearn.cluster", "analysis")
    config = extractor.config
    total = sum(int(config.num_frames(utterance.num_samples)) for utterance in recordings.utterances)
    share = min(1.0, max_frames / max(1, total))
    generator = np.random.default_rng(seed)
    kept = []
    for _, rows in extractor.features(recordings, on_progress=on_progress):
        kept.append(np.array(rows[generator.random(len(rows)) < share, 0]))
    frames = np.concatenate(kept) if kept else np.empty((0, config.hidden_size), np.float32)
    if len(frames) < num_clusters:
        raise ValueError(
            f"num_clusters={num_clusters}, but there are {len(frames):,} frames to learn from. Lower num_clusters,"
            " raise max_frames or give more recordings."
        )
    clusters = cluster.MiniBatchKMeans(num_clusters, batch_size=10_000, n_init=3, random_state=seed)
    centroids = clusters.fit(frames).cluster_centers_
    return LayerKMeans(centroids.astype(np.float32), extractor.layers[0], extractor.source)
