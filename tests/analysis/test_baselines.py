"""MFCCs at the model's frames, and k-means units of them."""

import sys

import numpy as np
import pytest

from dinosr_hf import DinoSRConfig
from dinosr_hf.analysis.baselines import KMeansUnits, kmeans_units, mfcc
from dinosr_hf.analysis.quality import unit_quality


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(num_samples).astype(np.float32)


def tones(frequencies: list[float], seconds_each: float) -> np.ndarray:
    """Harmonic tones one after the other, with a little noise."""
    time = np.arange(int(16_000 * seconds_each)) / 16_000
    speech = [sum(np.sin(2 * np.pi * f * k * time) / k for k in range(1, 6)) for f in frequencies]
    return np.concatenate(speech) + 0.01 * noise(len(time) * len(frequencies))


def slow_mfcc(waveform: np.ndarray, tuned: bool) -> np.ndarray:
    """`mfcc` spelled out frame by frame, with none of its library calls."""
    signal = waveform.astype(np.float64)
    signal = (signal - signal.mean()) / np.sqrt(signal.var() + 1e-7)

    def mel(hertz):
        return 2595 * np.log10(1 + hertz / 700)

    edges = 700 * (10 ** (np.linspace(mel(20), mel(8000), 42) / 2595) - 1)
    bins = np.linspace(0, 8000, 257)
    waves = np.exp(-2j * np.pi * np.outer(np.arange(257), np.arange(400)) / 512)
    angles = np.pi * np.outer(np.arange(13), np.arange(40) + 0.5) / 40
    rows = []
    for start in range(0, len(signal) - 399, 160):
        field = signal[start : start + 400] - signal[start : start + 400].mean()
        field = np.append(0.03 * field[0], field[1:] - 0.97 * field[:-1]) * np.hamming(400)
        power = np.abs(waves @ field) ** 2
        energies = []
        for low, center, high in zip(edges[:-2], edges[1:-1], edges[2:], strict=True):
            slopes = np.minimum((bins - low) / (center - low), (high - bins) / (high - center))
            energies.append(np.log(max(1e-2 if tuned else 1e-10, np.maximum(slopes, 0) @ power)))
        rows.append(np.sqrt(np.where(np.arange(13) == 0, 1, 2) / 40) * (np.cos(angles) @ energies))

    def at(rows, index):  # the ends are repeated
        return rows[min(max(index, 0), len(rows) - 1)]

    def combine(rows, weights):
        reach = len(weights) // 2
        return [
            sum(weight * at(rows, index + shift - reach) for shift, weight in enumerate(weights))
            for index in range(len(rows))
        ]

    if tuned:
        rows = combine(rows, np.array([1, 3, 4, 3, 1]) / 12)
    deltas = combine(rows, [-0.2, -0.1, 0, 0.1, 0.2])
    features = np.hstack([rows, deltas, combine(deltas, [-0.2, -0.1, 0, 0.1, 0.2])])[::2]
    if tuned:
        features = (features - features.mean(axis=0)) / np.sqrt(features.std(axis=0))
        features[:, 13:26] *= 1.5
        features[:, 26:] *= 1.5**2
    return features


@pytest.mark.parametrize("num_samples", [400, 719, 720, 879, 880, 5_000, 16_000])
@pytest.mark.parametrize("tuned", [True, False], ids=["tuned", "textbook"])
def test_frames_are_the_models(num_samples, tuned):
    features = mfcc(noise(num_samples), tuned=tuned)
    assert features.shape == (DinoSRConfig().num_frames(num_samples), 39)
    assert features.dtype == np.float32
    assert np.isfinite(features).all()


TINY_CONVOLUTIONS = {  # of examples/configs/tiny_cpu.yaml: frames of 58 ms
    "conv_dim": [64, 64, 96, 128, 128],
    "conv_kernel": [20, 8, 4, 4, 4],
    "conv_stride": [10, 4, 2, 2, 2],
}


@pytest.mark.parametrize("num_samples", [930, 1_249, 1_250, 5_000, 16_000])
def test_frames_are_those_of_a_model_with_other_convolutions(num_samples):
    config = DinoSRConfig(**TINY_CONVOLUTIONS)
    assert config.receptive_field == 930
    features = mfcc(noise(num_samples), field=config.receptive_field)
    assert features.shape == (config.num_frames(num_samples), 39)


@pytest.mark.parametrize("tuned", [True, False], ids=["tuned", "textbook"])
@pytest.mark.parametrize("num_samples", [5_000, 5_200], ids=["odd", "even"])
def test_features_equal_their_definition(num_samples, tuned):
    # Loud and then very quiet, so that the floor under the energies is reached.
    waveform = noise(num_samples) * np.where(np.arange(num_samples) < 2_000, 1.0, 1e-3)
    # float32 keeps 7 digits of values up to 100; the spectrum passes through complex64.
    np.testing.assert_allclose(mfcc(waveform, tuned=tuned), slow_mfcc(waveform, tuned), atol=1e-3)


@pytest.mark.parametrize("field", [80, 400, 480, 930], ids=lambda field: f"field {field}")
@pytest.mark.parametrize("tuned", [True, False], ids=["tuned", "textbook"])
def test_a_click_is_seen_by_the_frame_centered_on_it(tuned, field):
    waveform = 0.01 * noise(16_000)
    waveform[320 * 20 + field // 2] = 1.0
    energy = mfcc(waveform, field=field, tuned=tuned)[:, 0]
    assert np.argmax(energy) == 20
    # Symmetric about the click: the frames are centred, not early or late.
    assert energy[19] == pytest.approx(energy[21], abs=0.1 * float(energy[20] - energy[30]))
    if field == 930:  # the negative control: with the paper's field the frames are early
        early = mfcc(waveform, tuned=tuned)[:, 0]
        assert early[21] - early[19] > 0.5 * float(energy[20] - energy[30])


def test_features_do_not_depend_on_the_field_but_for_where_they_are():
    """A field that is wider by two strides has the same features, a frame on: what lies before gives them context."""
    waveform = noise(16_000)
    same = mfcc(waveform, tuned=False)
    np.testing.assert_allclose(mfcc(waveform, field=1040, tuned=False), same[1:-1], atol=1e-5)


@pytest.mark.parametrize("tuned", [True, False], ids=["tuned", "textbook"])
def test_level_and_offset_do_not_matter(tuned):
    waveform = tones([110, 240], 0.3)
    np.testing.assert_allclose(mfcc(waveform, tuned=tuned), mfcc(7 * waveform + 3, tuned=tuned), atol=2e-3)


def test_tuned_features_are_centered_over_the_utterance():
    features = mfcc(tones([110, 240, 400], 0.3))
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-5)
    # The negative control: the textbook's are not.
    assert np.abs(mfcc(tones([110, 240, 400], 0.3), tuned=False).mean(axis=0)).max() > 1


def test_silence_has_finite_features():
    assert np.isfinite(mfcc(np.zeros(4_000))).all()


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (np.zeros((2, 1_000)), r"shape \(2, 1000\).*mono"),
        (np.zeros(399), r"399 samples, but a frame needs 400 \(25 ms\)"),
        (np.full(1_000, np.nan), "nan or infinite"),
    ],
    ids=["stereo", "short", "nan"],
)
def test_mfcc_refuses(waveform, message):
    with pytest.raises(ValueError, match=message):
        mfcc(waveform)


def test_mfcc_refuses_a_field_that_does_not_fit():
    with pytest.raises(ValueError, match=r"929 samples, but a frame needs 930 \(58.125 ms\)"):
        mfcc(np.zeros(929), field=930)
    with pytest.raises(ValueError, match=r"field=0.*receptive_field"):
        mfcc(np.zeros(929), field=0)


def blobs(num_frames: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames around four far points, and which."""
    generator = np.random.default_rng(seed)
    members = generator.integers(0, 4, size=num_frames)
    points = 10 * np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]])
    return points[members] + generator.standard_normal((num_frames, 3)), members


def test_kmeans_finds_clusters_of_new_frames():
    units = kmeans_units(blobs(400, seed=0)[0], 4, seed=1)
    features, members = blobs(100, seed=2)
    quality = unit_quality(members.tolist(), units.predict(features), num_codes=4)
    assert (quality.phone_purity, quality.cluster_purity) == (1.0, 1.0)


def test_predict_is_the_nearest_centroid():
    units = kmeans_units(noise(900).reshape(-1, 3), 7, seed=0)
    frames = noise(600, seed=1).reshape(-1, 3)
    distances = ((frames[:, None] - units.centroids[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(units.predict(frames), distances.argmin(axis=1))


def test_predict_prefers_the_first_of_equal_centroids():
    assert KMeansUnits(np.array([[1.0], [1.0], [3.0]], dtype=np.float32)).predict([[1.5], [2.5]]).tolist() == [0, 2]


def test_kmeans_is_decided_by_its_seed():
    frames = noise(3_000).reshape(-1, 3)
    first, again, other = (kmeans_units(frames, 9, seed).centroids for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_max_frames_takes_a_sample():
    frames = noise(3_000).reshape(-1, 3)
    centroids = kmeans_units(frames, 100, seed=0, max_frames=100).centroids
    assert centroids.shape == (100, 3)
    # With as many clusters as frames of the sample, the centroids are these frames (scikit-learn shifts and unshifts).
    nearest = np.abs(centroids[:, None] - frames[None]).max(-1).min(axis=1)
    np.testing.assert_allclose(nearest, 0, atol=1e-6)
    # The negative control: of all frames they are means.
    means = kmeans_units(frames, 100, seed=0).centroids
    assert np.abs(means[:, None] - frames[None]).max(-1).min(axis=1).max() > 0.01


def test_units_of_tones_are_the_tones():
    pitches = [130, 200, 310, 480]
    features = mfcc(tones(pitches * 3, 0.25))
    labels = [str(int((0.02 * frame + 0.0125) / 0.25) % 4) for frame in range(len(features))]
    quality = unit_quality(labels, kmeans_units(features, 8, seed=0).predict(features), num_codes=8)
    assert quality.phone_purity > 0.9


@pytest.mark.parametrize(
    ("features", "num_clusters", "message"),
    [
        (np.zeros(5), 2, r"shape \(5,\).*\(T, D\)"),
        (np.zeros((5, 2)), 6, "num_clusters=6 does not fit 5 frames"),
        (np.zeros((5, 2)), 0, "num_clusters=0"),
        (np.full((5, 2), np.inf), 2, "nan or infinite"),
    ],
    ids=["shape", "too-many", "none", "inf"],
)
def test_kmeans_refuses(features, num_clusters, message):
    with pytest.raises(ValueError, match=message):
        kmeans_units(features, num_clusters, seed=0)


def test_predict_refuses_other_dimensions():
    with pytest.raises(ValueError, match=r"shape \(4, 2\).*\(T, 3\)"):
        KMeansUnits(np.zeros((5, 3), dtype=np.float32)).predict(np.zeros((4, 2)))


@pytest.mark.parametrize(
    ("module", "call"),
    [("scipy.fft", lambda: mfcc(noise(400))), ("sklearn.cluster", lambda: kmeans_units(np.zeros((5, 2)), 2, 0))],
    ids=["scipy", "scikit-learn"],
)
def test_a_missing_library_names_the_extra(monkeypatch, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "dinosr-hf\[analysis\]"'):
        call()
