"""Transcripts as text, JSON, SubRip and WebVTT: where captions are cut, and the exact content of files."""

import json
from itertools import pairwise

import numpy as np
import pytest

from dinosr_hf.recognition import FORMATS, Transcript, captions, output_path
from dinosr_hf.recognition.decoding import TimedWord


def words_of(text, starts=None, seconds=0.3):
    words = text.split()
    starts = [0.5 * number for number in range(len(words))] if starts is None else starts
    return [TimedWord(word, start, start + seconds) for word, start in zip(words, starts, strict=True)]


def transcript(*words):
    return Transcript("talks/a.wav", " ".join(word.word for word in words), list(words), 7_300.1234567, -1.5)


def texts(found):
    return [" ".join(caption.lines) for caption in found]


def test_captions_are_cut_at_pauses():
    found = captions(words_of("a b c d", [0, 0.5, 2, 2.5]))
    assert texts(found) == ["a b", "c d"]
    assert texts(captions(words_of("a b c d", [0, 0.5, 2, 2.5]), pause_seconds=1.3)) == ["a b c d"]


def test_long_captions_are_cut_at_the_longest_pause():
    # "aa bb cc dd" fits in twelve characters; the longest pause of its second half is before "dd".
    words = words_of("aa bb cc dd ee ff", [0, 0.6, 1, 1.6, 2.0, 2.4])
    assert texts(captions(words, max_characters=12, max_lines=1)) == ["aa bb cc", "dd ee ff"]
    assert texts(captions(words_of("aa bb cc dd ee"), max_characters=12, max_lines=1)) == ["aa bb cc dd", "ee"]


def test_captions_of_long_duration_are_cut():
    assert texts(captions(words_of("a b c d e f g"), max_seconds=1.4)) == ["a b c", "d e f", "g"]
    assert texts(captions(words_of("a b", seconds=3), max_seconds=1)) == ["a", "b"]


def test_captions_are_wrapped_into_lines():
    found = captions(words_of("one two three four", [0, 0.1, 0.2, 0.3], 0.1), max_characters=9)
    assert [caption.lines for caption in found] == [["one two", "three"], ["four"]]
    (long,) = captions(words_of("x" * 50))
    assert long.lines == ["x" * 50]


def test_short_captions_stay_for_the_minimum_time():
    found = captions(words_of("a b", [1.0, 2.5]))
    assert [(caption.start, caption.end) for caption in found] == [(1.0, 2.0), (2.5, 3.5)]
    found = captions(words_of("a b", [1.0, 1.6], 0.1), pause_seconds=0.4)
    assert [(caption.start, caption.end) for caption in found] == [(1.0, 1.6), (1.6, 2.6)]


@pytest.mark.parametrize("seed", range(5))
def test_captions_have_all_words_and_do_not_overlap(seed):
    generator = np.random.default_rng(seed)
    starts = np.cumsum(generator.exponential(0.5, 200)) + 0.4
    words = [
        TimedWord("x" * int(generator.integers(1, 15)), start, min(start + 0.4, following))
        for start, following in pairwise([*starts.tolist(), np.inf])
    ]
    found = captions(words)
    assert " ".join(texts(found)) == " ".join(word.word for word in words)
    assert all(len(caption.lines) <= 2 and max(map(len, caption.lines)) <= 42 for caption in found)
    assert all(caption.start < caption.end for caption in found)
    assert all(left.end <= right.start for left, right in pairwise(found))
    assert len(found) > 10
    for suffix in ("srt", "vtt"):
        lines = FORMATS[suffix](transcript(*words)).splitlines()
        times = [time for line in lines if " --> " in line for time in line.split(" --> ")]
        assert len(times) == 2 * len(found) and times == sorted(times)


def test_srt():
    text = FORMATS["srt"](transcript(*words_of("don't a<b", [0.0, 0.4]), TimedWord("late", 363_599.9996, 363_601.5)))
    assert text == (
        "1\n00:00:00,000 --> 00:00:01,000\ndon't a<b\n\n2\n101:00:00,000 --> 101:00:01,500\nlate\n"  # hours over 99
    )


def test_vtt():
    text = FORMATS["vtt"](
        transcript(*words_of("a<b & --> c", [0.0012, 0.2, 0.4, 0.6]), TimedWord("z", 3_725.5, 3_727))
    )
    assert text == (
        "WEBVTT\n\n00:00:00.001 --> 00:00:01.001\na&lt;b &amp; --&gt; c\n\n01:02:05.500 --> 01:02:07.000\nz\n"
    )


def test_text_and_json():
    found = transcript(TimedWord("é", 0.12345, 0.5))
    assert FORMATS["txt"](found) == "é\n"
    text = FORMATS["json"](found)
    assert json.loads(text) == {
        "id": "talks/a.wav",
        "text": "é",
        "seconds": 7_300.123457,
        "score": -1.5,
        "words": [{"word": "é", "start": 0.123, "end": 0.5}],
    }
    assert "é" in text


def test_empty_transcript():
    contents = {suffix: FORMATS[suffix](transcript()) for suffix in ("txt", "srt", "vtt")}
    assert contents == {"txt": "\n", "srt": "", "vtt": "WEBVTT\n"}


@pytest.mark.parametrize("name", ["max_characters", "max_lines", "max_seconds", "pause_seconds"])
def test_invalid_numbers_raise(name):
    with pytest.raises(ValueError, match=f"{name}=0 is out of range: it must be more than 0"):
        captions(words_of("a"), **{name: 0})


@pytest.mark.parametrize(
    ("recording", "expected"),
    [("a.wav", "a.srt"), ("deep/a.b.MP3", "deep/a.b.srt"), ("7", "7.srt"), ("v1.5", "v1.5.srt")],
)
def test_output_paths(tmp_path, recording, expected):
    assert output_path(tmp_path, recording, "srt") == tmp_path / expected


@pytest.mark.parametrize("recording", ["../a.wav", "/a.wav", "", "b/../../a.wav"])
def test_output_paths_stay_in_the_folder(tmp_path, recording):
    with pytest.raises(ValueError, match="leads out of"):
        output_path(tmp_path, recording, "srt")
