"""Transcripts as text, JSON, SubRip and WebVTT: where captions are cut, and the exact content of files."""

import json
import unicodedata
from itertools import pairwise

import numpy as np
import pytest

from dinosr_hf.recognition import FORMATS, Transcript, captions
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


JAPANESE = "今日は天気が良いので公園へ散歩に行きましょう" * 4 + "とてもカード"
THAI = "ประเทศไทยเป็นประเทศที่ตั้งอยู่ในทวีปเอเชียตะวันออกเฉียงใต้" * 3
KHMER = "ប្រទេសកម្ពុជាជាប្រទេសមួយនៅអាស៊ីអាគ្នេយ៍" * 4
TEXTS = {
    "Japanese": JAPANESE,
    "Chinese": "中文没有空格" * 20,
    "Thai": THAI,
    "Khmer": KHMER,
    "Burmese": "မြန်မာဘာသာစကား" * 9,
    "Korean": "한국어는" * 20,
    "combining marks": "カ\u309a" * 60,
    "no spaces at all": "x" * 200,
    "mixed": "好Ω" * 50,
}
LIMITS = [{}, {"max_characters": 13}, {"max_seconds": 2.5}, {"max_lines": 1, "max_characters": 20}]


def columns(text):
    seen = (character for character in text if unicodedata.category(character) not in ("Mn", "Me", "Cf"))
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in seen)


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("name", TEXTS)
def test_a_text_without_spaces_is_cut(name, limits):
    found = captions([TimedWord(TEXTS[name], 1.0, 24.0)], **limits)
    lines = [line for caption in found for line in caption.lines]
    assert "".join(lines) == TEXTS[name]
    allowed = {"max_characters": 42, "max_lines": 2, "max_seconds": 7.0, **limits}
    assert all(len(caption.lines) <= allowed["max_lines"] for caption in found)
    assert all(columns(line) <= allowed["max_characters"] for line in lines)
    assert all(caption.end - caption.start <= allowed["max_seconds"] + 1e-9 for caption in found)
    assert found[0].start == 1.0 and found[-1].end == 24.0
    assert all(left.end == right.start for left, right in pairwise(found))
    assert not any(unicodedata.category(line[0]).startswith("M") for line in lines)
    assert not any(line[0] in "ーょぁ" or line[-1] in "เแโใไ\u17d2" for line in lines)


def test_parts_of_a_text_without_spaces_have_their_times():
    found = captions([TimedWord("あいうえお" * 4, 0.0, 20.0)], max_seconds=5)
    assert found == [(["あいうえお"], start, start + 5.0) for start in (0.0, 5.0, 10.0, 15.0)]
    # Words before and after it share its first and last subtitles.
    words = [TimedWord("yes", 0.0, 1.0), TimedWord("漢字" * 20, 1.0, 9.0), TimedWord("no", 9.0, 10.0)]
    found = captions(words)
    assert [caption.lines for caption in found] == [["yes", "漢字" * 10], ["漢字" * 10, "no"]]
    assert [(caption.start, caption.end) for caption in found] == [(0.0, 5.0), (5.0, 10.0)]


def test_a_text_without_spaces_that_fits_is_not_cut():
    words = [TimedWord("今日は", 0.0, 1.0), TimedWord("ประเทศไทย", 1.1, 2.0)]
    assert captions(words) == [(["今日は ประเทศไทย"], 0.0, 2.0)]


@pytest.mark.parametrize("suffix", ["srt", "vtt"])
def test_files_of_a_text_without_spaces(suffix):
    text = FORMATS[suffix](transcript(TimedWord(JAPANESE, 0.0, 23.0)))
    rows = [line for line in text.splitlines() if line and not line.isdecimal() and line != "WEBVTT"]
    times, lines = ([row for row in rows if (" --> " in row) == is_time] for is_time in (True, False))
    assert len(times) == 4 and len(lines) == 8
    assert "".join(lines) == JAPANESE and max(map(len, lines)) <= 21
    assert times[0].startswith("00:00:00") and times[-1].replace(",", ".").endswith("00:00:23.000")


def test_empty_transcript():
    contents = {suffix: FORMATS[suffix](transcript()) for suffix in ("txt", "srt", "vtt")}
    assert contents == {"txt": "\n", "srt": "", "vtt": "WEBVTT\n"}


@pytest.mark.parametrize("name", ["max_characters", "max_lines", "max_seconds", "pause_seconds"])
def test_invalid_numbers_raise(name):
    with pytest.raises(ValueError, match=f"{name}=0 is out of range: it must be more than 0"):
        captions(words_of("a"), **{name: 0})
