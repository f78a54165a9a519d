"""
What each codeword stands for: its phones, its neighbours, how long it lasts, and its most typical moments.

Recordings are taken in one by one and not kept. `T` frames, `P` phones, `V` codewords, `R` runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..alignment import Labels, Segment, align_labels, label_name, label_segments

# The edge of a recording, where a phone or codeword would be.
EDGE = "(edge)"

# Runs of so many frames or more count as equally long when typical moments are chosen.
_LONG_ENOUGH = 3


class Share(NamedTuple):
    """A phone or codeword, and its share of all that stand in its place."""

    name: str
    share: float


class Moment(NamedTuple):
    """
    A run of a codeword in a recording.

    Attributes:
        recording: Id of the recording.
        first: Its first frame.
        num_frames: How long it is.
        score: Mean of its frames' scores; nan without scores.
    """

    recording: str
    first: int
    num_frames: int
    score: float


class CodewordSummary(NamedTuple):
    """
    What is known of a codeword.

    Attributes:
        code: Its number.
        num_frames: Frames that have it.
        share: Of all frames.
        num_runs: Runs of it.
        mean_frames: Of a run.
        phones: Phones of its frames, the most frequent first; empty without labels.
        codes_before: Codewords of the runs before its runs, the most frequent first.
        codes_after: Those behind.
        phones_before: Phones of the frames before its runs.
        phones_after: Those behind.
        moments: The most typical runs, best first.
    """

    code: int
    num_frames: int
    share: float
    num_runs: int
    mean_frames: float
    phones: Sequence[Share]
    codes_before: Sequence[Share]
    codes_after: Sequence[Share]
    phones_before: Sequence[Share]
    phones_after: Sequence[Share]
    moments: Sequence[Moment]


class Example(NamedTuple):
    """A recording to draw: its id, units (T,), phones and words in seconds; none without labels of them."""

    recording: str
    codes: NDArray[np.int64]
    phones: Sequence[Segment]
    words: Sequence[Segment] = ()


class Inspection(NamedTuple):
    """
    A codebook on a corpus.

    Attributes:
        codewords: Those in use, by number.
        counts: int64 (V,), frames of each codeword.
        table: int64 (P, V), of frames with a label; P is 0 without labels.
        phones: The P phones, sorted.
        num_recordings: Recordings with at least a frame.
        num_labelled: Those with labels.
        bad_labels: Id -> why its labels were left out.
        example: The longest of the labelled recordings, else of all, up to a minute.
    """

    codewords: Sequence[CodewordSummary]
    counts: NDArray[np.int64]
    table: NDArray[np.int64]
    phones: Sequence[str]
    num_recordings: int
    num_labelled: int
    bad_labels: Mapping[str, str]
    example: Example | None


class _Counts:
    """Counts of names (rows, found as they come) by codeword."""

    def __init__(self, num_codes: int) -> None:
        self._num_codes = num_codes
        self._rows: dict[str, NDArray[np.int64]] = {}

    def add(self, names: Sequence[str], codes: NDArray[np.int64]) -> None:
        found, place = np.unique(np.asarray(names, dtype=object).astype(str), return_inverse=True)
        for row, name in enumerate(found.tolist()):
            new = np.bincount(codes[place == row], minlength=self._num_codes)
            self._rows[name] = self._rows.get(name, 0) + new

    def table(self) -> tuple[NDArray[np.int64], list[str]]:
        names = sorted(self._rows)
        rows = [self._rows[name] for name in names]
        return np.array(rows, dtype=np.int64).reshape(len(names), self._num_codes), names


def _ranked(counts: NDArray[np.int64], names: Sequence[str], at_most: int) -> list[Share]:
    """The most frequent first; of equal ones in the order of the names."""
    order = np.argsort(-counts, kind="stable")[:at_most]
    return [Share(names[row], float(counts[row] / counts.sum())) for row in order.tolist() if counts[row]]


class _Runs(NamedTuple):
    """The R runs of a recording: code, first frame, number of frames, mean score."""

    codes: NDArray[np.int64]
    first: NDArray[np.int64]
    lengths: NDArray[np.int64]
    scores: NDArray[np.float64]


def _find_runs(codes: NDArray[np.int64], scores: NDArray[np.float32] | None) -> _Runs:
    first = np.flatnonzero(np.diff(codes, prepend=codes[0] - 1))
    lengths = np.diff(first, append=len(codes))
    means = np.full(len(first), np.nan)
    if scores is not None:
        means = np.add.reduceat(np.asarray(scores, dtype=np.float64), first) / lengths
    return _Runs(codes[first], first, lengths, means)


class _Best:
    """The most typical moments of each codeword so far."""

    def __init__(self, num_codes: int, num_moments: int) -> None:
        self._num_moments = num_moments
        self._best: list[list[tuple[tuple[float, ...], Moment]]] = [[] for _ in range(num_codes)]

    def add(self, recording: str, runs: _Runs) -> None:
        if not self._num_moments:
            return
        sure = np.nan_to_num(runs.scores)
        order = np.lexsort((-runs.lengths, -sure, -np.minimum(runs.lengths, _LONG_ENOUGH)))
        seen: dict[int, int] = {}
        for run in order.tolist():
            code, length = int(runs.codes[run]), int(runs.lengths[run])
            rank = seen[code] = seen.get(code, -1) + 1
            if rank >= self._num_moments:
                continue
            # The best of each recording come before the second best of any.
            key = (rank, -min(length, _LONG_ENOUGH), -float(sure[run]), -length)
            moment = Moment(recording, int(runs.first[run]), length, float(runs.scores[run]))
            self._best[code].append((key, moment))
            self._best[code].sort(key=lambda pair: pair[0])
            del self._best[code][self._num_moments :]

    def of(self, code: int) -> list[Moment]:
        return [moment for _, moment in self._best[code]]


def _check_units(recording: str, codes: ArrayLike, scores: ArrayLike | None, num_codes: int) -> NDArray[np.int64]:
    array = np.asarray(codes)
    if array.ndim != 1 or (len(array) and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"The units of {recording!r} are {array.dtype} {array.shape}, but must be integers (T,).")
    if len(array) and not 0 <= array.min() <= array.max() < num_codes:
        raise ValueError(
            f"The units of {recording!r} span {array.min()} to {array.max()}, but num_codes={num_codes} allows 0 to"
            f" {num_codes - 1}. Give the size of the codebook."
        )
    if scores is not None and np.shape(scores) != array.shape:
        raise ValueError(f"{recording!r} has {len(array)} units and {len(np.asarray(scores))} scores: give one each.")
    return array.astype(np.int64)


class CodewordInspector:
    """
    Takes in recordings, and tells of each codeword what it stands for.

    Args:
        num_codes: V.
        labels: Phones by recording id, or by the name of its file with or without suffix, as `alignment.read_labels`
            gives them; recordings without labels count for everything else. None: no phones.
        words: The same of words, which are drawn and not counted. None: no words.
        step_seconds: Length of a step, for labels that are one a step.
        stride: Samples from one frame to the next (`config.inputs_to_logits_ratio`).
        field: Samples that a frame sees (`config.receptive_field`).
        num_moments: Typical moments of each codeword to keep.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        num_codes: int,
        *,
        labels: Mapping[str, Labels] | None = None,
        words: Mapping[str, Labels] | None = None,
        step_seconds: float = 0.01,
        stride: int = 320,
        field: int = 400,
        num_moments: int = 5,
    ) -> None:
        if num_codes < 1:
            raise ValueError(f"num_codes={num_codes} is out of range: it must be at least 1.")
        if num_moments < 0:
            raise ValueError(f"num_moments={num_moments} is out of range: it must be at least 0.")
        self._num_codes, self._labels, self._words = num_codes, labels, words
        self._step_seconds, self._stride, self._field = step_seconds, stride, field
        self._frames, self._runs = np.zeros((2, num_codes), np.int64)
        # The last row and column are the edges of recordings.
        self._pairs = np.zeros((num_codes + 1, num_codes + 1), np.int64)
        self._phones, self._before, self._after = (_Counts(num_codes) for _ in range(3))
        self._best = _Best(num_codes, num_moments)
        self._num_recordings = self._num_labelled = 0
        self._bad_labels: dict[str, str] = {}
        self._example: Example | None = None

    def add(self, recording: str, codes: ArrayLike, scores: ArrayLike | None = None) -> None:
        """
        Take a recording in.

        Args:
            recording: Its id.
            codes: Integers (T,); none is no error, and nothing is counted.
            scores: (T,), how sure each is; None: the longest runs are the most typical.

        Raises:
            ValueError: If these are no units of this codebook, or not one score each.
        """
        array = _check_units(recording, codes, scores, self._num_codes)
        if not len(array):
            return
        self._num_recordings += 1
        runs = _find_runs(array, None if scores is None else np.asarray(scores))
        self._frames += np.bincount(array, minlength=self._num_codes)
        self._runs += np.bincount(runs.codes, minlength=self._num_codes)
        path = np.concatenate([[self._num_codes], runs.codes, [self._num_codes]])
        np.add.at(self._pairs, (path[:-1], path[1:]), 1)
        self._best.add(recording, runs)
        segments = self._add_labels(recording, array, runs)
        self._keep_example(recording, array, segments)

    def _add_labels(self, recording: str, codes: NDArray[np.int64], runs: _Runs) -> list[Segment]:
        name = None if self._labels is None else label_name(recording, self._labels)
        if self._labels is None or name is None:
            return []
        try:
            phones = align_labels(
                self._labels[name],
                len(codes),
                step_seconds=self._step_seconds,
                stride=self._stride,
                field=self._field,
            )
        except ValueError as error:
            self._bad_labels[recording] = str(error)
            return []
        self._num_labelled += 1
        self._phones.add(phones, codes)
        edged = [EDGE, *phones, EDGE]
        self._before.add([edged[first] for first in runs.first.tolist()], runs.codes)
        self._after.add([edged[end + 1] for end in (runs.first + runs.lengths).tolist()], runs.codes)
        return label_segments(self._labels[name], step_seconds=self._step_seconds)

    def _words_of(self, recording: str) -> list[Segment]:
        name = None if self._words is None else label_name(recording, self._words)
        if self._words is None or name is None:
            return []
        segments = label_segments(self._words[name], step_seconds=self._step_seconds, silence="")
        return [word for word in segments if word.label]

    def _keep_example(self, recording: str, codes: NDArray[np.int64], segments: list[Segment]) -> None:
        frames_of_a_minute = 60 * 16_000 // self._stride
        cut = codes[:frames_of_a_minute]
        known = self._example
        if known is None or (bool(segments), len(cut)) > (bool(known.phones), len(known.codes)):
            self._example = Example(recording, cut, segments, self._words_of(recording))

    def result(self, num_neighbours: int = 5) -> Inspection:
        """
        Tell what was found.

        Args:
            num_neighbours: Phones and codewords to name in each list, at most.

        Raises:
            ValueError: If no recording had a frame, or there are labels and none fits a recording.
        """
        if not self._num_recordings:
            raise ValueError("There is no unit to inspect: no recording is as long as a frame, or none could be read.")
        if self._labels is not None and not self._num_labelled:
            if self._bad_labels:
                name, message = next(iter(self._bad_labels.items()))
                raise ValueError(f"No labels fit their recording. Those of {name!r}: {message}")
            named = next(iter(self._labels), "nothing")
            raise ValueError(
                f"None of {self._num_recordings:,} recordings has labels. The labels are named like {named!r}: they"
                " must be named by the recordings' ids, or by their files' names with or without suffix."
            )
        table, phones = self._phones.table()
        counted = [self._phones.table(), self._before.table(), self._after.table()]
        codes = [*map(str, range(self._num_codes)), EDGE]
        found = []
        for code in np.flatnonzero(self._frames).tolist():
            own, before, after = (
                _ranked(rows[:, code], names, num_neighbours) if len(names) else [] for rows, names in counted
            )
            found.append(
                CodewordSummary(
                    code=code,
                    num_frames=int(self._frames[code]),
                    share=float(self._frames[code] / self._frames.sum()),
                    num_runs=int(self._runs[code]),
                    mean_frames=float(self._frames[code] / self._runs[code]),
                    phones=own,
                    codes_before=_ranked(self._pairs[:, code], codes, num_neighbours),
                    codes_after=_ranked(self._pairs[code], codes, num_neighbours),
                    phones_before=before,
                    phones_after=after,
                    moments=self._best.of(code),
                )
            )
        return Inspection(
            codewords=found,
            counts=self._frames.copy(),
            table=table,
            phones=phones,
            num_recordings=self._num_recordings,
            num_labelled=self._num_labelled,
            bad_labels=dict(self._bad_labels),
            example=self._example,
        )
