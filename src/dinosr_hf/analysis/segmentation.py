"""
Units as segments: do they change where phones do, and how many bits a second do they take?

All metrics are functions of counts that add up over recordings. A boundary is the time in seconds at which the label
changes; the ends of a recording are none. `T` frames, `R` runs, `V` units.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..utils.command_line import check_ranges
from .alignment import FIELD, STRIDE, Labels, frame_centers, label_segments
from .quality import check_codes

# Rounding of times must not decide at a tolerance of 0.
_ROUNDING = 1e-9


def find_runs(codes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first frame and the number of frames of each run of equal codes (T,), int64 (R,) each."""
    first = np.flatnonzero(np.append(True, codes[1:] != codes[:-1])[: len(codes)])
    return first, np.diff(first, append=len(codes))


def unit_boundaries(codes: ArrayLike, *, stride: int = STRIDE, field: int = FIELD) -> NDArray[np.float64]:
    """Return the times at which the units (T,) change, half-way between the centres of two frames: seconds."""
    array = check_codes(codes)
    changes = find_runs(array)[0][1:]
    centers = frame_centers(len(array), stride=stride, field=field)
    return (centers[changes - 1] + centers[changes]) / 2


def label_boundaries(
    labels: Labels, *, step_seconds: float = 0.01, seconds: float | None = None
) -> NDArray[np.float64]:
    """Return the times at which `label_segments` (with the same arguments) change, also to silence: seconds."""
    segments = label_segments(labels, step_seconds=step_seconds, seconds=seconds)
    moments = np.array([segment.start for segment in segments[1:]], dtype=np.float64)
    return moments if seconds is None else moments[moments < seconds]


@dataclass(frozen=True)
class SegmentCounts:
    """Counts of boundaries; they add up over recordings."""

    num_hits: int = 0  # pairs of a found and a true boundary
    num_found: int = 0  # boundaries of the units
    num_true: int = 0  # boundaries of the phones

    def __add__(self, other: SegmentCounts) -> SegmentCounts:
        return SegmentCounts(*map(operator.add, vars(self).values(), vars(other).values()))

    def figures(self) -> dict[str, float]:
        """
        Compute precision, recall and F1 of boundaries, over-segmentation and R-value; nan where nothing is counted.

            over-segmentation OS = found / true - 1
            R-value = 1 - (|r1| + |r2|) / 2,   r1 = sqrt((1 - HR)^2 + OS^2),   r2 = (-OS + HR - 1) / sqrt(2)

        with HR the recall (Räsänen, Laine and Altosaar, "An improved speech segmentation quality measure: the
        R-value", Interspeech 2009, equations 5 to 7). Over-segmentation does not raise the R-value by chance; 1 is
        perfect, and it may be negative.
        """
        found, true = self.num_found or math.nan, self.num_true or math.nan
        recall, over = self.num_hits / true, self.num_found / true - 1
        return {
            "boundary_precision": self.num_hits / found,
            "boundary_recall": recall,
            "boundary_f1": 2 * self.num_hits / (self.num_found + self.num_true or math.nan),
            "over_segmentation": over,
            "r_value": float(1 - (np.hypot(1 - recall, over) + abs(recall - 1 - over) / np.sqrt(2)) / 2),
        }


def match_boundaries(found: ArrayLike, true: ArrayLike, *, tolerance: float = 0.02) -> SegmentCounts:
    """
    Count found boundaries that are close to a true one; all are ascending seconds.

    Boundaries are matched one to one, in the order of time, which gives the largest possible number of pairs: of two
    boundaries near a true one, one is a hit and the other is not. `tolerance` is the largest distance of a pair, in
    seconds, at least 0 (else `ValueError`).
    """
    check_ranges([(tolerance >= 0, "tolerance", tolerance, "at least 0 seconds, such as 0.02")])
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
    """Count the runs of each unit in codes (T,): their frequencies once repeats are joined; int64 (V,)."""
    array = np.asarray(codes, dtype=np.int64)
    return np.bincount(array[find_runs(array)[0]], minlength=num_codes)


def bitrate(counts: ArrayLike, seconds: float) -> float:
    """
    Return the bits per second of a stream of units, each coded by itself: N / D * (-sum_z p(z) log2 p(z)).

    N units last D seconds, more than 0 (else `ValueError`). `counts` (V,) are frames for units with repeats, and runs
    for joined units (`run_counts`). ZeroSpeech 2019 and 2020, section "bitrate".
    """
    check_ranges([(seconds > 0, "seconds", seconds, "more than 0 seconds of speech")])
    array = np.asarray(counts, dtype=np.float64)
    total = array.sum()
    shares = array[array > 0] / total
    return float(-(shares * np.log2(shares)).sum() * total / seconds + 0.0)  # + 0.0 turns -0.0 into 0.0
