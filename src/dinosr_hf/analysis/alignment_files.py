"""Files of phone labels, in the formats that aligners write: TextGrid (MFA, Praat), CTM (Kaldi), JSONL."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from operator import attrgetter
from pathlib import Path

from ..utils.extras import import_extra
from .alignment import Labels, Segment, to_segment

SUFFIXES = (".jsonl", ".jsonl.gz", ".ctm", ".TextGrid")


def _parse_line(line: str, tier: str) -> tuple[str, list[str] | list[Segment]]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}. Give one object a line.") from None
    name = row.get("name", row.get("id")) if isinstance(row, dict) else None
    if not isinstance(name, str) or not isinstance(row.get(tier), list):
        raise ValueError(f'must be an object with a string "name" (or "id") and a list "{tier}".')
    kinds = {type(label) for label in row[tier]}
    if kinds <= {str}:
        return name, row[tier]
    if kinds != {dict}:
        raise ValueError(f'must hold all strings or all objects with label, start and end in "{tier}".')
    try:
        return name, [to_segment(label) for label in row[tier]]
    except (TypeError, ValueError) as error:
        raise ValueError(f"has an invalid segment: {error}") from None


def read_labels(path: str | Path, tier: str = "phones") -> dict[str, list[str] | list[Segment]]:
    """
    Read a JSONL file (`.jsonl` or `.jsonl.gz`) of phone labels, by name of the recording.

    Each line is an object `{"name": ..., "phones": [...]}`, or "id" for "name"; other keys are ignored. `phones`, or
    the key that `tier` names, holds strings at a fixed rate, or objects `{"label": ..., "start": seconds, "end":
    seconds}`. Raises `ValueError` if the file has another suffix, a line is malformed, or a name occurs twice.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{path} is not a JSONL file: give .jsonl or .jsonl.gz, or other labels: .ctm or .TextGrid.")
    rows: dict[str, list[str] | list[Segment]] = {}
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                name, labels = _parse_line(line, tier)
                if name in rows:
                    raise ValueError(f"names {name!r} again, but each recording has one line.")
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, {error}") from None
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
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith(";;"):
            continue
        place = f"{path}, line {number}"
        try:
            name, channel, start, duration, label = words[:5]
            begin, length = float(start), float(duration)
        except ValueError:
            raise ValueError(f"{place}: {line[:80]!r} is not `recording channel start duration label`.") from None
        if not (begin >= 0 and 0 <= length < float("inf")):
            raise ValueError(f"{place}: start={start} and duration={duration} must be at least 0 seconds.")
        if channels.setdefault(name, channel) != channel:
            raise ValueError(
                f"{place}: {name!r} has the channels {channels[name]} and {channel}, but only one can have labels."
                " Name the recording of each channel differently."
            )
        rows.setdefault(name, []).append(Segment(label, begin, begin + length))
    return {name: sorted(segments, key=attrgetter("start")) for name, segments in rows.items()}


def read_textgrid(path: str | Path, tier: str = "phones") -> list[Segment]:
    """
    Read an interval tier of a TextGrid, in Praat's long or short form, without intervals of empty text.

    The Montreal Forced Aligner writes the tiers "phones" and "words". Raises `ValueError` if the file is not a
    TextGrid or has no such interval tier, and `ImportError` without praatio.
    """
    textgrid = import_extra("praatio.textgrid", "analysis")
    errors = import_extra("praatio.utilities.errors", "analysis")
    try:
        grid = textgrid.openTextgrid(str(path), includeEmptyIntervals=False, reportingMode="error")
    except (errors.PraatioException, ValueError, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a TextGrid: {error}") from error
    tiers = {one.name: one for one in reversed(grid.tiers) if isinstance(one, textgrid.IntervalTier)}
    if tier not in tiers:
        names = ", ".join(reversed(tiers)) or "none"
        raise ValueError(f"{path} has no interval tier {tier!r}; its interval tiers: {names}. Name one of them.")
    return [Segment(entry.label, float(entry.start), float(entry.end)) for entry in tiers[tier].entries]


def read_alignments(path: str | Path, *, tier: str = "phones") -> dict[str, Labels]:
    """
    Read labels of recordings, by name, in any supported format; `match_labels` finds the name of a recording.

    Args:
        path: Path to a `.jsonl` or `.jsonl.gz` file (`read_labels`), a `.ctm` file, a `.TextGrid`, or a folder of
            TextGrids, searched recursively, each named after its recording.
        tier: Tier of a TextGrid, or key of the labels in JSONL; ignored for CTM.

    Raises `ValueError` if the path does not exist, its format is not supported, it cannot be read, or a name occurs
    twice, and `ImportError` for TextGrids without praatio.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() == ".textgrid")
        for name, number in Counter(file.stem for file in files).items():
            if number > 1:
                raise ValueError(f"{path} has two files {name}.TextGrid, but each recording has one. Remove one.")
        if not files:
            raise ValueError(f"{path} has no .TextGrid files in it.")
        return {file.stem: read_textgrid(file, tier) for file in files}
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Labels are a file ({', '.join(SUFFIXES)}) or a folder of TextGrids.")
    if path.suffix.lower() == ".textgrid":
        return {path.stem: read_textgrid(path, tier)}
    return dict(read_ctm(path) if path.suffix.lower() == ".ctm" else read_labels(path, tier))
