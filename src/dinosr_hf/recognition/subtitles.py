"""File formats of transcripts: text, JSON, and subtitles as SubRip (.srt) and WebVTT (.vtt)."""

import html
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from ..utils.command_line import check_ranges
from ..utils.visible_text import graphemes, line_units, num_columns
from .decoding import TimedWord
from .transcription import Transcript


class Caption(NamedTuple):
    """A subtitle: its lines, and when it is shown, in seconds from the start of the recording."""

    lines: list[str]
    start: float
    end: float


class _Piece(NamedTuple):
    """A word or, with `is_part`, a part of one; `continues` if it goes on with the word of the piece before it."""

    text: str
    start: float
    end: float
    is_part: bool
    continues: bool


def _divisions(text: str, max_columns: int, least: float) -> Iterator[list[str]]:
    """
    Yield divisions of a text into pieces of about the same width, from the fewest pieces to single units.

    The first has at least `least` pieces. Units of more than `max_columns`, which are no words, are cut anywhere.
    """
    units = [
        part for unit in line_units(text) for part in (graphemes(unit) if num_columns(unit) > max_columns else [unit])
    ]
    ends = np.cumsum([num_columns(unit) for unit in units])
    count = max(1, math.ceil(least))
    while count < len(units):
        numbers = np.ceil(ends * count / max(1, ends[-1]) - 1e-9).clip(1).tolist()
        groups = itertools.groupby(zip(units, numbers, strict=True), key=itemgetter(1))
        yield ["".join(unit for unit, _ in group) for _, group in groups]
        count += 1 + count // 50
    yield units


def _pieces(word: TimedWord, max_columns: int, fits: Callable[[Sequence[_Piece]], bool], least: float) -> list[_Piece]:
    """Cut a word into the fewest pieces that fit; the times of its characters are taken to be in proportion."""
    pieces: list[_Piece] = []
    for texts in _divisions(word.word, max_columns, least):
        ends = np.cumsum([0, *map(num_columns, texts)])
        times = word.start + (word.end - word.start) * ends / max(1, ends[-1])
        rows = zip(texts, pairwise([*times[:-1].tolist(), word.end]), strict=True)
        pieces = [_Piece(text, *time, len(texts) > 1, number > 0) for number, (text, time) in enumerate(rows)]
        if all(fits([piece]) for piece in pieces):
            break
    return pieces


def _lines(pieces: Sequence[_Piece], max_characters: int, max_lines: int) -> list[str]:
    """Wrap pieces into lines; one that is longer than a line is divided evenly."""
    lines: list[str] = []
    for piece in pieces:
        longer = f"{lines[-1]}{'' if piece.continues else ' '}{piece.text}" if lines else ""
        width = num_columns(piece.text)
        if longer and num_columns(longer) <= max_characters:
            lines[-1] = longer
        elif width <= max_characters:
            lines.append(piece.text)
        else:
            rows: list[str] = []
            max_columns = max_characters * (1 if piece.is_part else max_lines)
            for rows in _divisions(piece.text, max_columns, width / max_characters):
                if all(num_columns(row) <= max_characters for row in rows):
                    break
            lines += rows
    return lines


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
    in the second half of those that fit. Scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) make
    words that do not fit: these are cut between characters into the fewest parts that do, of about the same width, and
    so is any word of more than `max_lines` lines. The defaults are what broadcasters ask for: two lines of 42
    characters, one to seven seconds. Raises `ValueError` if a number is not positive.

    Args:
        words: Words in order of time.
        max_characters: Maximum length of a line; wide characters (Chinese, Japanese, Korean) count as two. A longer
            word of a script with spaces has a line of its own.
        max_lines: Maximum number of lines of a subtitle.
        max_seconds: Maximum time from the start of the first word to the end of the last; a longer word of a script
            with spaces stands alone.
        min_seconds: Minimum time that a subtitle is shown, unless the next one starts earlier.
        pause_seconds: Minimum time between two words that counts as a pause.
    """
    limits = {"max_characters": max_characters, "max_lines": max_lines, "max_seconds": max_seconds}
    limits["pause_seconds"] = pause_seconds
    check_ranges((value > 0, name, value, "more than 0") for name, value in limits.items())

    max_columns = max_characters * max_lines

    def fits(part: Sequence[_Piece]) -> bool:
        return (
            len(_lines(part, max_characters, max_lines)) <= max_lines and part[-1].end - part[0].start <= max_seconds
        )

    pieces: list[_Piece] = []
    for word in words:
        least = max(num_columns(word.word) / max_columns, (word.end - word.start) / max_seconds)
        pieces += _pieces(word, max_columns, fits, least)
    found: list[Caption] = []
    begin = 0
    while begin < len(pieces):
        end = begin + 1
        while end < len(pieces) and _pause(pieces, end) < pause_seconds and fits(pieces[begin : end + 1]):
            end += 1
        if end < len(pieces) and _pause(pieces, end) < pause_seconds:  # does not fit up to the pause
            middle = begin + (end - begin + 1) // 2
            end = max(range(middle, end + 1), key=lambda cut: (_pause(pieces, cut), cut))
        limit = pieces[end].start if end < len(pieces) else float("inf")
        start = pieces[begin].start
        stop = min(max(pieces[end - 1].end, start + min_seconds), max(limit, start))
        found.append(Caption(_lines(pieces[begin:end], max_characters, max_lines), start, stop))
        begin = end
    return found


def _pause(pieces: Sequence[_Piece], index: int) -> float:
    """Seconds between a piece and the one before it, to the millisecond, so that rounding errors decide nothing."""
    return round(pieces[index].start - pieces[index - 1].end, 3)


def _timestamp(seconds: float, separator: str) -> str:
    milliseconds = max(0, round(seconds * 1000))
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}{separator}{milliseconds % 1000:03}"


def _cue(caption: Caption, separator: str, escape: Callable[[str], str] = str) -> str:
    start, end = (_timestamp(seconds, separator) for seconds in (caption.start, caption.end))
    text = escape("\n".join(caption.lines))
    return f"{start} --> {end}\n{text}\n"


def to_json(transcript: Transcript, indent: int | None = 2) -> str:
    """
    Format as JSON: "id", "text", "seconds", "score" and "words", each with "word", "start" and "end" in seconds.

    With `indent=None` it is one line.
    """
    words = [{"word": word, "start": round(start, 3), "end": round(end, 3)} for word, start, end in transcript.words]
    content = {**transcript._asdict(), "seconds": round(transcript.seconds, 6), "words": words}
    return json.dumps(content, ensure_ascii=False, indent=indent) + "\n"


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
