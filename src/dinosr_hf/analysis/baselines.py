"""
Units without learning: k-means on MFCCs, what a model's units must beat.

The features have the model's frames (frame `i` is centred on sample `320 i + field / 2`), and what was tuned was tuned
for phone purity and PNMI on real speech of other speakers than the reported ones, as hard as one would tune a model.

`S` samples, `T` frames, `D` feature dimensions, `V` clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..utils.extras import import_extra
from .alignment import FIELD

_SAMPLING_RATE = 16_000
_WINDOW = 400
# Cepstra are made at 100 Hz, every second one at the centre of a frame of the model.
_STRIDE = 320
_HOP = _STRIDE // 2
_FFT_LENGTH = 512
_NUM_MEL_FILTERS = 40
_NUM_CEPSTRA = 13
_DELTA_REACH = 2

# Energies below are noise between words, for a waveform of unit variance; without a floor their logarithms spread
# silence over many clusters.
_MEL_FLOOR = 1e-2
# Hann window over 50 ms of cepstra.
_SMOOTHING = np.array([0.25, 0.75, 1.0, 0.75, 0.25]) / 3.0
# Of each dimension's standard deviation this power is divided out. 0 leaves the distance to the first few cepstra, 1
# gives the same weight to the last ones, which tell phones apart least; half-way was better than both by far.
_SCALE_POWER = 0.5
_DELTA_WEIGHT = 1.5


def _weighted_sum(features: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correlate each column of (T, D) with an odd number of weights; the ends are repeated."""
    reach = len(weights) // 2
    padded = np.pad(features, ((reach, reach), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, len(weights), axis=0)  # (T, D, len(weights))
    return windows @ weights


def _cepstra(waveform: NDArray[np.float64], mel_floor: float) -> NDArray[np.float64]:
    """Mel-frequency cepstra at 100 Hz, (number of whole windows, 13)."""
    from transformers.audio_utils import mel_filter_bank, spectrogram

    mel_filters = mel_filter_bank(
        num_frequency_bins=_FFT_LENGTH // 2 + 1,
        num_mel_filters=_NUM_MEL_FILTERS,
        min_frequency=20.0,
        max_frequency=_SAMPLING_RATE / 2,
        sampling_rate=_SAMPLING_RATE,
    )
    log_mel = spectrogram(
        waveform,
        window=np.hamming(_WINDOW),
        frame_length=_WINDOW,
        hop_length=_HOP,
        fft_length=_FFT_LENGTH,
        power=2.0,
        center=False,
        preemphasis=0.97,
        remove_dc_offset=True,
        mel_filters=mel_filters,
        mel_floor=mel_floor,
        log_mel="log",
        dtype=np.dtype(np.float64),
    )
    return import_extra("scipy.fft", "analysis").dct(log_mel.T, type=2, norm="ortho", axis=1)[:, :_NUM_CEPSTRA]


def mfcc(waveform: ArrayLike, *, field: int = FIELD, tuned: bool = True) -> NDArray[np.float32]:
    """
    Mel-frequency cepstral coefficients with their first and second differences, at the frames of the model.

    13 cepstra of 40 mel filters over windows of 25 ms every 10 ms, differences by regression over two frames to each
    side, then every second frame: frame `i` has the centre of the model's frame `i`, to the sample. A model whose
    convolutions are not the paper's sees more or less than 25 ms a frame, so its frames are centred elsewhere: without
    its `field`, features and labels are apart by half of the difference. The waveform's level does not matter. Davis
    and Mermelstein, IEEE Trans. ASSP 28(4), 1980; deltas: Furui, IEEE Trans. ASSP 34(1), 1986.

    Args:
        waveform: One utterance (S,) at 16 kHz, whole: its statistics normalise it.
        field: Samples that a frame of the model sees, `config.receptive_field`; the default is the paper's.
        tuned: Whether to make the features as good for k-means as they get: a floor under the mel energies, cepstra
            smoothed over 50 ms, the mean over the utterance taken off each dimension, each divided by the square root
            of its standard deviation, and differences weighted by 1.5. False: the textbook's features, in whose
            distances the first few cepstra decide.

    Returns:
        float32 (T, 39), T = (S - field) // 320 + 1.

    Raises:
        ValueError: If the waveform is not (S,) with at least `field` finite samples, or `field` is less than 1.
        ImportError: If scipy is not installed.
    """
    signal = np.asarray(waveform, dtype=np.float64)
    if signal.ndim != 1:
        raise ValueError(f"waveform has shape {signal.shape}, but must be (S,): one utterance, mono.")
    if field < 1:
        raise ValueError(f"field={field}, but a frame sees at least 1 sample: give config.receptive_field.")
    if len(signal) < field:
        raise ValueError(
            f"waveform has {len(signal)} samples, but a frame needs {field} ({1000 * field / _SAMPLING_RATE:g} ms). "
            "Leave it out."
        )
    if not np.all(np.isfinite(signal)):
        raise ValueError("waveform holds nan or infinite samples. Check how it was read.")
    signal = (signal - signal.mean()) / np.sqrt(signal.var() + 1e-7)
    num_frames = (len(signal) - field) // _STRIDE + 1
    # From the start of the model's first frame to that of the window on its centre; silence stands in for what lies
    # outside of the utterance, which is only seen if a frame is shorter than a window.
    early = field // 2 - _WINDOW // 2
    signal = np.pad(signal, max(0, -early))
    skipped, offset = divmod(max(0, early), _HOP)

    cepstra = _cepstra(signal[offset:], _MEL_FLOOR if tuned else 1e-10)
    if tuned:
        cepstra = _weighted_sum(cepstra, _SMOOTHING)
    offsets = np.arange(-_DELTA_REACH, _DELTA_REACH + 1, dtype=np.float64)
    slope = offsets / (offsets**2).sum()
    deltas = _weighted_sum(cepstra, slope)
    features = np.concatenate([cepstra, deltas, _weighted_sum(deltas, slope)], axis=1)
    features = features[skipped::2][:num_frames]
    if tuned:
        features = features - features.mean(axis=0)
        features /= (features.std(axis=0) + 1e-8) ** _SCALE_POWER
        features *= np.repeat(_DELTA_WEIGHT ** np.arange(3), _NUM_CEPSTRA)
    return features.astype(np.float32)


@dataclass(frozen=True)
class KMeansUnits:
    """
    Fitted clusters.

    Attributes:
        centroids: float32 (V, D).
    """

    centroids: NDArray[np.float32]

    def predict(self, features: ArrayLike) -> NDArray[np.int64]:
        """
        Find the nearest centroid of each frame.

        Args:
            features: (T, D).

        Returns:
            int64 (T,) in [0, V); of equally near centroids the first.

        Raises:
            ValueError: If `features` is not (T, D).
        """
        frames = np.asarray(features, dtype=np.float32)
        dimension = self.centroids.shape[1]
        if frames.ndim != 2 or frames.shape[1] != dimension:
            raise ValueError(f"features has shape {frames.shape}, but the clusters were fitted on (T, {dimension}).")
        # |x - c|^2 without |x|^2, which is the same for all centroids.
        half_norms = 0.5 * (self.centroids**2).sum(axis=1)
        return np.argmax(frames @ self.centroids.T - half_norms, axis=1)


def kmeans_units(train_features: ArrayLike, num_clusters: int, seed: int, *, max_frames: int = 300_000) -> KMeansUnits:
    """
    Cluster frames with Lloyd's k-means from a k-means++ start (scikit-learn), until it converges.

    Not mini-batches: with 256 clusters they cost 1 to 1.5 points of phone purity, and half an hour of speech takes
    seconds either way.

    Args:
        train_features: Frames of all training utterances, (T, D).
        num_clusters: V.
        seed: Decides the start and the sample; the same seed gives the same clusters.
        max_frames: Of more frames than this a random sample is used (300,000 are 100 minutes).

    Returns:
        The clusters.

    Raises:
        ValueError: If the features are not (T, D) and finite, or there are fewer frames than clusters.
        ImportError: If scikit-learn is not installed.
    """
    frames = np.asarray(train_features, dtype=np.float32)
    if frames.ndim != 2:
        raise ValueError(f"train_features has shape {frames.shape}, but must be (T, D): join all utterances.")
    if not np.all(np.isfinite(frames)):
        raise ValueError("train_features holds nan or infinite values. Leave such frames out.")
    num_frames = min(len(frames), max_frames)
    if not 1 <= num_clusters <= num_frames:
        raise ValueError(
            f"num_clusters={num_clusters} does not fit {num_frames:,} frames: it must be at least 1 and at most the "
            "number of frames. Give more speech or fewer clusters."
        )
    if len(frames) > max_frames:
        frames = frames[np.sort(np.random.default_rng(seed).choice(len(frames), max_frames, replace=False))]
    cluster = import_extra("sklearn.cluster", "analysis")
    fitted = cluster.KMeans(num_clusters, n_init=1, max_iter=100, random_state=seed).fit(frames)
    return KMeansUnits(np.asarray(fitted.cluster_centers_, dtype=np.float32))
