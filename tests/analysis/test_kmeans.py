"""K-means: clusters, assignment, and the sample of frames."""

import sys

import numpy as np
import pytest
import sklearn.cluster
import torch

from dinosr_hf.analysis.kmeans import KMeans, fit_kmeans
from dinosr_hf.analysis.quality import unit_quality
from tiny import white_noise


def blobs(num_frames: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames around four distant points, and the index of each frame's point."""
    generator = np.random.default_rng(seed)
    members = generator.integers(0, 4, size=num_frames)
    points = 10 * np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]])
    return points[members] + generator.standard_normal((num_frames, 3)), members


def test_clusters_of_new_frames():
    units = fit_kmeans(blobs(400, seed=0)[0], 4, seed=1)
    features, members = blobs(100, seed=2)
    quality = unit_quality(members.tolist(), units.predict(features), num_codes=4)
    assert (quality.phone_purity, quality.cluster_purity) == (1.0, 1.0)


def test_predict_returns_the_nearest_centroid():
    units = fit_kmeans(white_noise(900).reshape(-1, 3), 7, seed=0)
    frames = white_noise(600, seed=1).reshape(-1, 3)
    distances = ((frames[:, None] - units.centroids[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(units.predict(frames), distances.argmin(axis=1))


def test_ties_go_to_the_first_centroid():
    assert KMeans(np.array([[1.0], [1.0], [3.0]], dtype=np.float32)).predict([[1.5], [2.5]]).tolist() == [0, 2]


def test_seed_determines_the_clusters():
    frames = white_noise(3_000).reshape(-1, 3)
    first, again, other = (fit_kmeans(frames, 9, seed).centroids for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_threads_are_those_of_torch(monkeypatch, num_threads):
    used = []

    def fit(model, frames):
        from sklearn.utils._openmp_helpers import _openmp_effective_n_threads

        used.append(_openmp_effective_n_threads())
        return original(model, frames)

    original = sklearn.cluster.KMeans.fit
    monkeypatch.setattr(sklearn.cluster.KMeans, "fit", fit)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        fit_kmeans(white_noise(30).reshape(-1, 3), 3, seed=0)
    finally:
        torch.set_num_threads(before)
    assert used == [num_threads]


def test_max_frames_fits_on_a_sample():
    frames = white_noise(3_000).reshape(-1, 3)
    centroids = fit_kmeans(frames, 100, seed=0, max_frames=100).centroids
    assert centroids.shape == (100, 3)
    # With as many clusters as sampled frames, the centroids are these frames, but for scikit-learn's centring.
    nearest = np.abs(centroids[:, None] - frames[None]).max(-1).min(axis=1)
    np.testing.assert_allclose(nearest, 0, atol=1e-6)
    # Negative control: fitted on all frames, they are means.
    means = fit_kmeans(frames, 100, seed=0).centroids
    assert np.abs(means[:, None] - frames[None]).max(-1).min(axis=1).max() > 0.01


@pytest.mark.parametrize(
    ("features", "num_clusters", "message"),
    [
        (np.zeros(5), 2, r"shape \(5,\).*\(T, D\)"),
        (np.zeros((5, 2)), 6, "num_clusters=6, but must be at least 1 and at most the number of frames, 5"),
        (np.zeros((5, 2)), 0, "num_clusters=0"),
        (np.full((5, 2), np.inf), 2, "nan or infinite"),
    ],
    ids=["shape", "too-many", "none", "inf"],
)
def test_invalid_arguments_raise(features, num_clusters, message):
    with pytest.raises(ValueError, match=message):
        fit_kmeans(features, num_clusters, seed=0)


def test_predict_with_other_dimensions_raises():
    with pytest.raises(ValueError, match=r"shape \(4, 2\).*\(T, 3\)"):
        KMeans(np.zeros((5, 3), dtype=np.float32)).predict(np.zeros((4, 2)))


def test_assign_takes_batches_and_equals_predict():
    clusters = fit_kmeans(white_noise(900).reshape(-1, 3), 7, seed=0)
    frames = white_noise(600, seed=1)
    found = clusters.assign(torch.from_numpy(frames).view(4, 5, 10, 3))
    assert found.dtype == torch.int64 and found.shape == (4, 5, 10)
    np.testing.assert_array_equal(found.flatten(), clusters.predict(frames.reshape(-1, 3)))


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match=r'K-means needs sklearn.cluster: pip install "dinosr-hf\[analysis\]"'):
        fit_kmeans(np.zeros((5, 2)), 2, 0)
