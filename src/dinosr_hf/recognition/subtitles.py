"""File formats of transcripts: text, JSON, and subtitles as SubRip (.srt) and WebVTT (.vtt)."""

import html
import json
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from ..utils.command_line import check_ranges
from .decoding import TimedWord
from .transcription import Transcript


class Caption(NamedTuple):
    """A subtitle: its lines, and when it is shown, in seconds from the start of the recording."""

    lines: list[str]
    start: float
    end: float


def captions(
    words: Sequence[TimedWord],
    *,
    max_characters: int = 42,
    max_lines: int = 2,
    max_seconds: float = 7.0,
    min_seconds: float = 1.0,
    pause_seconds: float = 0.8,
) -> list[Caption]:
    """
    Cut a transcript into subtitles, between words.

    A subtitle ends at a pause. If the words up to the pause do not fit, it ends at the longest gap between two words
    in the second half of those that fit. The defaults are what broadcasters ask for: two lines of 42 characters, one
    to seven seconds. Raises `ValueError` if a number is not positive.

    Args:
        words: Words in order of time.
        max_characters: Maximum length of a line; a longer word has a line of its own.
        max_lines: Maximum number of lines of a subtitle.
        max_seconds: Maximum time from the start of the first word to the end of the last; a longer word stands alone.
        min_seconds: Minimum time that a subtitle is shown, unless the next one starts earlier.
        pause_seconds: Minimum time between two words that counts as a pause.
    """
    limits = {"max_characters": max_characters, "max_lines": max_lines, "max_seconds": max_seconds}
    limits["pause_seconds"] = pause_seconds
    check_ranges((value > 0, name, value, "more than 0") for name, value in limits.items())

    def lines_of(part: Sequence[TimedWord]) -> list[str]:
        return textwrap.wrap(" ".join(word.word for word in part), max_characters, break_long_words=False)

    def fits(part: Sequence[TimedWord]) -> bool:
        return len(lines_of(part)) <= max_lines and part[-1].end - part[0].start <= max_seconds

    found: list[Caption] = []
    begin = 0
    while begin < len(words):
        end = begin + 1
        while end < len(words) and _pause(words, end) < pause_seconds and fits(words[begin : end + 1]):
            end += 1
        if end < len(words) and _pause(words, end) < pause_seconds:  # does not fit up to the pause
            middle = begin + (end - begin + 1) // 2
            end = max(range(middle, end + 1), key=lambda cut: (_pause(words, cut), cut))
        limit = words[end].start if end < len(words) else float("inf")
        start = words[begin].start
        stop = min(max(words[end - 1].end, start + min_seconds), max(limit, start))
        found.append(Caption(lines_of(words[begin:end]), start, stop))
        begin = end
    return found


def _pause(words: Sequence[TimedWord], index: int) -> float:
    """Seconds between a word and the one before it, to the millisecond, so that rounding errors decide nothing."""
    return round(words[index].start - words[index - 1].end, 3)


def _timestamp(seconds: float, separator: str) -> str:
    milliseconds = max(0, round(seconds * 1000))
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}{separator}{milliseconds % 1000:03}"


def _cue(caption: Caption, separator: str, escape: Callable[[str], str] = str) -> str:
    start, end = (_timestamp(seconds, separator) for seconds in (caption.start, caption.end))
    text = escape("\n".join(caption.lines))
    return f"{start} --> {end}\n{text}\n"


def to_json(transcript: Transcript) -> str:
    """Format as JSON: "id", "text", "seconds", "score" and "words", each with "word", "start" and "end" in seconds."""
    words = [{"word": word, "start": round(start, 3), "end": round(end, 3)} for word, start, end in transcript.words]
    content = {**transcript._asdict(), "seconds": round(transcript.seconds, 6), "words": words}
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def to_srt(transcript: Transcript) -> str:
    """Format as SubRip, numbered subtitles. The format has no way to escape markup."""
    return "\n".join(f"{number}\n{_cue(found, ',')}" for number, found in enumerate(captions(transcript.words), 1))


def to_vtt(transcript: Transcript) -> str:
    """Format as WebVTT, with markup escaped."""
    escape = partial(html.escape, quote=False)
    return "\n".join(["WEBVTT\n", *(_cue(found, ".", escape) for found in captions(transcript.words))])


FORMATS: dict[str, Callable[[Transcript], str]] = {
    "txt": lambda transcript: transcript.text + "\n",
    "json": to_json,
    "srt": to_srt,
    "vtt": to_vtt,
}
"""Suffix -> function that formats a transcript as the content of a file."""
