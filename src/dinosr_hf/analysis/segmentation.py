"""
Units as segments: do they change where phones do, and how many bits a second do they take?

Everything is a function of counts that add up over recordings, speakers and processes, so that a figure of a corpus is
the figure of the sum and no mean of means.

`T` frames, `V` units. A boundary is a moment, in seconds, at which the label changes; the two ends of a recording are
none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .alignment import FIELD, SAMPLING_RATE, STRIDE, Labels, frame_centers, label_segments

# Times that are equal but for rounding are within a tolerance of 0.
_ROUNDING = 1e-9


def unit_boundaries(
    codes: ArrayLike, *, stride: int = STRIDE, field: int = FIELD, sampling_rate: int = SAMPLING_RATE
) -> NDArray[np.float64]:
    """
    Moments at which the unit changes: half-way between the centres of the two frames.

    Args:
        codes: Integers (T,).
        stride: Samples from one frame to the next.
        field: Samples that a frame sees.
        sampling_rate: Samples a second.

    Returns:
        float64, in seconds, ascending.

    Raises:
        ValueError: If `codes` is not (T,).
    """
    array = np.asarray(codes)
    if array.ndim != 1:
        raise ValueError(f"codes has shape {array.shape}, but must be (T,): one recording and one layer at a time.")
    changes = np.flatnonzero(array[1:] != array[:-1]) + 1
    centers = frame_centers(len(array), stride=stride, field=field, sampling_rate=sampling_rate)
    return (centers[changes - 1] + centers[changes]) / 2


def label_boundaries(
    labels: Labels, *, step_seconds: float = 0.01, seconds: float | None = None
) -> NDArray[np.float64]:
    """
    Moments at which the phone changes, the same of steps and of segments.

    Args:
        labels: One label a step, or segments, as `read_labels` gives them; see `label_segments`. Silence is a label
            like others, and so are gaps: they have a boundary at each end.
        step_seconds: Length of a step; segments have times of their own.
        seconds: Length of the recording, in which boundaries are. Without it, silence after the last segment is not
            known of.

    Returns:
        float64, in seconds, ascending.
    """
    segments = label_segments(labels, step_seconds=step_seconds, seconds=seconds)
    moments = np.array([segment.start for segment in segments[1:]], dtype=np.float64)
    return moments if seconds is None else moments[moments < seconds]


@dataclass(frozen=True)
class SegmentCounts:
    """
    How many boundaries were found; adds up over recordings.

    Attributes:
        num_hits: Found boundaries that belong to a true one, and the other way round.
        num_found: Boundaries of the units.
        num_true: Boundaries of the phones.
    """

    num_hits: int = 0
    num_found: int = 0
    num_true: int = 0

    def __add__(self, other: SegmentCounts) -> SegmentCounts:
        return SegmentCounts(
            self.num_hits + other.num_hits, self.num_found + other.num_found, self.num_true + other.num_true
        )

    @property
    def precision(self) -> float:
        """Hits over boundaries found; nan if none was."""
        return self.num_hits / self.num_found if self.num_found else float("nan")

    @property
    def recall(self) -> float:
        """Hits over true boundaries; nan if there is none."""
        return self.num_hits / self.num_true if self.num_true else float("nan")

    @property
    def f1(self) -> float:
        """2 hits / (found + true), the harmonic mean of precision and recall; nan if there is neither."""
        total = self.num_found + self.num_true
        return 2 * self.num_hits / total if total else float("nan")

    @property
    def over_segmentation(self) -> float:
        """found / true - 1: 0 for as many boundaries as there are, 1 for twice as many."""
        return self.num_found / self.num_true - 1 if self.num_true else float("nan")

    @property
    def r_value(self) -> float:
        """
        How near to the perfect segmentation, which more boundaries than there are do not reach by chance:

            R-value = 1 - (|r1| + |r2|) / 2,   r1 = sqrt((1 - HR)^2 + OS^2),   r2 = (-OS + HR - 1) / sqrt(2)

        with HR the recall and OS the over-segmentation (Räsänen, Laine and Altosaar, "An improved speech segmentation
        quality measure: the R-value", Interspeech 2009, equations 5 to 7). 1 is perfect; it may be negative.
        """
        missed, over = 1 - self.recall, self.over_segmentation
        return float(1 - (np.hypot(missed, over) + abs(-over - missed) / np.sqrt(2)) / 2)


def match_boundaries(found: ArrayLike, true: ArrayLike, *, tolerance: float = 0.02) -> SegmentCounts:
    """
    Count found boundaries that are near a true one.

    Each boundary is matched with one of the other kind at most, in the order of time, which gives as many pairs as
    there can be: of two boundaries near a true one, one is a hit and the other is not.

    Args:
        found: Seconds, ascending.
        true: Seconds, ascending.
        tolerance: Seconds between the two of a pair, at most; 20 ms is what the field reports.

    Raises:
        ValueError: If the tolerance is negative.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance} is out of range: it must be at least 0 seconds, such as 0.02.")
    ours, theirs = np.asarray(found, dtype=np.float64).tolist(), np.asarray(true, dtype=np.float64).tolist()
    hits = i = j = 0
    while i < len(ours) and j < len(theirs):
        if abs(ours[i] - theirs[j]) <= tolerance + _ROUNDING:
            hits, i, j = hits + 1, i + 1, j + 1
        elif ours[i] < theirs[j]:
            i += 1
        else:
            j += 1
    return SegmentCounts(hits, len(ours), len(theirs))


def run_counts(codes: ArrayLike, num_codes: int) -> NDArray[np.int64]:
    """Runs of each unit, int64 (V,), of codes (T,): what is left of them once repeats are joined."""
    array = np.asarray(codes, dtype=np.int64)
    starts = np.append(True, array[1:] != array[:-1])[: len(array)]
    return np.bincount(array[starts], minlength=num_codes)


def bitrate(counts: ArrayLike, seconds: float) -> float:
    """
    Bits a second of a stream of units.

        bitrate = N / D * H,   H = -sum_z p(z) log2 p(z)

    with N units in D seconds (ZeroSpeech 2019 and 2020, section "bitrate"; each unit is coded by itself). Of repeats,
    give the counts of frames; without them, those of runs (`run_counts`).

    Args:
        counts: How often each unit comes, (V,).
        seconds: D.

    Raises:
        ValueError: If there is no time.
    """
    if not seconds > 0:
        raise ValueError(f"seconds={seconds} is out of range: bits a second need more than 0 seconds of speech.")
    array = np.asarray(counts, dtype=np.float64)
    total = array.sum()
    if total == 0:
        return 0.0
    shares = array[array > 0] / total
    return float(-(shares * np.log2(shares)).sum() * total / seconds + 0.0)
