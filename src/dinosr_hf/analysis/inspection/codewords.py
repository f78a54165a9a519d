"""
What each codeword stands for: its phones, its neighbours, its duration, and its most typical moments.

Recordings are added one by one and not kept. `T` frames, `P` phones, `V` codewords.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...data import SAMPLING_RATE
from ...utils.command_line import check_ranges
from ..alignment import FIELD, STRIDE, Labels, Segment, frame_labels, label_name, label_segments, match_labels
from ..quality import check_codes, contingency
from ..segmentation import find_runs

EDGE = "(edge)"  # stands for the neighbour of the first and the last run of a recording

_NUM_NEIGHBOURS = 5  # length of the lists of phones and codewords
_LONG_ENOUGH = 3  # runs of at least so many frames count as equally long when typical moments are chosen


class Share(NamedTuple):
    """A phone or codeword, and its relative frequency in its position."""

    name: str
    share: float


class Moment(NamedTuple):
    """A run of a codeword in a recording."""

    recording: str
    first: int  # its first frame
    num_frames: int
    score: float  # mean over its frames; nan without scores


class CodewordSummary(NamedTuple):
    """Statistics of a codeword; lists begin with the most frequent, and those of phones are empty without labels."""

    code: int
    num_frames: int
    share: float  # of all frames
    num_runs: int
    mean_frames: float  # of a run
    phones: Sequence[Share]  # of its frames
    codes_before: Sequence[Share]  # of the runs before its runs
    codes_after: Sequence[Share]
    phones_before: Sequence[Share]  # of the frames before its runs
    phones_after: Sequence[Share]
    moments: Sequence[Moment]  # the most typical runs, best first


class ExampleRecording(NamedTuple):
    """A recording to draw."""

    recording: str
    codes: NDArray[np.int64]  # (T,)
    phones: Sequence[Segment]  # empty without labels
    words: Sequence[Segment]


class Inspection(NamedTuple):
    """Statistics of a codebook on a corpus."""

    codewords: Sequence[CodewordSummary]  # those in use, by number
    counts: NDArray[np.int64]  # (V,), frames of each codeword
    table: NDArray[np.int64]  # (P, V), frames with a label; P is 0 without labels
    phones: Sequence[str]  # P, sorted
    num_recordings: int  # with at least a frame
    num_labelled: int
    bad_labels: Mapping[str, str]  # id -> why its labels were ignored
    example: ExampleRecording  # the longest recording, with labels if there are any, up to a minute


def _rank(counts: NDArray[np.int64], names: Sequence[str]) -> list[Share]:
    """The largest shares in descending order, ties in the order of the names."""
    order = np.argsort(-counts, kind="stable")[:_NUM_NEIGHBOURS]
    return [Share(names[row], float(counts[row] / counts.sum())) for row in order.tolist() if counts[row]]


def _sort_key(moment: Moment) -> tuple[float, ...]:
    """The most typical moments come first: those that are long enough, sure, and long."""
    score = 0.0 if math.isnan(moment.score) else moment.score
    return -min(moment.num_frames, _LONG_ENOUGH), -score, -moment.num_frames


class CodewordInspector:
    """
    Collects the statistics of each codeword over recordings. Raises `ValueError` if a number is out of range.

    Args:
        num_codes: V.
        labels: Phones by recording id, or file name with or without suffix, as `read_alignments` returns them;
            recordings without labels count for everything else. None: no phones.
        words: Words in the same form, which are drawn and not counted. None: no words.
        recordings: Ids of all recordings, to match them with labels by `match_labels`. None: they are not known yet,
            and a second recording that labels fit by the name of its file is an error.
        step_seconds: Length of a step of fixed-rate labels.
        stride: Samples from one frame to the next (`config.inputs_to_logits_ratio`).
        field: Samples that a frame sees (`config.receptive_field`).
        num_moments: Number of typical moments to keep for each codeword.
    """

    def __init__(
        self,
        num_codes: int,
        *,
        labels: Mapping[str, Labels] | None = None,
        words: Mapping[str, Labels] | None = None,
        recordings: Sequence[str] | None = None,
        step_seconds: float = 0.01,
        stride: int = STRIDE,
        field: int = FIELD,
        num_moments: int = 5,
    ) -> None:
        rules = [(num_codes >= 1, "num_codes", num_codes, "at least 1")]
        check_ranges([*rules, (num_moments >= 0, "num_moments", num_moments, "at least 0")])
        self._num_codes, self._is_matched = num_codes, recordings is not None
        self._labels, self._words = (
            {recording: given[name] for recording, name in match_labels(recordings, given).items()}
            if given and recordings is not None
            else given or {}
            for given in (labels, words)
        )
        self._has_labels = labels is not None
        self._step_seconds, self._stride, self._field = step_seconds, stride, field
        self._frames = np.zeros(num_codes, np.int64)
        # Counts of consecutive runs; the last row and column are the edges of recordings.
        self._pairs = np.zeros((num_codes + 1, num_codes + 1), np.int64)
        # Counts (3, V) of each phone: of frames, and of the frames before and after runs.
        self._phones: dict[str, NDArray[np.int64]] = {}
        # The best moments of each codeword so far, with the keys that they are sorted by.
        self._best: list[list[tuple[tuple[float, ...], Moment]]] = [[] for _ in range(num_codes)]
        self._num_moments = num_moments
        self._num_recordings = self._num_labelled = 0
        self._bad_labels: dict[str, str] = {}
        self._owners: dict[str, str] = {}  # name of labels -> the recording that they belong to
        self._example: ExampleRecording | None = None

    def add(self, recording: str, codes: ArrayLike, scores: ArrayLike | None = None) -> None:
        """
        Add a recording: its id, its codes (T,), integers, and the confidence of each (T,).

        Without scores, the longest runs are the most typical. A recording without frames is ignored. Raises
        `ValueError` if these are not units of this codebook, or there is not one score each.
        """
        array = check_codes(codes, self._num_codes, f"{recording!r}")
        if scores is not None and np.shape(scores) != array.shape:
            raise ValueError(f"{recording!r} has {len(array)} units, but scores of shape {np.shape(scores)}.")
        if not len(array):
            return
        self._num_recordings += 1
        first, lengths = find_runs(array)
        means = np.full(len(first), np.nan)
        if scores is not None:
            means = np.add.reduceat(np.asarray(scores, dtype=np.float64), first) / lengths
        self._frames += np.bincount(array, minlength=self._num_codes)
        path = np.concatenate([[self._num_codes], array[first], [self._num_codes]])
        np.add.at(self._pairs, (path[:-1], path[1:]), 1)
        runs = zip(first.tolist(), lengths.tolist(), means.tolist(), strict=True)
        self._keep_moments(array[first].tolist(), [Moment(recording, *run) for run in runs])
        phones = self._add_labels(recording, array, first)
        cut = array[: 60 * SAMPLING_RATE // self._stride]  # a minute
        known = self._example
        if known is None or (bool(phones), len(cut)) > (bool(known.phones), len(known.codes)):
            self._example = ExampleRecording(recording, cut, phones, self._words_of(recording))

    def _keep_moments(self, codes: Sequence[int], moments: Sequence[Moment]) -> None:
        ranks: Counter[int] = Counter()
        for code, moment in sorted(zip(codes, moments, strict=True), key=lambda pair: _sort_key(pair[1])):
            if ranks[code] < self._num_moments:
                # The best of each recording come before the second best of any.
                best = [*self._best[code], ((ranks[code], *_sort_key(moment)), moment)]
                self._best[code] = sorted(best, key=itemgetter(0))[: self._num_moments]
            ranks[code] += 1

    def _count_phones(self, row: int, phones: Sequence[str], codes: NDArray[np.int64]) -> None:
        table, names = contingency(phones, codes, num_codes=self._num_codes)
        for name, counts in zip(names, table, strict=True):
            self._phones.setdefault(name, np.zeros((3, self._num_codes), np.int64))[row] += counts

    def _name_of(self, recording: str, labels: Mapping[str, Labels]) -> str | None:
        if self._is_matched:
            return recording if recording in labels else None
        return label_name(recording, labels)

    def _add_labels(self, recording: str, codes: NDArray[np.int64], first: NDArray[np.int64]) -> list[Segment]:
        """Count the phones of a recording whose runs begin at `first`; returns their segments, if its labels fit."""
        name = self._name_of(recording, self._labels)
        if name is None:
            return []
        if (other := self._owners.setdefault(name, recording)) != recording:
            raise ValueError(
                f"The labels of {name!r} fit two recordings, {other!r} and {recording!r}. Name the labels by the"
                " recordings' ids."
            )
        labels, step_seconds = self._labels[name], self._step_seconds
        stride, field = self._stride, self._field
        try:
            phones = frame_labels(labels, len(codes), step_seconds=step_seconds, stride=stride, field=field)
        except ValueError as error:
            self._bad_labels[recording] = str(error)
            return []
        self._num_labelled += 1
        self._count_phones(0, phones, codes)
        changes = first[1:].tolist()
        self._count_phones(1, [EDGE, *(phones[frame - 1] for frame in changes)], codes[first])
        self._count_phones(2, [*(phones[frame] for frame in changes), EDGE], codes[first])
        return label_segments(labels, step_seconds=step_seconds)

    def _words_of(self, recording: str) -> list[Segment]:
        name = self._name_of(recording, self._words)
        if name is None:
            return []
        segments = label_segments(self._words[name], step_seconds=self._step_seconds, silence="")
        return [word for word in segments if word.label]

    def _check_labels(self) -> None:
        if self._num_labelled or not self._has_labels:
            return
        if self._bad_labels:
            name, message = next(iter(self._bad_labels.items()))
            raise ValueError(f"No labels fit their recording. Those of {name!r}: {message}")
        named = next(iter(self._labels), "nothing")
        if self._is_matched and self._labels:
            raise ValueError(
                f"No recording with labels, such as {named!r}, is as long as a frame and could be read. Give labels of"
                " others."
            )
        raise ValueError(
            f"None of {self._num_recordings:,} recordings has labels. The labels are named like {named!r}: they"
            " must be named by the recordings' ids, or by their files' names with or without suffix."
        )

    def _phone_shares(self, row: int, code: int) -> list[Share]:
        names = sorted(self._phones)
        return _rank(np.array([self._phones[name][row, code] for name in names], np.int64), names)

    def result(self) -> Inspection:
        """Summarise the codewords in use; `ValueError` without a frame, or if there are labels and none fits."""
        if self._example is None:
            raise ValueError("There is no unit to inspect: no recording is as long as a frame, or none could be read.")
        self._check_labels()
        codes, num_runs = [*map(str, range(self._num_codes)), EDGE], self._pairs.sum(axis=1)
        codewords = [
            CodewordSummary(
                code=code,
                num_frames=int(self._frames[code]),
                share=float(self._frames[code] / self._frames.sum()),
                num_runs=int(num_runs[code]),
                mean_frames=float(self._frames[code] / num_runs[code]),
                phones=self._phone_shares(0, code),
                codes_before=_rank(self._pairs[:, code], codes),
                codes_after=_rank(self._pairs[code], codes),
                phones_before=self._phone_shares(1, code),
                phones_after=self._phone_shares(2, code),
                moments=[moment for _, moment in self._best[code]],
            )
            for code in np.flatnonzero(self._frames).tolist()
        ]
        phones = sorted(name for name, counts in self._phones.items() if counts[0].any())
        return Inspection(
            codewords=codewords,
            counts=self._frames.copy(),
            table=np.array([self._phones[name][0] for name in phones], np.int64).reshape(-1, self._num_codes),
            phones=phones,
            num_recordings=self._num_recordings,
            num_labelled=self._num_labelled,
            bad_labels=dict(self._bad_labels),
            example=self._example,
        )
