"""
The baseline that a model's units must beat: MFCCs at the model's frames, for k-means (`analysis.kmeans`) to cluster.

Their constants were tuned for phone purity and PNMI, as hard as one would tune a model, on real speech of other
speakers than the reported ones. `S` samples, `T` frames, `D` feature dimensions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..data import SAMPLING_RATE
from ..utils.command_line import check_ranges
from ..utils.extras import import_extra
from .alignment import FIELD, STRIDE

_WINDOW = 400
# Cepstra are computed at 100 Hz; every second one lies at the centre of a frame of the model.
_HOP = STRIDE // 2
_FFT_LENGTH = 512
_NUM_MEL_FILTERS = 40
_PREEMPHASIS = 0.97
_NUM_CEPSTRA = 13
NUM_MFCCS = 3 * _NUM_CEPSTRA  # with first and second differences
MFCC_KINDS = {"textbook": False, "tuned": True}  # name of the features -> `tuned` of `mfcc`
_SLOPE = np.arange(-2, 3) / 10  # of the line through five cepstra

# For a waveform of unit variance, energies below this are noise between words. Without a floor, their logarithms
# spread silence over many clusters.
_MEL_FLOOR = 1e-2
# Hann window over 50 ms of cepstra.
_SMOOTHING = np.array([0.25, 0.75, 1.0, 0.75, 0.25]) / 3.0
# Each dimension is divided by its standard deviation to this power. 0 lets the first few cepstra decide distances, 1
# gives the same weight to the last ones, which tell phones apart least; 0.5 was far better than either.
_SCALE_POWER = 0.5
_DELTA_WEIGHT = 1.5
_MAX_WINDOWS = 30_000  # whose spectra are in memory at once: 5 minutes


def _cepstra(waveform: NDArray[np.float64], mel_floor: float) -> NDArray[np.float64]:
    """Mel-frequency cepstra at 100 Hz, (number of complete windows, 13)."""
    firsts = range(0, (len(waveform) - _WINDOW) // _HOP + 1, _MAX_WINDOWS)
    parts = [waveform[first * _HOP :][: (_MAX_WINDOWS - 1) * _HOP + _WINDOW] for first in firsts]
    return np.concatenate([_cepstra_of_part(part, mel_floor) for part in parts])


def _cepstra_of_part(waveform: NDArray[np.float64], mel_floor: float) -> NDArray[np.float64]:
    from transformers.audio_utils import mel_filter_bank

    fft = import_extra("scipy.fft", "analysis")
    # transformers' `spectrogram` does the same window by window, in a loop that takes several times as long: subtract
    # the window's mean m and emphasise high frequencies, (x[t] - m) - 0.97 (x[t - 1] - m), of the first x[0] - m.
    fields = np.lib.stride_tricks.sliding_window_view(waveform, _WINDOW)[::_HOP]
    differences = waveform[1:] - _PREEMPHASIS * waveform[:-1]
    windows = np.empty(fields.shape)
    windows[:, 0] = (1 - _PREEMPHASIS) * fields[:, 0]
    windows[:, 1:] = np.lib.stride_tricks.sliding_window_view(differences, _WINDOW - 1)[::_HOP]
    windows -= (1 - _PREEMPHASIS) * fields.mean(axis=1, keepdims=True)
    windows *= np.hamming(_WINDOW)
    spectrum = fft.rfft(windows, _FFT_LENGTH, axis=1)
    power = spectrum.real**2 + spectrum.imag**2
    # From 20 Hz to half the sampling rate.
    filters = mel_filter_bank(_FFT_LENGTH // 2 + 1, _NUM_MEL_FILTERS, 20.0, SAMPLING_RATE / 2, SAMPLING_RATE)
    log_mel = np.log(np.maximum(power @ filters, mel_floor))
    return fft.dct(log_mel, norm="ortho")[:, :_NUM_CEPSTRA]


def mfcc(waveform: ArrayLike, *, field: int = FIELD, tuned: bool = True) -> NDArray[np.float32]:
    """
    Compute mel-frequency cepstra with first and second differences: float32 (T, 39), T = (S - field) // 320 + 1.

    13 cepstra of 40 mel filters over windows of 25 ms every 10 ms, differences by regression over two frames to each
    side, then every second frame, so that frame `i` is centred on sample `320 i + field / 2` as the model's is. The
    level of the waveform does not matter. Davis and Mermelstein, IEEE Trans. ASSP 28(4), 1980; deltas: Furui, IEEE
    Trans. ASSP 34(1), 1986.

    Args:
        waveform: One complete utterance (S,) at 16 kHz; it is normalised by its own statistics.
        field: Number of samples that a frame of the model sees, `config.receptive_field`. For a model whose
            convolutions are not the paper's, the default would shift features against labels by half the difference.
        tuned: Whether to make the features as good for k-means as they get: a floor under the mel energies, cepstra
            smoothed over 50 ms, each dimension centred over the utterance and divided by the square root of its
            standard deviation, and differences weighted by 1.5. False: the textbook's features, in whose distances
            the first few cepstra decide.

    Raises `ValueError` if the waveform is not (S,) with at least `field` finite samples, or `field` is less than 1.
    """
    signal = np.asarray(waveform, dtype=np.float64)
    if signal.ndim != 1:
        raise ValueError(f"waveform has shape {signal.shape}, but must be (S,): one mono utterance.")
    check_ranges([(field >= 1, "field", field, "at least 1 sample; pass config.receptive_field")])
    if len(signal) < field:
        raise ValueError(
            f"waveform has {len(signal)} samples, but a frame needs {field} ({1000 * field / SAMPLING_RATE:g} ms)."
            " Leave it out."
        )
    if not np.all(np.isfinite(signal)):
        raise ValueError("waveform contains nan or infinite samples. Check how it was read.")
    signal = (signal - signal.mean()) / np.sqrt(signal.var() + 1e-7)
    num_frames = (len(signal) - field) // STRIDE + 1
    # Samples from the start of the model's first frame to the start of the window on its centre. If a frame is shorter
    # than a window, the window begins before the utterance: pad with silence.
    early = field // 2 - _WINDOW // 2
    signal = np.pad(signal, max(0, -early))
    skipped, offset = divmod(max(0, early), _HOP)

    cepstra = _cepstra(signal[offset:], _MEL_FLOOR if tuned else 1e-10)
    correlate = import_extra("scipy.ndimage", "analysis").correlate1d
    if tuned:
        cepstra = correlate(cepstra, _SMOOTHING, axis=0, mode="nearest")
    deltas = correlate(cepstra, _SLOPE, axis=0, mode="nearest")
    features = np.concatenate([cepstra, deltas, correlate(deltas, _SLOPE, axis=0, mode="nearest")], axis=1)
    features = features[skipped::2][:num_frames]
    if tuned:
        features = features - features.mean(axis=0)
        features /= (features.std(axis=0) + 1e-8) ** _SCALE_POWER
        features *= np.repeat(_DELTA_WEIGHT ** np.arange(3), _NUM_CEPSTRA)
    return features.astype(np.float32)
