"""Transcripts as files: text, JSON, and subtitles as SubRip (.srt) and WebVTT (.vtt)."""

from __future__ import annotations

import html
import json
import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .decoding import TimedWord
from .transcription import Transcript


class Caption(NamedTuple):
    """A subtitle: its lines, and when it is shown, in seconds from the beginning of the recording."""

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

    They are cut at pauses; what is still too long, where the pause between two words is longest in the second half of
    what fits. The defaults are what broadcasters ask for: two lines of 42 characters, one to seven seconds.

    Args:
        words: In order of time.
        max_characters: Of a line; a longer word has a line of its own.
        max_lines: Of a subtitle.
        max_seconds: From the beginning of the first to the end of the last word; a longer word stands alone.
        min_seconds: A shorter subtitle stays so long, if the next one does not come before.
        pause_seconds: Between two words, from which on the next begins a new subtitle.

    Raises:
        ValueError: If one of the numbers is not positive.
    """
    numbers = {"max_characters": max_characters, "max_lines": max_lines, "max_seconds": max_seconds}
    for name, value in (*numbers.items(), ("pause_seconds", pause_seconds)):
        if value <= 0:
            raise ValueError(f"{name}={value} must be more than 0.")

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
        if end < len(words) and _pause(words, end) < pause_seconds:  # too long, not at a pause
            middle = begin + (end - begin + 1) // 2
            end = max(range(middle, end + 1), key=lambda cut: (_pause(words, cut), cut))
        limit = words[end].start if end < len(words) else float("inf")
        start, stop = words[begin].start, words[end - 1].end
        found.append(
            Caption(lines_of(words[begin:end]), start, min(max(stop, start + min_seconds), max(limit, start)))
        )
        begin = end
    return found


def _pause(words: Sequence[TimedWord], index: int) -> float:
    """Seconds between a word and the one before it, to the millisecond: rounding does not choose between two."""
    return round(words[index].start - words[index - 1].end, 3)


def _timestamp(seconds: float, separator: str) -> str:
    milliseconds = max(0, round(seconds * 1000))
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}{separator}{milliseconds % 1000:03}"


def _cue(caption: Caption, separator: str, text: str) -> str:
    return f"{_timestamp(caption.start, separator)} --> {_timestamp(caption.end, separator)}\n{text}\n"


def to_text(transcript: Transcript) -> str:
    """The text, and a line break."""
    return transcript.text + "\n"


def to_json(transcript: Transcript) -> str:
    """An object with "id", "text", "seconds", "score" and "words", each with "word", "start" and "end" in seconds."""
    words = [{"word": word, "start": round(start, 3), "end": round(end, 3)} for word, start, end in transcript.words]
    content = {**transcript._asdict(), "seconds": round(transcript.seconds, 6), "words": words}
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def to_srt(transcript: Transcript) -> str:
    """SubRip: numbered subtitles. The format has no way to escape markup."""
    cues = enumerate(captions(transcript.words), 1)
    return "\n".join(f"{number}\n{_cue(caption, ',', chr(10).join(caption.lines))}" for number, caption in cues)


def to_vtt(transcript: Transcript) -> str:
    """WebVTT, with what would be markup escaped."""
    cues = (_cue(found, ".", html.escape("\n".join(found.lines), quote=False)) for found in captions(transcript.words))
    return "\n".join(["WEBVTT\n", *cues])


FORMATS: dict[str, Callable[[Transcript], str]] = {"txt": to_text, "json": to_json, "srt": to_srt, "vtt": to_vtt}
"""Suffix -> function that makes a file's content of a transcript."""
