"""
Emission delay: by how much a recogniser's labels come after their sound.

CTC only asks for the right order of labels, and an encoder that sees the complete utterance may emit all of them a
fifth of a second late; it differs between runs of a recipe. But words are where the signal is loud, so the delay is
the shift that best aligns recognised words with the level of the signal. Fine-tuning measures it and stores it in the
tokenizer's settings (`tokenizer_config.json`), which travel with the processor into every export; decoders subtract it
from the times of words.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data import SAMPLING_RATE

MAX_DELAY = 0.4  # seconds, early or late; with a longer shift, words would be matched with their neighbours
MIN_WORDS = 20
_STEP = 0.01
_RANGE_DB = 40.0  # below the loudest step; quieter steps count as silence

_SETTING = "emission_delay"


def store_emission_delay(tokenizer: Any, seconds: float) -> None:
    """Keep an emission delay in a tokenizer's settings, which `save_pretrained` writes to tokenizer_config.json."""
    tokenizer.init_kwargs[_SETTING] = seconds


def stored_emission_delay(tokenizer: Any) -> float:
    """Return a recogniser's emission delay in seconds, 0 if none was measured; `ValueError` if it is beyond 1 s."""
    delay = tokenizer.init_kwargs.get(_SETTING, 0.0)
    if not -1 <= delay <= 1:
        raise ValueError(f"emission_delay={delay} in tokenizer_config.json must be at least -1 and at most 1 second.")
    return float(delay)


def signal_level(waveform: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the level of a signal (S,) at 16 kHz in steps of 10 ms, in dB, clipped 40 dB below the loudest step."""
    hop = round(_STEP * SAMPLING_RATE)
    steps = waveform[: len(waveform) // hop * hop].reshape(-1, hop)
    level = 10 * np.log10(np.square(steps, dtype=np.float64).mean(axis=1) + 1e-12)
    return np.maximum(level, level.max(initial=-np.inf) - _RANGE_DB)


def measure_emission_delay(
    utterances: Iterable[tuple[NDArray[np.float32], Sequence[tuple[float, float]]]],
) -> float | None:
    """
    Estimate by how much the recognised words of utterances come after their sound.

    Each utterance is its waveform float32 (S,) at 16 kHz, and the start and end of each of its words in seconds, as
    `CTCDecoder.path_times` gives them without delay. Returns seconds, a multiple of 0.01 and at most 0.4 early
    (negative) or late: the shift with the greatest covariance of "in a word" and level, each centred within its
    utterance, summed over utterances. Returns None if there are fewer than 20 words, no covariance is positive, or the
    greatest one is at the end of the range.
    """
    reach = round(MAX_DELAY / _STEP)
    covariance, num_words = np.zeros(2 * reach + 1), 0
    for waveform, words in utterances:
        level = signal_level(waveform)
        if len(level) <= reach or not words:
            continue
        num_words += len(words)
        middles = (np.arange(len(level)) + 0.5) * _STEP
        inside = np.any([(middles >= start) & (middles < end) for start, end in words], axis=0)
        # For each shift of the words from -reach to reach.
        covariance += np.correlate(np.pad(inside - inside.mean(), reach), level - level.mean(), "valid")
    best = int(covariance.argmax())
    if num_words < MIN_WORDS or covariance[best] <= 0 or best in (0, 2 * reach):
        return None
    return round((best - reach) * _STEP, 2)
