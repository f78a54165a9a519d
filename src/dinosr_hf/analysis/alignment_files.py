"""Files of phone labels, in the formats of aligners and of DiscoPhon: TextGrid (MFA, Praat), CTM (Kaldi), JSONL."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

from ..data.finding import find_files
from ..utils.command_line import argument_errors
from ..utils.names import printable_name
from ..utils.text_files import check_regular_file, json_lines, read_text, text_lines
from ..utils.visible_text import visible_text
from .alignment import Labels, Segment, to_segment

SUFFIXES = (".jsonl", ".jsonl.gz", ".ctm", ".txt", ".TextGrid")

# Praat reads texts in quotes, numbers and flags that stand alone. The rest, such as the `xmin =` of the long form, is
# for people; a comment reaches from an exclamation mark to the end of its line.
_TOKEN = re.compile(
    r'(?<![^\s=])(?:!.*|"(?P<text>[^"]*(?:""[^"]*)*)"|(?P<number>[-+]?\.?\d\S*)|(?P<flag><exists>|<absent>))(?!\S)'
)


def _parse_row(row: dict[str, Any], tier: str, place: str) -> tuple[str, list[str] | list[Segment]]:
    name = row.get("name", row.get("id"))
    if not isinstance(name, str) or not isinstance(row.get(tier), list):
        raise ValueError(f'{place}, must be an object with a string "name" (or "id") and a list "{tier}".')
    kinds = {type(label) for label in row[tier]}
    if kinds <= {str}:
        return name, [*map(visible_text, row[tier])]
    if kinds != {dict}:
        raise ValueError(f'{place}, must hold all strings or all objects with label, start and end in "{tier}".')
    try:
        return name, [to_segment(label) for label in row[tier]]
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{place}, has an invalid segment: {error}") from None


def read_labels(path: str | Path, tier: str = "phones") -> dict[str, list[str] | list[Segment]]:
    """
    Read a JSONL file (`.jsonl` or `.jsonl.gz`) of phone labels, by name of the recording.

    Each line is an object `{"name": ..., "phones": [...]}`, or "id" for "name"; other keys are ignored. `phones`, or
    the key that `tier` names, holds strings at a fixed rate, or objects `{"label": ..., "start": seconds, "end":
    seconds}`; empty ones are silence. Raises `ValueError` if the file has another suffix, a line is malformed, or a
    name occurs twice.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{path} is not a JSONL file: give .jsonl or .jsonl.gz, or other labels: .ctm or .TextGrid.")
    rows: dict[str, list[str] | list[Segment]] = {}
    for number, row in json_lines(path):
        place = f"{path}, line {number}"
        name, labels = _parse_row(row, tier, place)
        if name in rows:
            raise ValueError(f"{place}, names {name!r} again, but each recording has one line.")
        rows[name] = labels
    return rows


def read_ctm(path: str | Path) -> dict[str, list[Segment]]:
    """
    Read a Kaldi CTM file: a line per phone, `recording channel start duration label [confidence]`, in seconds.

    Lines that begin with `;;` are comments. Returns the segments of each recording in order of time. Raises
    `ValueError` if a line is malformed, or a recording has several channels.
    """
    rows: dict[str, list[Segment]] = {}
    channels: dict[str, str] = {}
    for number, line in enumerate(text_lines(path), start=1):
        words = line.split()
        if not words or words[0].startswith(";;"):
            continue
        place = f"{path}, line {number}"
        try:
            name, channel, start, duration, label = words[:5]
            begin, length, _ = float(start), float(duration), float(words[5] if len(words) > 5 else 1)
        except ValueError:
            form = "`recording channel start duration label`, or that and a number"
            raise ValueError(f"{place}: {line[:80]!r} is not {form}.") from None
        if not (0 <= begin < math.inf and 0 <= length < math.inf):
            raise ValueError(f"{place}: start={start} and duration={duration} must be at least 0 seconds.")
        if channels.setdefault(name, channel) != channel:
            raise ValueError(
                f"{place}: {name!r} has the channels {channels[name]} and {channel}, but only one can have labels."
                " Name the recording of each channel differently."
            )
        if label := visible_text(label):
            rows.setdefault(name, []).append(Segment(label, begin, begin + length))
    return {name: sorted(segments, key=attrgetter("start")) for name, segments in rows.items()}


def read_discophon(path: str | Path) -> dict[str, list[Segment]]:
    """
    Read DiscoPhon's alignments: columns separated by spaces, among them `#file onset offset #phone`, in seconds.

    Returns the segments of each recording in order of time. Raises `ValueError` if a column is missing, or a line is
    malformed.
    """
    lines = enumerate(text_lines(path), start=1)
    header = next(lines, (1, ""))[1].split()
    wanted = ("#file", "onset", "offset", "#phone")
    if missing := [name for name in wanted if name not in header]:
        raise ValueError(
            f"{path} has no column {missing[0]}. Labels in a .txt file are DiscoPhon's: its first line names columns,"
            f" {' '.join(wanted)} among them."
        )
    columns = [header.index(name) for name in wanted]
    rows: dict[str, list[Segment]] = {}
    for number, line in lines:
        words = line.split()
        if not words:
            continue
        try:
            name, start, end, label = (words[column] for column in columns)
            segment = to_segment((label, float(start), float(end)))
        except (IndexError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {line[:80]!r} is not {' '.join(header)} ({error}).") from None
        rows.setdefault(name, []).append(segment)
    return {name: sorted(segments, key=attrgetter("start")) for name, segments in rows.items()}


def _textgrid_text(path: str | Path) -> str:
    check_regular_file(path)
    with open(path, "rb") as file:
        start = file.read(2)
    if start not in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return read_text(path)
    with argument_errors(f"{path} is not UTF-16, as it begins: "):  # Praat writes it where ASCII is not enough
        text = Path(path).read_text(encoding="utf-16")
    return text


def _parse_textgrid(text: str) -> Iterator[tuple[str, list[Segment] | None]]:
    """Yield the name and the segments of each tier of a TextGrid; None for a tier of points."""
    tokens = (token for token in _TOKEN.finditer(text) if token.lastgroup is not None)

    def take(kind: str) -> str:
        token = next(tokens, None)
        if token is None:
            raise ValueError("it is cut short.")
        if token.lastgroup != kind:
            line = text.count("\n", 0, token.start()) + 1
            raise ValueError(f"line {line} has {token[0][:80]} where a {kind} is expected.")
        return token[kind].replace('""', '"')

    if [take("text").partition(" ")[0], take("text")] != ["ooTextFile", "TextGrid"]:
        raise ValueError("it does not begin as one.")
    _, _, flag = take("number"), take("number"), take("flag")  # from and to this many seconds
    for _ in range(int(take("number")) if flag == "<exists>" else 0):
        kind, name, _, _, size = (take(each) for each in ("text", "text", "number", "number", "number"))
        has_intervals, segments = kind == "IntervalTier", []
        for _ in range(int(size)):
            start, end = take("number"), take("number") if has_intervals else math.inf
            label = take("text")
            if has_intervals and visible_text(label):
                segments.append(to_segment((label, float(start), float(end))))
        yield name, segments if has_intervals else None
    if next(tokens, None) is not None:
        raise ValueError("it has more tiers, or entries, than it states.")


def read_textgrid(path: str | Path, tier: str = "phones") -> list[Segment]:
    """
    Read an interval tier of a TextGrid, in Praat's long or short form, without intervals of empty text.

    The Montreal Forced Aligner writes the tiers "phones" and "words". Raises `ValueError` if the file is not a
    TextGrid, is cut short or has no such interval tier.
    """
    text = _textgrid_text(path)
    with argument_errors(f"{path} cannot be read as a TextGrid: "):
        tiers = [(name, segments) for name, segments in _parse_textgrid(text) if segments is not None]
    found = [segments for name, segments in tiers if visible_text(name) == visible_text(tier)]
    if not found:
        names = ", ".join(name for name, _ in tiers) or "none"
        raise ValueError(f"{path} has no interval tier {tier!r}; its interval tiers: {names}. Name one of them.")
    if len(found) > 1:
        raise ValueError(f"{path} has several tiers {tier!r}. Rename or remove all but one.")
    return found[0]


def read_alignments(path: str | Path, *, tier: str = "phones") -> dict[str, Labels]:
    """
    Read labels of recordings, by name, in any supported format; `match_labels` finds the name of a recording.

    Args:
        path: Path to a `.jsonl` or `.jsonl.gz` file (`read_labels`), a `.ctm` file, a `.txt` file of DiscoPhon, a
            `.TextGrid`, or a folder of TextGrids, searched recursively, each named after its recording; its name is
            its path, without suffix.
        tier: Tier of a TextGrid, or key of the labels in JSONL; ignored for the others.

    Raises `ValueError` if the path does not exist, its format is not supported, it cannot be read, or a name occurs
    twice.
    """
    path = Path(path)
    if path.is_dir():
        files: dict[str, str] = {}
        for file in find_files(path, ".textgrid").names:
            name = printable_name(Path(file).with_suffix("").as_posix())
            if (other := files.setdefault(name, file)) != file:
                raise ValueError(f"{path} has {other} and {file}, but each recording has one. Remove one.")
        if not files:
            raise ValueError(f"{path} has no .TextGrid files in it.")
        return {name: read_textgrid(path / file, tier) for name, file in files.items()}
    if not path.exists():
        raise ValueError(f"{path} does not exist. Labels are a file ({', '.join(SUFFIXES)}) or a folder of TextGrids.")
    if path.suffix.lower() == ".textgrid":
        return {path.stem: read_textgrid(path, tier)}
    readers = {".ctm": read_ctm, ".txt": read_discophon}
    read = readers.get(path.suffix.lower())
    return dict(read_labels(path, tier) if read is None else read(path))
