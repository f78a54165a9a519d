"""
Several sources as one, each with its share of an epoch: languages of unlike size in multilingual pre-training.

`S` samples at 16 kHz.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from .audio import SAMPLING_RATE
from .collator import utterance_generator
from .sources import SpeechSource, Utterance

# Passes through a source in an epoch are counted in these parts, so that all that follows is whole numbers: the last
# digit of a power may differ between machines, and with it an epoch's last utterance.
_PASS = 1 << 32


class MixedSource(SpeechSource):
    """
    Several sources, mixed: an epoch has as much audio as all of them together, but each has the share it is given.

    The share of source i is proportional to `weight_i * hours_i ** temperature`, the rule of XLSR (Conneau et al.
    2020, arXiv 2006.13979) and, before it, of multilingual BERT, whose exponent this is. What a large source lacks in
    one epoch comes in later ones: each source is gone through in random order, pass after pass, and an epoch goes on
    where the one before it stopped. So in the long run all utterances of a source are used equally often.

    The id of an utterance is `name/id`.

    Args:
        sources: At least one, none of them a mixture.
        names: One each; they are part of the ids, on which masks and crops depend.
        weights: One each, more than 0. None: all 1.
        temperature: More than 0 and at most 1. 1: every source by its size, so that without weights an epoch is every
            utterance once; towards 0: all sources alike.

    Raises:
        ValueError: For arguments that do not fit each other or are out of range, and for ids that are not unique.
    """

    def __init__(
        self,
        sources: Sequence[SpeechSource],
        names: Sequence[str],
        *,
        weights: Sequence[float] | None = None,
        temperature: float = 1.0,
    ) -> None:
        self.weights = [1.0] * len(sources) if weights is None else list(weights)
        self.names = list(names)
        self.temperature = temperature
        self._check(sources)
        self.sources = list(sources)
        self.utterances = [
            Utterance(f"{name}/{utterance_id}", num_samples)
            for name, source in zip(names, sources, strict=True)
            for utterance_id, num_samples in source.utterances
        ]
        self.skipped = {}
        for name, source in zip(names, sources, strict=True):
            for reason, ids in source.skipped.items():
                self.skipped.setdefault(reason, []).extend(f"{name}/{utterance_id}" for utterance_id in ids)
        if len({utterance.id for utterance in self.utterances}) < len(self.utterances):
            raise ValueError(f"With the names {', '.join(names)} some ids are the same. Give other names.")
        self._firsts = [0, *accumulate(map(len, sources))]  # index of each source's first utterance; then, of none

    def _check(self, sources: Sequence[SpeechSource]) -> None:
        if not sources or not len(sources) == len(self.names) == len(self.weights):
            raise ValueError(
                f"{len(sources)} sources, {len(self.names)} names and {len(self.weights)} weights: there must be as"
                " many of each, at least one."
            )
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"names={self.names} has a name twice. Give each source one of its own.")
        if not all(math.isfinite(weight) and weight > 0 for weight in self.weights):
            raise ValueError(f"weights={self.weights} must be numbers above 0. Leave out a source you do not want.")
        if not 0 < self.temperature <= 1:
            raise ValueError(f"temperature={self.temperature} is out of range: it must be above 0 and at most 1.")
        for name, source in zip(self.names, sources, strict=True):
            if isinstance(source, MixedSource):
                raise ValueError(f"{name} is a mixture itself. Give its sources one by one, with their weights.")

    def load(self, index: int, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        """See `SpeechSource.load`. Raises as the source of the utterance."""
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self.sources[number].load(index - self._firsts[number], start, num_samples)

    def _lengths(self, number: int, min_samples: int, max_samples: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Positions of a source's utterances that are long enough, and what is used of each at a time."""
        lengths = np.array([length for _, length in self.sources[number].utterances], dtype=np.int64)
        positions = np.flatnonzero(lengths >= min_samples)
        if len(positions) == 0:
            raise ValueError(
                f"None of the {len(lengths):,} utterances of {self.names[number]} has min_samples={min_samples:,}"
                f" ({min_samples / SAMPLING_RATE:,.2f} s). Lower it, or leave this source out."
            )
        return positions, np.minimum(lengths[positions], max_samples or lengths.max())

    def _shares(self, num_samples: Sequence[int]) -> list[float]:
        """Share of each source in an epoch, from the audio of one pass through it."""
        total = sum(num_samples)
        odds = [
            weight * (length / total) ** self.temperature
            for weight, length in zip(self.weights, num_samples, strict=True)
        ]
        return [each / sum(odds) for each in odds]

    def epoch_members(
        self, epoch: int, *, seed: int, min_samples: int = 1, max_samples: int | None = None
    ) -> list[tuple[int, int]]:
        """
        The members of an epoch, for `plan_epoch`. Depends on the arguments only: any epoch can be asked for directly.

        Args:
            epoch: From 0.
            seed: Of the run.
            min_samples: Length of the shortest utterance used.
            max_samples: Length of the longest part of an utterance, which is what it counts for. None: no limit.

        Returns:
            (index, pass), sorted. Passes count how often an utterance was used before; no (index, pass) occurs in two
            epochs, or twice in one.

        Raises:
            ValueError: If a source has no utterance that is long enough.
        """
        parts = [self._lengths(number, min_samples, max_samples) for number in range(len(self.sources))]
        passes_of = [int(lengths.sum()) for _, lengths in parts]
        members: list[tuple[int, int]] = []
        for number, share in enumerate(self._shares(passes_of)):
            positions, lengths = parts[number]
            one_pass = passes_of[number]
            passes_an_epoch = max(1, round(share * sum(passes_of) / one_pass * _PASS))
            # All passes one after the other are a tape; the epoch is what begins on its piece of the tape.
            begin = epoch * passes_an_epoch * one_pass // _PASS
            end = (epoch + 1) * passes_an_epoch * one_pass // _PASS
            for own_epoch in range(begin // one_pass, -(-end // one_pass)):
                order = utterance_generator(seed, own_epoch, self.names[number], "mixture").permutation(len(lengths))
                starts = np.cumsum(lengths[order]) - lengths[order] + own_epoch * one_pass
                chosen = positions[order[(starts >= begin) & (starts < end)]] + self._firsts[number]
                members += ((index, own_epoch) for index in chosen.tolist())
        return sorted(members)

    def describe(self, *, min_samples: int = 1, max_samples: int | None = None) -> str:
        """
        Hours of each source, its share of all audio, and its share of an epoch; a line each.

        Args:
            min_samples: As for `epoch_members`.
            max_samples: As for `epoch_members`.

        Raises:
            ValueError: As `epoch_members`.
        """
        parts = [self._lengths(number, min_samples, max_samples) for number in range(len(self.sources))]
        audio = [int(lengths.sum()) for _, lengths in parts]
        total = sum(audio)
        width = max(map(len, self.names))
        lines = [
            f"Mixture of {len(self.names)} sources, {total / SAMPLING_RATE / 3600:,.2f} h an epoch,"
            f" temperature {self.temperature:g}:"
        ]
        for number, share in enumerate(self._shares(audio)):
            lines.append(
                f"  {self.names[number]:{width}}  {audio[number] / SAMPLING_RATE / 3600:,.2f} h in"
                f" {len(parts[number][0]):,} utterances, weight {self.weights[number]:g}: {audio[number] / total:.1%}"
                f" of the audio, {share:.1%} of an epoch ({share * total / audio[number]:.2f} passes)"
            )
        return "\n".join(lines)
