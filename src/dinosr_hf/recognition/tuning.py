"""
Tuning of language model weight and word score on a development set.

wav2vec 2.0 (arXiv 2006.11477) tries 128 pairs, with weights in [0, 5] and word scores in [-5, 5].
"""

import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .decoding import CTCDecoder
from .scoring import score

LM_WEIGHTS = (0.0, 5.0)
WORD_SCORES = (-5.0, 5.0)


class Trial(NamedTuple):
    """Errors of a development set with a pair of weights, and numbers of words and characters in all references."""

    lm_weight: float
    word_score: float
    word_errors: int
    num_words: int
    character_errors: int
    num_characters: int

    @property
    def word_error_rate(self) -> float:
        """Word errors over reference words, of all utterances together."""
        return self.word_errors / self.num_words

    @property
    def character_error_rate(self) -> float:
        """Character errors over reference characters, of all utterances together."""
        return self.character_errors / self.num_characters


def random_pairs(
    num_pairs: int,
    *,
    lm_weights: tuple[float, float] = LM_WEIGHTS,
    word_scores: tuple[float, float] = WORD_SCORES,
    seed: int = 0,
) -> list[tuple[float, float]]:
    """
    Draw pairs of a language model weight and a word score uniformly from two ranges, (minimum, maximum) each.

    They are rounded to hundredths, and with the same seed a longer list begins with the pairs of a shorter one. Raises
    `ValueError` if a minimum is greater than its maximum, or `num_pairs` is not positive.
    """
    if num_pairs < 1:
        raise ValueError(f"num_pairs={num_pairs} must be at least 1.")
    for name, (low, high) in (("lm_weights", lm_weights), ("word_scores", word_scores)):
        if not -math.inf < low <= high < math.inf:
            raise ValueError(f"{name}={low, high} must be the minimum and the maximum, in this order.")
    drawn = np.random.default_rng(seed).random((num_pairs, 2))
    lows, highs = np.transpose([lm_weights, word_scores])
    return [(weight, score) for weight, score in (lows + drawn * (highs - lows)).round(2).tolist()]


def tune(
    make_decoder: Callable[[float, float], CTCDecoder],
    log_probs: Sequence[ArrayLike],
    references: Sequence[str],
    pairs: Sequence[tuple[float, float]],
    *,
    normalize: Callable[[str], str] = str,
    decode: Callable[[CTCDecoder, Any], str] = lambda decoder, frames: decoder.decode(frames)[0].text,
    on_trial: Callable[[Trial], object] | None = None,
) -> list[Trial]:
    """
    Decode a development set with each pair of weights, and count word and character errors.

    Args:
        make_decoder: Returns a decoder for a language model weight and a word score: `BeamSearchDecoder.reweighted`.
        log_probs: Emissions of each utterance, float (T, V).
        references: Transcript of each utterance.
        pairs: Pairs of weights to try, at least one.
        normalize: Applied to references and hypotheses before errors are counted.
        decode: Returns the text of an utterance by a decoder: by default of all of it at once.
        on_trial: Called with each trial when it is done.

    Returns a trial for each pair, the best by `ErrorReport.ranking` first; ties are in the order of `pairs`. Raises
    `ValueError` if no reference has a word, or the numbers of utterances differ.
    """
    if not pairs:
        raise ValueError("There are no pairs of weights to try. Give at least one.")
    expected = [normalize(reference) for reference in references]
    ranked: list[tuple[float, Trial]] = []
    for lm_weight, word_score in pairs:
        decoder = make_decoder(lm_weight, word_score)
        report = score(expected, [normalize(decode(decoder, frames)) for frames in log_probs])
        trial = Trial(lm_weight, word_score, **report.totals)
        ranked.append((report.ranking, trial))
        if on_trial is not None:
            on_trial(trial)
    return [trial for _, trial in sorted(ranked, key=itemgetter(0))]
