"""Parts of sources, and several as one: one after the other, or mixed so that each has its share of an epoch."""

import math
from collections.abc import Sequence
from itertools import accumulate, chain

import numpy as np

from .audio import SAMPLING_RATE
from .collator import utterance_generator, utterance_hash
from .sources import SpeechSource, Utterance

# Passes through a source in an epoch are counted in fractions of 1 / _PASS, so that the rest is integer arithmetic:
# the last digit of a power may differ between machines, and with it the last utterance of an epoch.
_PASS = 1 << 32


class PartialSource(SpeechSource):
    """Some utterances of a source, by their indices in it."""

    def __init__(self, source: SpeechSource, indices: Sequence[int]) -> None:
        self._source, self._indices = source, list(indices)
        self.utterances, self.skipped = [source.utterances[index] for index in indices], source.skipped

    @property
    def others(self) -> list[str]:
        own = set(self.ids)
        return [*(name for name, _ in self._source.utterances if name not in own), *self._source.others]

    def load(self, index: int, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        return self._source.load(self._indices[index], start, num_samples)

    def labels(self, column: str | None = None) -> list[str | None]:
        labels = self._source.labels(column)
        return [labels[index] for index in self._indices]


def hold_out(source: SpeechSource, share: float) -> tuple[PartialSource, PartialSource]:
    """
    Split off about a share of the utterances, at least one; return the others, and those.

    Of each utterance its id alone decides, so adding others changes nothing for it, except that an utterance is no
    longer held out if it was only so that there is one. Raises `ValueError` if no utterance would be left.
    """
    hashes = [utterance_hash(0, 0, utterance.id, "held out") for utterance in source.utterances]
    limit = max(int(share * 2**128), min(hashes) + 1)
    held = [index for index, own in enumerate(hashes) if own < limit]
    if len(held) == len(source):
        raise ValueError(
            f"A share of {share:g} of {len(source)} recordings leaves none to train on. Give more recordings or a"
            " smaller share."
        )
    kept = [index for index, own in enumerate(hashes) if own >= limit]
    return PartialSource(source, kept), PartialSource(source, held)


class JoinedSource(SpeechSource):
    """Several sources, one after the other, with a prefix to the ids of each; None: `0:`, `1:`, ..."""

    def __init__(self, sources: Sequence[SpeechSource], prefixes: Sequence[str] | None = None) -> None:
        self.sources = list(sources)
        self._prefixes = [f"{number}:" for number in range(len(sources))] if prefixes is None else prefixes
        self._firsts = [0, *accumulate(map(len, sources))]  # index of the first utterance of each source, and the end
        self.utterances, self.skipped = [], {}
        for prefix, source in zip(self._prefixes, sources, strict=True):
            self.utterances += (Utterance(prefix + name, num_samples) for name, num_samples in source.utterances)
            for reason, ids in source.skipped.items():
                self.skipped.setdefault(reason, []).extend(prefix + name for name in ids)

    @property
    def others(self) -> list[str]:
        pairs = zip(self._prefixes, self.sources, strict=True)
        return [prefix + name for prefix, source in pairs for name in source.others]

    def load(self, index: int, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self.sources[number].load(index - self._firsts[number], start, num_samples)

    def labels(self, column: str | None = None) -> list[str | None]:
        return list(chain.from_iterable(source.labels(column) for source in self.sources))


class MixedSource(JoinedSource):
    """
    Several sources, mixed: an epoch has as much audio as all of them together, but each has the share it is given.

    The share of source i is proportional to `weight_i * hours_i ** temperature`, the rule of XLSR (Conneau et al.
    2020, arXiv 2006.13979) and, before it, of multilingual BERT, whose exponent this is. A large source is not used
    completely in one epoch: each source is read in random order, pass after pass, and an epoch continues where the
    previous one stopped. So in the long run all utterances of a source are used equally often. The id of an utterance
    is `name/id`.

    Args:
        sources: At least one, none of them a mixture.
        names: One per source; they are part of the ids, on which masks and crops depend.
        weights: One per source, greater than 0. None: all 1.
        temperature: Greater than 0 and at most 1. 1: every source by its size, so that without weights an epoch is
            every utterance once; towards 0: all sources alike.

    Raises `ValueError` if arguments do not match each other or are out of range, or ids are not unique.
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
        super().__init__(sources, [f"{name}/" for name in names])
        if len(set(self.ids)) < len(self):
            raise ValueError(f"With the names {', '.join(names)} some ids are the same. Give other names.")

    def _check(self, sources: Sequence[SpeechSource]) -> None:
        if not sources or not len(sources) == len(self.names) == len(self.weights):
            counts = f"{len(sources)} sources, {len(self.names)} names and {len(self.weights)} weights"
            raise ValueError(f"{counts}: there must be as many of each, at least one.")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"names={self.names} has a name twice. Give each source a name of its own.")
        if not all(math.isfinite(weight) and weight > 0 for weight in self.weights):
            raise ValueError(f"weights={self.weights} must be numbers above 0. Leave out a source you do not want.")
        if not 0 < self.temperature <= 1:
            raise ValueError(f"temperature={self.temperature} is out of range: it must be above 0 and at most 1.")
        for name, source in zip(self.names, sources, strict=True):
            if isinstance(source, MixedSource):
                raise ValueError(f"{name} is a mixture itself. Give its sources one by one, with their weights.")

    def _usable(self, min_samples: int, max_samples: int | None) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return, for each source, the positions of utterances that are long enough, and how much of each is used."""
        usable = []
        for name, source in zip(self.names, self.sources, strict=True):
            lengths = np.array([length for _, length in source.utterances], dtype=np.int64)
            positions = np.flatnonzero(lengths >= min_samples)
            if len(positions) == 0:
                limit = f"{min_samples / SAMPLING_RATE:g} s long (min_samples={min_samples:,}, of a run min_seconds)"
                problem = f"None of the {len(lengths):,} utterances of {name} is at least {limit}"
                raise ValueError(f"{problem}. Lower the minimum, or leave this source out.")
            usable.append((positions, np.minimum(lengths[positions], max_samples or lengths.max())))
        return usable

    def _shares(self, num_samples: Sequence[int]) -> list[float]:
        """Return the share of each source in an epoch, given the audio of one pass through each."""
        total, pairs = sum(num_samples), zip(self.weights, num_samples, strict=True)
        odds = [weight * (length / total) ** self.temperature for weight, length in pairs]
        return [each / sum(odds) for each in odds]

    def epoch_members(
        self, epoch: int, *, seed: int, min_samples: int = 1, max_samples: int | None = None
    ) -> list[tuple[int, int]]:
        """
        Return the members of an epoch, for `plan_epoch`, which has the same arguments (`max_samples` None: no limit).

        They are (index, pass), sorted. The pass is how often the utterance was used before; no (index, pass) occurs in
        two epochs, or twice in one. Any epoch can be computed without the previous ones. Raises `ValueError` if a
        source has no utterance of `min_samples`.
        """
        usable = self._usable(min_samples, max_samples)
        samples_per_pass = [int(lengths.sum()) for _, lengths in usable]
        members: list[tuple[int, int]] = []
        for number, share in enumerate(self._shares(samples_per_pass)):
            (positions, lengths), one_pass = usable[number], samples_per_pass[number]
            passes_per_epoch = max(1, round(share * sum(samples_per_pass) / one_pass * _PASS))
            # Think of all passes in a row as a tape: an epoch consists of what begins on its piece of the tape.
            begin = epoch * passes_per_epoch * one_pass // _PASS
            end = (epoch + 1) * passes_per_epoch * one_pass // _PASS
            for own_epoch in range(begin // one_pass, -(-end // one_pass)):
                order = utterance_generator(seed, own_epoch, self.names[number], "mixture").permutation(len(lengths))
                starts = np.cumsum(lengths[order]) - lengths[order] + own_epoch * one_pass
                chosen = positions[order[(starts >= begin) & (starts < end)]] + self._firsts[number]
                members += ((index, own_epoch) for index in chosen.tolist())
        return sorted(members)

    def describe(self, *, min_samples: int = 1, max_samples: int | None = None) -> str:
        """Return hours, share of all audio and share of an epoch, one line per source; see `epoch_members`."""
        usable = self._usable(min_samples, max_samples)
        audio = [int(lengths.sum()) for _, lengths in usable]
        total, width = sum(audio), max(map(len, self.names))
        hours = f"{total / SAMPLING_RATE / 3600:,.2f} h an epoch"
        lines = [f"Mixture of {len(self.names)} sources, {hours}, temperature {self.temperature:g}:"]
        for number, share in enumerate(self._shares(audio)):
            lines.append(
                f"  {self.names[number]:{width}}  {audio[number] / SAMPLING_RATE / 3600:,.2f} h in"
                f" {len(usable[number][0]):,} utterances, weight {self.weights[number]:g}: {audio[number] / total:.1%}"
                f" of the audio, {share:.1%} of an epoch ({share * total / audio[number]:.2f} passes)"
            )
        return "\n".join(lines)
