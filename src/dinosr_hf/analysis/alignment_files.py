"""Files of phone labels, in the formats that aligners write: TextGrid (MFA, Praat), CTM (Kaldi), JSONL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..utils.extras import import_extra
from .alignment import Labels, Segment, read_labels

SUFFIXES = (".jsonl", ".jsonl.gz", ".ctm", ".TextGrid")


def read_ctm(path: str | Path) -> dict[str, list[Segment]]:
    """
    Read a Kaldi CTM file: a line for each phone, `recording channel start duration label [confidence]`, in seconds.

    Args:
        path: The file; lines that begin with `;;` are comments.

    Returns:
        For each recording, in the order of the file, its segments in the order of time.

    Raises:
        ValueError: If a line is of another form, or a recording has several channels.
    """
    rows: dict[str, list[Segment]] = {}
    channels: dict[str, str] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith(";;"):
            continue
        try:
            name, channel, start, duration, label = words[:5]
            begin, length = float(start), float(duration)
        except ValueError:
            raise ValueError(
                f"{path}, line {number}: {line[:80]!r} is not `recording channel start duration label`."
            ) from None
        if not (begin >= 0 and 0 <= length < float("inf")):
            raise ValueError(
                f"{path}, line {number}: start={start} and duration={duration} must be at least 0 seconds."
            )
        if channels.setdefault(name, channel) != channel:
            raise ValueError(
                f"{path}, line {number}: {name!r} has the channels {channels[name]} and {channel}, but labels of"
                " one. Give each channel's recording a name of its own."
            )
        rows.setdefault(name, []).append(Segment(label, begin, begin + length))
    return {name: sorted(segments, key=lambda segment: segment.start) for name, segments in rows.items()}


def read_textgrid(path: str | Path, tier: str = "phones") -> list[Segment]:
    """
    Read a tier of intervals of a TextGrid, in Praat's long or short form.

    Args:
        path: The file.
        tier: Name of the tier; the Montreal Forced Aligner calls it "phones".

    Returns:
        Its segments in the order of time, without those of no text.

    Raises:
        ValueError: If it is no TextGrid, or has no such tier of intervals.
        ImportError: Without praatio, which reads it.
    """
    textgrid = import_extra("praatio.textgrid", "analysis")
    errors = import_extra("praatio.utilities.errors", "analysis")
    try:
        grid = textgrid.openTextgrid(str(path), includeEmptyIntervals=False, reportingMode="error")
    except (errors.PraatioException, ValueError, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TextGrid that can be read: {error}") from error
    found = next((one for one in grid.tiers if one.name == tier), None)
    if found is None or not isinstance(found, textgrid.IntervalTier):
        names = ", ".join(one.name for one in grid.tiers if isinstance(one, textgrid.IntervalTier))
        raise ValueError(
            f"{path} has no tier of intervals named {tier!r}. It has {names or 'none'}: name one of them."
        )
    return [Segment(entry.label, float(entry.start), float(entry.end)) for entry in found.entries]


def _textgrids(folder: Path, tier: str) -> Iterator[tuple[str, list[Segment]]]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".textgrid")
    if not files:
        raise ValueError(f"{folder} has no .TextGrid files in it.")
    for path in files:
        yield path.stem, read_textgrid(path, tier)


def read_alignments(path: str | Path, *, tier: str = "phones") -> dict[str, Labels]:
    """
    Read labels of recordings, whatever the format.

    Args:
        path: A `.jsonl` or `.jsonl.gz` file as `read_labels` takes it, a `.ctm` file, a `.TextGrid`, or a folder with
            TextGrids, also in folders of its own, each named as its recording.
        tier: Of TextGrids, and the key of JSONL that has the labels; a CTM file has one kind only.

    Returns:
        Labels by name of the recording; `match_labels` finds a recording's.

    Raises:
        ValueError: If there is no such file, its format is another, it cannot be read, or a name comes twice.
        ImportError: For TextGrids without praatio.
    """
    path = Path(path)
    if path.is_dir():
        rows: dict[str, Labels] = {}
        for name, segments in _textgrids(path, tier):
            if name in rows:
                raise ValueError(f"{path} has two files {name}.TextGrid, but each recording has one. Remove one.")
            rows[name] = segments
        return rows
    if not path.is_file():
        raise ValueError(f"{path} is not here. Labels are a file ({', '.join(SUFFIXES)}) or a folder of TextGrids.")
    if path.suffix.lower() == ".textgrid":
        return {path.stem: read_textgrid(path, tier)}
    if path.suffix.lower() == ".ctm":
        return dict(read_ctm(path))
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{path} is no file of labels that can be read: give one of {', '.join(SUFFIXES)}.")
    return dict(read_labels(path, tier))
