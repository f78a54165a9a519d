"""MFCCs at the model's frames, and k-means units of them."""

import sys

import numpy as np
import pytest

from dinosr_hf import DinoSRConfig
from dinosr_hf.analysis import baselines
from dinosr_hf.analysis.baselines import mfcc
from dinosr_hf.analysis.kmeans import fit_kmeans
from dinosr_hf.analysis.quality import unit_quality
from tiny import white_noise


def tones(frequencies: list[float], seconds_each: float) -> np.ndarray:
    """Harmonic tones in sequence, with a little noise."""
    time = np.arange(int(16_000 * seconds_each)) / 16_000
    speech = [sum(np.sin(2 * np.pi * f * k * time) / k for k in range(1, 6)) for f in frequencies]
    return np.concatenate(speech) + 0.01 * white_noise(len(time) * len(frequencies))


def slow_mfcc(waveform: np.ndarray, tuned: bool) -> np.ndarray:
    """A slow `mfcc`, frame by frame and without its library calls."""
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

    def at(rows, index):  # edge padding
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
def test_frames_match_the_model(num_samples, tuned):
    features = mfcc(white_noise(num_samples), tuned=tuned)
    assert features.shape == (DinoSRConfig().num_frames(num_samples), 39)
    assert features.dtype == np.float32
    assert np.isfinite(features).all()


TINY_CONVOLUTIONS = {  # of examples/configs/tiny_cpu.yaml: frames of 58 ms
    "conv_dim": [64, 64, 96, 128, 128],
    "conv_kernel": [20, 8, 4, 4, 4],
    "conv_stride": [10, 4, 2, 2, 2],
}


@pytest.mark.parametrize("num_samples", [930, 1_249, 1_250, 5_000, 16_000])
def test_frames_match_a_model_with_other_convolutions(num_samples):
    config = DinoSRConfig(**TINY_CONVOLUTIONS)
    assert config.receptive_field == 930
    features = mfcc(white_noise(num_samples), field=config.receptive_field)
    assert features.shape == (config.num_frames(num_samples), 39)


@pytest.mark.parametrize("tuned", [True, False], ids=["tuned", "textbook"])
@pytest.mark.parametrize("num_samples", [5_000, 5_200], ids=["odd", "even"])
def test_features_equal_slow_mfcc(num_samples, tuned):
    # Loud and then very quiet, to reach the floor of the energies.
    waveform = white_noise(num_samples) * np.where(np.arange(num_samples) < 2_000, 1.0, 1e-3)
    # float32 keeps 7 digits of values up to 100; the spectrum passes through complex64.
    np.testing.assert_allclose(mfcc(waveform, tuned=tuned), slow_mfcc(waveform, tuned), atol=1e-3)


def test_long_recordings_are_transformed_in_parts(monkeypatch):
    whole = mfcc(white_noise(9_000))
    for windows in (1, 7, 50):
        monkeypatch.setattr(baselines, "_MAX_WINDOWS", windows)
        np.testing.assert_allclose(mfcc(white_noise(9_000)), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("field", [80, 400, 480, 930], ids=lambda field: f"field {field}")
@pytest.mark.parametrize("tuned", [True, False], ids=["tuned", "textbook"])
def test_click_peaks_in_the_frame_centered_on_it(tuned, field):
    waveform = 0.01 * white_noise(16_000)
    waveform[320 * 20 + field // 2] = 1.0
    energy = mfcc(waveform, field=field, tuned=tuned)[:, 0]
    assert np.argmax(energy) == 20
    # Symmetric about the click: the frames are centred, not early or late.
    assert energy[19] == pytest.approx(energy[21], abs=0.1 * float(energy[20] - energy[30]))
    if field == 930:  # negative control: with the paper's field, the frames are early
        early = mfcc(waveform, tuned=tuned)[:, 0]
        assert early[21] - early[19] > 0.5 * float(energy[20] - energy[30])


def test_receptive_field_only_shifts_features():
    """A field wider by two strides has the same features one frame later: windows still see what lies before."""
    waveform = white_noise(16_000)
    same = mfcc(waveform, tuned=False)
    np.testing.assert_allclose(mfcc(waveform, field=1040, tuned=False), same[1:-1], atol=1e-5)


@pytest.mark.parametrize("tuned", [True, False], ids=["tuned", "textbook"])
def test_features_do_not_depend_on_level_and_offset(tuned):
    waveform = tones([110, 240], 0.3)
    np.testing.assert_allclose(mfcc(waveform, tuned=tuned), mfcc(7 * waveform + 3, tuned=tuned), atol=2e-3)


def test_tuned_features_have_zero_mean_over_the_utterance():
    features = mfcc(tones([110, 240, 400], 0.3))
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-5)
    # Negative control: the textbook's features do not.
    assert np.abs(mfcc(tones([110, 240, 400], 0.3), tuned=False).mean(axis=0)).max() > 1


def test_features_of_silence_are_finite():
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
def test_invalid_waveform_raises(waveform, message):
    with pytest.raises(ValueError, match=message):
        mfcc(waveform)


def test_invalid_field_raises():
    with pytest.raises(ValueError, match=r"929 samples, but a frame needs 930 \(58.125 ms\)"):
        mfcc(np.zeros(929), field=930)
    with pytest.raises(ValueError, match=r"field=0.*receptive_field"):
        mfcc(np.zeros(929), field=0)


def test_units_of_tones_are_the_tones():
    pitches = [130, 200, 310, 480]
    features = mfcc(tones(pitches * 3, 0.25))
    labels = [str(int((0.02 * frame + 0.0125) / 0.25) % 4) for frame in range(len(features))]
    quality = unit_quality(labels, fit_kmeans(features, 8, seed=0).predict(features), num_codes=8)
    assert quality.phone_purity > 0.9


def test_missing_scipy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.fft", None)
    with pytest.raises(ImportError, match=r'pip install "dinosr-hf\[analysis\]"'):
        mfcc(white_noise(400))
