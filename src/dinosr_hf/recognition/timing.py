"""
How late a recogniser says what it has heard.

CTC does not care when a label comes as long as the order is right, and an encoder that sees the whole utterance may
put all of them a fifth of a second behind the sound. Some runs of a recipe do, others of it do not. But words are
where the signal is loud. So the delay is the shift by which the words of a recogniser lie best on the level of the
signal; no times of words need to be known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..data import SAMPLING_RATE

MAX_DELAY = 0.4  # seconds, to each side: a delay is shorter than a word, or words would be taken for their neighbours
MIN_WORDS = 20
_STEP = 0.01
_RANGE_DB = 40.0  # what is quieter than that below the loudest is silence


def signal_level(waveform: NDArray[np.float32]) -> NDArray[np.float64]:
    """
    Level of a signal over time.

    Args:
        waveform: float32 (S,) at 16 kHz.

    Returns:
        float64 (steps of 10 ms,), in dB, at most 40 below the loudest step.
    """
    hop = round(_STEP * SAMPLING_RATE)
    steps = waveform[: len(waveform) // hop * hop].reshape(-1, hop)
    level = 10 * np.log10(np.square(steps, dtype=np.float64).mean(axis=1) + 1e-12)
    return np.maximum(level, level.max(initial=-np.inf) - _RANGE_DB)


def _is_word(words: Sequence[tuple[float, float]], num_steps: int) -> NDArray[np.float64]:
    """1 in steps whose middle is in a word, 0 in others, (steps,)."""
    middles = (np.arange(num_steps) + 0.5) * _STEP
    inside = np.zeros(num_steps)
    for start, end in words:
        inside[(middles >= start) & (middles < end)] = 1.0
    return inside


def emission_delay(utterances: Iterable[tuple[NDArray[np.float32], Sequence[tuple[float, float]]]]) -> float | None:
    """
    Estimate by how much the words of a recogniser lie behind the sound.

    Args:
        utterances: For each a waveform float32 (S,) at 16 kHz, and start and end of the words that were recognised in
            it, in seconds, as `CTCDecoder.word_times` gives them with no delay.

    Returns:
        Seconds, a multiple of 0.01: the shift, of 0.4 at most to each side, with the greatest covariance of "in a
        word" and level, each less its mean in the utterance, summed over utterances. Negative: words are early. None:
        with fewer than 20 words, and where there is no such shift: no covariance is positive, or the greatest is at
        the end of the range.
    """
    reach = round(MAX_DELAY / _STEP)
    covariance, num_words = np.zeros(2 * reach + 1), 0
    for waveform, words in utterances:
        level = signal_level(waveform)
        if len(level) <= reach or not words:
            continue
        num_words += len(words)
        inside = _is_word(words, len(level))
        inside, level = inside - inside.mean(), level - level.mean()
        for position, shift in enumerate(range(-reach, reach + 1)):
            late, said = inside[max(0, shift) :], level[max(0, -shift) :]
            length = min(len(late), len(said))
            covariance[position] += late[:length] @ said[:length]
    best = int(covariance.argmax())
    if num_words < MIN_WORDS or covariance[best] <= 0 or best in (0, 2 * reach):
        return None
    return round((best - reach) * _STEP, 2)
