"""Excerpts of recordings, by which a run tells that one was replaced by another of the same length."""

import numpy as np

from .audio import SAMPLING_RATE, AudioFileError
from .sources import SpeechSource

# A few samples of a second of sound, early enough to be read quickly where a file cannot be searched.
_SECONDS, _NUM_VALUES, _LATEST_START_SECONDS = 1, 16, 10
_TOLERANCE = 0.01  # of its largest value: decoders and resamplers differ by less between releases


def excerpt_of(recordings: SpeechSource, index: int) -> list[float] | None:
    """Return a few samples of a recording; None if it has none or cannot be read."""
    num_samples = recordings.utterances[index].num_samples
    size = min(num_samples, _SECONDS * SAMPLING_RATE)
    if size == 0:
        return None
    start = min((num_samples - size) // 2, _LATEST_START_SECONDS * SAMPLING_RATE)
    try:
        wave = recordings.load(index, start, size)
    except (AudioFileError, OSError):
        return None
    places = np.linspace(0, size - 1, _NUM_VALUES).astype(int)
    return [float(f"{value:.6g}") for value in np.nan_to_num(wave[places])]


def is_alike(excerpt: list[float], other: list[float] | None) -> bool:
    """Return whether two excerpts are of the same recording, whatever decoded it; any is like None."""
    if other is None:
        return True
    atol = _TOLERANCE * np.abs(excerpt).max(initial=0)
    return len(other) == len(excerpt) and bool(np.allclose(other, excerpt, rtol=0, atol=atol))
