"""
Language model weight and word score, chosen on a development set.

wav2vec 2.0 (arXiv 2006.11477) searches weights in [0, 5] and word scores in [-5, 5], 128 of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .decoding import CTCDecoder
from .scoring import score

LM_WEIGHTS = (0.0, 5.0)
WORD_SCORES = (-5.0, 5.0)


class Trial(NamedTuple):
    """
    What a pair of weights comes to.

    Attributes:
        lm_weight: Factor of log10 p(text).
        word_score: Added for each word.
        word_errors: Words substituted, deleted and inserted, summed over the utterances.
        num_words: Words of the references.
    """

    lm_weight: float
    word_score: float
    word_errors: int
    num_words: int

    @property
    def word_error_rate(self) -> float:
        """Errors a word of the references: of sums, not a mean over utterances."""
        return self.word_errors / self.num_words


def grid(lm_weights: Iterable[float], word_scores: Iterable[float]) -> list[tuple[float, float]]:
    """All pairs of a language model weight and a word score."""
    return list(itertools.product(lm_weights, word_scores))


def random_pairs(
    num_pairs: int,
    *,
    lm_weights: tuple[float, float] = LM_WEIGHTS,
    word_scores: tuple[float, float] = WORD_SCORES,
    seed: int = 0,
) -> list[tuple[float, float]]:
    """
    Pairs of a language model weight and a word score, drawn evenly from two ranges.

    Args:
        num_pairs: How many.
        lm_weights: Least and greatest weight.
        word_scores: Least and greatest word score.
        seed: Of the draw; the first pairs of a longer list are those of a shorter one.

    Returns:
        (lm_weight, word_score), rounded to hundredths.

    Raises:
        ValueError: If a range ends before it begins, or `num_pairs` is not positive.
    """
    if num_pairs < 1:
        raise ValueError(f"num_pairs={num_pairs} must be at least 1.")
    for name, (low, high) in (("lm_weights", lm_weights), ("word_scores", word_scores)):
        if not -math.inf < low <= high < math.inf:
            raise ValueError(f"{name}={low, high} must be the least and the greatest value, in this order.")
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
    on_trial: Callable[[Trial], object] | None = None,
) -> list[Trial]:
    """
    Decode a development set with each pair of weights, and count word errors.

    Args:
        make_decoder: From a language model weight and a word score to a decoder: `BeamSearchDecoder.reweighted`.
        log_probs: Emissions of each utterance, float (T, V), computed once.
        references: What is said in each.
        pairs: Of `grid` or `random_pairs`.
        normalize: Applied to references and hypotheses alike before words are counted.
        on_trial: Called with each trial as it is done.

    Returns:
        A trial for each pair, the fewest errors first; of equals the one whose pair comes first.

    Raises:
        ImportError: If jiwer is not installed.
        ValueError: If there are no pairs, no words to get right, or not as many references as utterances.
    """
    if len(log_probs) != len(references):
        raise ValueError(f"There are {len(log_probs)} utterances and {len(references)} references. Give one for each.")
    if not pairs:
        raise ValueError("There are no pairs of weights to try. Make some with grid or random_pairs.")
    expected, trials = [normalize(reference) for reference in references], []
    for lm_weight, word_score in pairs:
        decoder = make_decoder(lm_weight, word_score)
        rows = score(expected, [normalize(decoder.decode(frames)[0].text) for frames in log_probs]).utterances
        errors, num_words = sum(row.word_errors for row in rows), sum(row.num_words for row in rows)
        trials.append(Trial(lm_weight, word_score, errors, num_words))
        if on_trial is not None:
            on_trial(trials[-1])
    return sorted(trials, key=lambda trial: trial.word_errors)
