"""Boundaries and bitrates, by hand."""

import itertools
import math

import numpy as np
import pytest

from dinosr_hf.analysis import Segment, label_segments
from dinosr_hf.analysis.segmentation import (
    SegmentCounts,
    bitrate,
    label_boundaries,
    match_boundaries,
    run_counts,
    unit_boundaries,
)


def test_unit_boundaries_lie_between_frame_centres():
    # Centres at 12.5, 32.5, 52.5, 72.5 ms; the unit changes after the first and the third.
    assert unit_boundaries([4, 7, 7, 2]) == pytest.approx([0.0225, 0.0625])
    assert unit_boundaries([1, 1]).tolist() == unit_boundaries([5]).tolist() == unit_boundaries([]).tolist() == []
    with pytest.raises(ValueError, match=r"codes has shape \(1, 2\), but must be \(T,\)"):
        unit_boundaries([[1, 2]])


def test_boundaries_of_fixed_rate_labels():
    assert label_boundaries(["SIL", "SIL", "AH", "T", "T"]) == pytest.approx([0.02, 0.03])
    assert label_boundaries(["a", "b"], step_seconds=0.5) == pytest.approx([0.5])
    assert label_boundaries(["a"]).tolist() == label_boundaries([]).tolist() == []


def test_boundaries_of_segments():
    segments = [Segment("b", 0.2, 0.3), Segment("a", 0.1, 0.2), Segment("b", 0.3, 0.5), Segment("c", 0.6, 0.9)]
    # There is none between two b; gaps are silence; the end of the labels counts only if the recording is longer.
    assert label_boundaries(segments) == pytest.approx([0.1, 0.2, 0.5, 0.6])
    assert label_boundaries(segments, seconds=0.905) == pytest.approx([0.1, 0.2, 0.5, 0.6])
    assert label_boundaries(segments, seconds=1.0) == pytest.approx([0.1, 0.2, 0.5, 0.6, 0.9])
    assert label_boundaries([Segment("a", 0.1, 0.1)], seconds=1.0).tolist() == []


def test_boundaries_of_segments_equal_those_of_fixed_rate_labels():
    segments = [Segment("a", 0.1, 0.2), Segment("a", 0.2, 0.3), Segment("b", 0.3, 0.4), Segment("c", 0.5, 0.6)]
    steps = ["SIL"] * 10 + ["a"] * 20 + ["b"] * 10 + ["SIL"] * 10 + ["c"] * 10 + ["SIL"] * 40
    assert label_boundaries(steps) == pytest.approx(label_boundaries(segments, seconds=1.0))
    assert label_segments(segments, seconds=1.0)[:2] == [Segment("SIL", 0.0, 0.1), Segment("a", 0.1, 0.3)]
    filled = label_segments(segments, seconds=1.0)
    assert label_segments(filled) == filled


def test_gaps_and_overlaps_from_rounding_are_one_boundary():
    segments = [Segment("a", 0.004, 0.1), Segment("b", 0.106, 0.2), Segment("c", 0.194, 0.4), Segment("SIL", 0.4, 0.5)]
    assert label_boundaries(segments) == pytest.approx([0.103, 0.197, 0.4])
    wider = [Segment("a", 0.0, 0.1), Segment("b", 0.111, 0.2)]
    assert label_boundaries(wider) == pytest.approx([0.1, 0.111])
    assert label_segments([]) == [] and label_segments([], seconds=0.5) == [Segment("SIL", 0.0, 0.5)]


@pytest.mark.parametrize(
    ("found", "true", "hits"),
    [
        ([0.10, 0.20], [0.10, 0.20], 2),
        ([0.12], [0.10], 1),  # at the tolerance
        ([0.121], [0.10], 0),
        ([0.09, 0.11], [0.10], 1),  # two near one
        ([0.10], [0.09, 0.11], 1),
        ([0.09, 0.11], [0.10, 0.13], 2),  # the nearest first would leave one
        ([], [0.1], 0),
        ([], [], 0),
    ],
)
def test_match_boundaries(found, true, hits):
    assert match_boundaries(found, true) == SegmentCounts(hits, len(found), len(true))


def test_the_number_of_matches_is_maximal():
    generator = np.random.default_rng(0)
    for _ in range(50):
        found, true = (np.sort(generator.uniform(0, 0.2, size)) for size in generator.integers(0, 6, 2))
        few, many = sorted([found, true], key=len)
        most = max(
            sum(abs(a - b) <= 0.02 for a, b in zip(few, chosen, strict=True))
            for chosen in itertools.permutations(many, len(few))
        )
        assert match_boundaries(found, true).num_hits == most


def test_boundary_metrics_by_hand():
    # 6 of 8 found are right, of 12: P = 3/4, R = 1/2, F = 2 * 6 / 20, OS = 8/12 - 1 = -1/3.
    counts = SegmentCounts(2, 3, 5) + SegmentCounts(4, 5, 7)
    assert counts == SegmentCounts(6, 8, 12)
    figures = counts.figures()
    assert [figures[f"boundary_{name}"] for name in ("precision", "recall", "f1")] == [0.75, 0.5, 0.6]
    assert figures["over_segmentation"] == pytest.approx(-1 / 3)
    first, second = math.sqrt(1 / 4 + 1 / 9), (1 / 3 - 1 / 2) / math.sqrt(2)
    assert figures["r_value"] == pytest.approx(1 - (first + abs(second)) / 2)
    assert SegmentCounts(9, 9, 9).figures()["r_value"] == 1
    # Twice as many boundaries find them all: F1 still rewards it, the R-value does not.
    twice = SegmentCounts(10, 20, 10).figures()
    assert twice["boundary_recall"] == 1
    assert twice["boundary_f1"] == pytest.approx(2 / 3)
    assert twice["r_value"] == pytest.approx(1 - (1 + 1 / math.sqrt(2)) / 2)
    assert all(map(math.isnan, SegmentCounts().figures().values()))
    assert SegmentCounts(0, 0, 4).figures()["over_segmentation"] == -1


def test_a_negative_tolerance_is_refused():
    with pytest.raises(ValueError, match=r"tolerance=-0.1 is out of range"):
        match_boundaries([0.1], [0.1], tolerance=-0.1)


def test_bitrate_by_hand():
    # 8 units of four kinds alike are 16 bits; in 2 s 8 bits a second. Joined, three runs of three kinds.
    codes = [0, 0, 3, 3, 1, 1, 2, 2]
    assert bitrate(np.bincount(codes), 2.0) == pytest.approx(8)
    assert run_counts(codes, 5).tolist() == [1, 1, 1, 1, 0]
    assert bitrate(run_counts(codes, 5), 2.0) == pytest.approx(4)
    # 1 of 4 and 3 of 4: H = 2 - 3/4 log2 3.
    assert bitrate([1, 3], 1.0) == pytest.approx(4 * (2 - 0.75 * math.log2(3)))
    assert bitrate([7, 0], 1.0) == bitrate([0, 0], 1.0) == 0
    assert run_counts([], 3).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"seconds=0 is out of range"):
        bitrate([1], 0)
