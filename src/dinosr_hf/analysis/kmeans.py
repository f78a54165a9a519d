"""K-means for the MFCC baseline, for layers, and for units. `T` frames, `D` feature dimensions, `K` clusters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ..utils.extras import import_extra

# 100 minutes of speech at 50 Hz. One core fits 100 clusters to so many frames of a base model (D = 768) in minutes.
MAX_FRAMES = 300_000


@dataclass(frozen=True)
class KMeans:
    """Fitted clusters; `centroids` are float32 (K, D)."""

    centroids: NDArray[np.float32]

    def assign(self, features: torch.Tensor) -> torch.Tensor:
        """Return the nearest centroid (Euclidean) of each frame: float32 (..., D) to int64 (...); ties: the first."""
        centroids = torch.from_numpy(self.centroids).to(features.device)
        # |x - c|^2 without |x|^2, which is the same for all centroids.
        return (features @ centroids.T - centroids.square().sum(dim=1) / 2).argmax(dim=-1)

    def predict(self, features: ArrayLike) -> NDArray[np.int64]:
        """Return the nearest centroid of frames (T, D) as `assign` does, int64 (T,); `ValueError` for other shapes."""
        frames = np.array(features, dtype=np.float32)
        dimension = self.centroids.shape[1]
        if frames.ndim != 2 or frames.shape[1] != dimension:
            raise ValueError(f"features has shape {frames.shape}, but the clusters were fitted on (T, {dimension}).")
        return self.assign(torch.from_numpy(frames)).numpy()


def check_num_clusters(num_clusters: int, num_frames: int) -> None:
    """Raise `ValueError` if so many frames have no such number of clusters."""
    if not 1 <= num_clusters <= num_frames:
        raise ValueError(
            f"num_clusters={num_clusters}, but must be at least 1 and at most the number of frames, {num_frames:,}."
            " Lower num_clusters, or fit on more frames."
        )


def fit_kmeans(features: ArrayLike, num_clusters: int, seed: int, *, max_frames: int = MAX_FRAMES) -> KMeans:
    """
    Cluster frames (T, D) with Lloyd's k-means from a k-means++ start (scikit-learn), for at most 100 iterations.

    Not mini-batches: with 256 clusters of MFCCs they cost 1 to 1.5 points of phone purity. Of more than `max_frames`,
    a random sample is used. Threads are as many as torch's. Raises `ValueError` if the features are not (T, D) and
    finite, or there are fewer frames than clusters, and `ImportError` without scikit-learn.
    """
    frames = np.asarray(features, dtype=np.float32)
    if frames.ndim != 2:
        raise ValueError(f"features has shape {frames.shape}, but must be (T, D): concatenate all utterances.")
    if not np.all(np.isfinite(frames)):
        raise ValueError("features contains nan or infinite values. Leave such frames out.")
    check_num_clusters(num_clusters, min(len(frames), max_frames))
    if len(frames) > max_frames:
        frames = frames[np.sort(np.random.default_rng(seed).choice(len(frames), max_frames, replace=False))]
    cluster = import_extra("sklearn.cluster", "analysis", "K-means")
    threadpoolctl = import_extra("threadpoolctl", "analysis", "K-means")
    # Launchers set OMP_NUM_THREADS to 1, which is all that scikit-learn looks at.
    with threadpoolctl.threadpool_limits(torch.get_num_threads(), user_api="openmp"):
        fitted = cluster.KMeans(num_clusters, n_init=1, max_iter=100, random_state=seed).fit(frames)
    return KMeans(np.asarray(fitted.cluster_centers_, dtype=np.float32))
