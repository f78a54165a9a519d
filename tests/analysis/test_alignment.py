"""Phone labels at the frames of the model, and files of labels."""

import gzip
import json

import numpy as np
import pytest

from dinosr_hf import DinoSRConfig
from dinosr_hf.analysis import Reference
from dinosr_hf.analysis.alignment import Segment, frame_centers, frame_labels
from dinosr_hf.analysis.alignment_files import read_labels


def write_lines(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def field_of_frame(config: DinoSRConfig, frame: int) -> tuple[int, int]:
    """First sample and the one after the last that a frame sees, walked back through the convolutions."""
    first, last = frame, frame
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        first, last = first * stride, last * stride + kernel - 1
    return first, last + 1


@pytest.mark.parametrize("frame", [0, 1, 2, 49])
def test_centers_equal_those_of_the_convolutions(frame):
    begin, end = field_of_frame(DinoSRConfig(), frame)
    assert (begin, end) == (320 * frame, 320 * frame + 400)
    assert frame_centers(frame + 1)[frame] == (begin + end) / 2 / 16_000


def test_centers_in_seconds():
    np.testing.assert_array_equal(frame_centers(4), [0.0125, 0.0325, 0.0525, 0.0725])
    np.testing.assert_array_equal(frame_centers(2, stride=1_600, field=3_200), [0.1, 0.2])
    assert len(frame_centers(0)) == 0


def test_frames_take_the_segment_at_their_center():
    # Centres 0.0125, 0.0325, 0.0525, 0.0725, 0.0925.
    segments = [("a", 0.0, 0.03), ("b", 0.03, 0.06), ("c", 0.08, 0.09)]
    assert frame_labels(segments, 5) == ["a", "b", "b", "SIL", "SIL"]


def test_a_segment_contains_its_start_and_not_its_end():
    assert frame_labels([("a", 0.0, 0.0125), ("b", 0.0125, 0.0325)], 2, silence="_") == ["b", "_"]


def test_segments_come_in_any_order_and_form():
    as_rows = [{"label": "b", "start": 0.02, "end": 0.04}, {"label": "a", "start": 0.0, "end": 0.02}]
    assert frame_labels(as_rows, 2) == frame_labels([Segment("a", 0, 0.02), Segment("b", 0.02, 0.04)], 2) == ["a", "b"]


def test_segments_of_no_length_are_ignored():
    assert frame_labels([("a", 0.0, 1.0), ("x", 0.0125, 0.0125)], 2) == ["a", "a"]


def test_without_segments_all_is_silence():
    assert frame_labels([], 3) == ["SIL"] * 3


def test_the_later_of_two_that_overlap_by_rounding_counts():
    assert frame_labels([("a", 0.0, 0.014), ("b", 0.012, 0.1)], 2) == ["b", "b"]


def test_any_two_may_overlap_by_a_hundredth():
    for number in range(1, 100):  # as times with two decimals do
        assert frame_labels([("a", 0.0, (number + 1) / 100), ("b", number / 100, 2.0)], 99)[-1] == "b"


def test_stride_and_field_move_the_labels():
    segments = [("a", 0.0, 0.3), ("b", 0.3, 1.0)]
    assert frame_labels(segments, 3, stride=3_200, field=3_200) == ["a", "b", "b"]
    assert frame_labels(segments, 3, stride=1_600, field=3_200) == ["a", "a", "b"]


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([("a", 0.2, 0.1)], "ends before it starts"),
        ([("a", float("nan"), 0.1)], "ends before it starts"),
        ([("a", 0.0, 0.5), ("b", 0.3, 0.6)], "overlap.*one tier"),
        ([{"label": "a", "start": 0.0}], "lacks 'end'"),
        (
            [("a", 0, 0.04), ("b", 40, 90)],
            r"\('b', 40.0, 90.0\) begins after the end .* at 0\.07 s\. Times are",
        ),
    ],
    ids=["backwards", "nan", "overlap", "key", "milliseconds"],
)
def test_frame_labels_refuses_segments(segments, message):
    with pytest.raises(ValueError, match=message):
        frame_labels(segments, 2)


def test_labels_may_reach_behind_the_end():
    assert frame_labels([("a", 0.0, 0.02), ("b", 0.02, 0.1), ("SIL", 0.1, 9.0)], 2) == ["a", "b"]


def test_negative_number_of_frames_is_refused():
    with pytest.raises(ValueError, match="num_frames=-1"):
        frame_labels([], -1)


def test_with_10_ms_steps_frame_i_has_label_2i_plus_1():
    labels = [f"{index}" for index in range(2000)]
    # The centre of frame i is sample 320 i + 200, and label j holds samples 160 j to 160 j + 160.
    assert frame_labels(labels, 999) == [f"{2 * frame + 1}" for frame in range(999)]


def test_steps_and_segments_of_the_same_alignment_agree():
    generator = np.random.default_rng(0)
    labels = [str(label) for label in generator.integers(0, 5, size=400)]
    # Steps of 10 ms as segments: a centre is never nearer than 2.5 ms to an edge.
    segments = [Segment(label, index / 100, (index + 1) / 100) for index, label in enumerate(labels)]
    num_frames = DinoSRConfig().num_frames(400 * 160)
    assert frame_labels(labels, num_frames) == frame_labels(segments, num_frames)


@pytest.mark.parametrize("missing", [-1, 0, 1])
@pytest.mark.parametrize("num_samples", [16_000, 16_159, 16_239, 16_240])
def test_labels_one_step_short_or_long_still_fit(missing, num_samples):
    num_frames = DinoSRConfig().num_frames(num_samples)
    labels = ["a"] * (num_samples // 160 - missing)
    assert frame_labels(labels, num_frames) == ["a"] * num_frames


def test_the_last_label_is_repeated_to_the_last_frame():
    assert frame_labels(["a", "b"], 2) == ["b", "b"]  # centres in steps 1 and 3


@pytest.mark.parametrize(
    ("num_labels", "step", "message"),
    [
        (100, 0.02, r"cover 2\.000 s.* its step_seconds"),  # 10 ms labels taken for 20 ms
        (100, 0.005, r"cover 0\.500 s.* its step_seconds"),
        (100, 0.0, "step_seconds=0.0 is out of range"),
        (100, float("nan"), "step_seconds=nan is out of range"),
    ],
    ids=["step-too-long", "step-too-short", "zero", "nan"],
)
def test_frame_labels_refuses_steps(num_labels, step, message):
    with pytest.raises(ValueError, match=message):
        frame_labels(["a"] * num_labels, 49, step_seconds=step)


@pytest.mark.parametrize(("fits", "too_many_or_few"), [(96, 95), (103, 104)], ids=["few", "many"])
def test_labels_may_be_one_field_off(fits, too_many_or_few):
    # 49 frames need 320 * 48 + 400 = 15,760 samples and have less than 16,080; 400 less or more are 96 and 103 steps.
    assert frame_labels(["a"] * fits, 49) == ["a"] * 49
    with pytest.raises(ValueError, match=r"Check that both are of the same recording.*step_seconds"):
        frame_labels(["a"] * too_many_or_few, 49)


def test_no_frames_have_no_labels():
    assert frame_labels(["a"], 0) == frame_labels([], 0) == []


@pytest.mark.parametrize("name", ["labels.jsonl", "labels.jsonl.gz"])
def test_read_labels_of_both_forms(tmp_path, name):
    rows = [
        {"name": "steps", "phones": ["SIL", "SIL", "æ", "æ"], "speaker": "left alone"},
        "",
        {"name": "segments", "phones": [{"label": "æ", "start": 0.02, "end": 0.04}]},
        {"id": "nothing", "phones": []},
    ]
    rows = [row and {**row, "words": [*row["phones"], "a word"][-1:]} for row in rows]
    labels = read_labels(write_lines(tmp_path / name, rows))
    assert list(labels) == ["steps", "segments", "nothing"]
    assert labels["steps"] == ["SIL", "SIL", "æ", "æ"]
    assert labels["segments"] == [Segment("æ", 0.02, 0.04)]
    # Centres 0.0125 and 0.0325.
    assert frame_labels(labels["steps"], 2) == frame_labels(labels["segments"], 2) == ["SIL", "æ"]
    assert frame_labels(labels["nothing"], 2, silence="#") == ["#", "#"]
    assert read_labels(tmp_path / name, "words") == {key: ["a word"] for key in labels}


def test_labels_that_show_nothing_are_silence(tmp_path):
    rows = [
        {"name": "steps", "phones": ["æ", "", "\u200b", "t"]},
        {"name": "segments", "phones": [{"label": " ", "start": 0.02, "end": 0.04}]},
    ]
    labels = read_labels(write_lines(tmp_path / "labels.jsonl", rows))
    assert frame_labels(labels["steps"], 2) == ["SIL", "t"]
    assert frame_labels(labels["segments"], 2, silence="#") == ["#", "#"]
    reference = Reference(["a"], {"a": ["æ", "", Segment("", 0, 1)]})
    assert reference.phones == ["SIL", "æ"]


def test_step_seconds_is_used():
    assert frame_labels(["a", "b"], 2, step_seconds=0.02) == ["a", "b"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], "line 1: .* is not valid JSON"),
        ([["a"]], "line 1: .* is not a JSON object"),
        ([{"name": "u", "words": []}], 'list "phones"'),
        ([{"name": 3, "phones": []}], 'string "name"'),
        ([{"name": "u", "phones": ["a", 3]}], "all strings or all objects"),
        (
            [{"name": "u", "phones": [{"label": "a", "start": 0}]}],
            "an invalid segment: A segment lacks 'end'",
        ),
        ([{"name": "u", "phones": [{"label": "a", "start": None, "end": 1}]}], "line 1, has an invalid segment"),
        ([{"name": "u", "phones": []}, {"name": "u", "phones": []}], "line 2, names 'u' again"),
    ],
    ids=["not-json", "not-an-object", "no-phones", "name", "mixed", "key", "no-number", "twice"],
)
def test_read_labels_refuses(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_labels(write_lines(tmp_path / "labels.jsonl", rows))


def test_read_labels_refuses_other_formats(tmp_path):
    with pytest.raises(ValueError, match=r"give \.jsonl or \.jsonl\.gz"):
        read_labels(tmp_path / "phones.TextGrid")
