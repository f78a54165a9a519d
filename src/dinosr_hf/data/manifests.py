"""
Manifests: lists of recordings, with their lengths, so that files need not be opened to plan with them.

`S` samples at 16 kHz.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .audio import SAMPLING_RATE, AudioFileError, audio_info, load_audio, resampled_length
from .sources import SpeechSource, _number_repeats, _scan, find_text_column, read_lines

# How many files are opened to see whether a manifest tells the truth.
_NUM_CHECKED = 16

TABLE_SUFFIXES = (".csv", ".jsonl", ".json")

# Of seconds; more of them say nothing about samples.
_MOST_DECIMALS = 9

# Numbers as they are written, and NaN as text: both for messages and for counting decimals.
_DECODER = json.JSONDecoder(parse_float=Decimal, parse_constant=str)

# Columns that may have the path of the audio; the first one that exists has it.
PATH_COLUMNS = ("path", "audio_filepath", "file_name", "audio", "wav")


def _spread(count: int) -> list[int]:
    """Some of the numbers from 0 to `count` - 1, the first and the last among them, evenly spread."""
    return sorted({round(k * (count - 1) / (_NUM_CHECKED - 1)) for k in range(_NUM_CHECKED)} if count else ())


class ManifestSource(SpeechSource):
    """
    A fairseq manifest: the first line is a folder, each other `relative/path<TAB>frames`.

    Files are not opened, but for 16 of them, spread evenly, whose headers must agree with the manifest. Frames are at
    the files' own rate, which must be the same for all; where it is not 16 kHz, lengths are converted.

    Args:
        path: The manifest. A folder that is not absolute is looked for beside the manifest.

    Raises:
        ValueError: For lines that are not of this form, and where headers disagree with the manifest.
        AudioFileError: If one of the files looked at cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        name = str(path)
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            root = file.readline().strip()
            rows = [self._parse(line, number, name) for number, line in enumerate(file, 2) if line.strip()]
        self.root = Path(path).parent / root
        if not root or not self.root.is_dir():
            raise ValueError(
                f"{name}: its first line must be the folder that the paths below it belong to, but {root!r} is not a"
                " folder here. Correct that line."
            )
        self._paths = [file_name for file_name, _ in rows]
        rate = self._check_headers([row for row in rows if row[1] > 0], name)
        empty = AudioFileError("Its manifest gives 0 frames.", "empty")
        lengths = [resampled_length(frames, rate) or empty for _, frames in rows]
        kept = self._keep(zip(_number_repeats(self._paths), lengths, strict=True), name)
        self._paths = [self._paths[position] for position in kept]
        self._manifest, self._kept, self._num_rows = Path(path), kept, len(rows)

    def labels(self, column: str | None = None) -> list[str | None]:
        """
        From the file beside the manifest that has the lines of its utterances; see `SpeechSource.labels`.

        Args:
            column: Its suffix without the dot; None: `wrd`, which is where fairseq keeps words.
        """
        file = self._manifest.with_suffix(f".{column or 'wrd'}")
        if not file.is_file():
            raise ValueError(
                f"{file} is not there: a line of it belongs to each line of {self._manifest.name} but the first."
            )
        lines = read_lines(file)
        if len(lines) != self._num_rows:
            raise ValueError(
                f"{file} has {len(lines):,} lines for the {self._num_rows:,} recordings of {self._manifest.name}. Make"
                " both again, together."
            )
        return [lines[position] for position in self._kept]

    @staticmethod
    def _parse(line: str, number: int, name: str) -> tuple[str, int]:
        columns = line.rstrip("\r\n").split("\t")
        if len(columns) != 2 or not columns[1].strip().isdecimal():
            raise ValueError(
                f"{name}, line {number}: {line.strip()!r} is not `relative/path<TAB>frames`, which is the form of each"
                " line but the first."
            )
        return columns[0], int(columns[1])

    def _check_headers(self, rows: list[tuple[str, int]], name: str) -> int:
        """Compare some files with the manifest; returns the rate that its frames are at."""
        rates: dict[int, str] = {}
        for position in _spread(len(rows)):
            file_name, frames = rows[position]
            info = audio_info(self.root / file_name)
            rate = info.sampling_rate
            if resampled_length(frames, rate) != info.num_samples:
                raise ValueError(
                    f"{name}: {file_name} has {frames:,} frames there, but the file has {info.num_samples:,} samples"
                    f" at 16 kHz (its own rate is {rate:,} Hz). Make the manifest again."
                )
            rates.setdefault(rate, file_name)
        if len(rates) > 1:
            shown = ", ".join(f"{file_name} {rate:,} Hz" for rate, file_name in rates.items())
            raise ValueError(
                f"{name} has files of different rates ({shown}), so that its frames do not say how long they are. Give"
                " the folder instead of the manifest, or one manifest a rate."
            )
        return next(iter(rates), SAMPLING_RATE)

    def load(self, index: int, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        """See `SpeechSource.load`."""
        return load_audio(self.root / self._paths[index], start=start, num_samples=num_samples)


class _Entry(NamedTuple):
    """A line of a table: file, id, and as far as they are given, seconds or exact samples, and seconds before it."""

    path: str
    id: str
    num_samples: int | None
    duration: Decimal | None
    offset: Decimal | None


class _Part(NamedTuple):
    """A recording: file, first sample, and samples; None where nothing says how long it is."""

    path: str
    start: int
    num_samples: int | None


class TableSource(SpeechSource):
    """
    A table of recordings: `.csv`, with names of columns in the first line, or `.jsonl` (`.json`), an object a line.

    Columns:

    - `path`, `audio_filepath`, `file_name`, `audio` or `wav`, the first that exists: the file, relative to the table's
      folder, or absolute;
    - `num_frames` and `sampling_rate`, else `num_samples` (at 16 kHz), else `duration` (seconds): its length. Where a
      line has none, the file's header is read;
    - `offset` (seconds), with `duration`: the part of the file that is the utterance;
    - `id`: the utterance's id, else the path. One that was there before gets #2, #3, ...

    Other columns are of no matter here; `labels` reads them. So the `metadata.csv` of an audio folder is such a table,
    and so are the manifests of NeMo. Files are not opened where lengths are given, but for 16 of them, spread evenly,
    whose headers must agree.

    Durations are often rounded. As many decimals as the most precise one of a table has are taken to be right, and
    half a unit of the last is left out at the end of each file, since it may not be there. With five decimals or more
    nothing is left out.

    Args:
        path: The table.

    Raises:
        ValueError: For lines that cannot be understood, a table without a column of paths, and where headers disagree.
        AudioFileError: If one of the files looked at cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        name = str(path)
        self.root = Path(path).parent
        entries = list(_entries(Path(path), name))
        figures = [value for entry in entries for value in (entry.duration, entry.offset) if value is not None]
        unit = 2 * 10 ** min(_MOST_DECIMALS, max(map(_decimals, figures), default=0))
        parts = _parts(entries, unit)
        self._check_headers([pair for pair in zip(parts, entries, strict=True) if pair[0].num_samples], unit, name)
        lengths = self._lengths(parts, name)
        kept = self._keep(zip(_number_repeats(entry.id for entry in entries), lengths, strict=True), name)
        self._parts = [parts[position] for position in kept]
        self._table, self._kept = Path(path), kept

    def labels(self, column: str | None = None) -> list[str | None]:
        """From a column of the table, which is read again; see `SpeechSource.labels`."""
        rows = [row for _, row in _rows(self._table, str(self._table))]
        # Of all rows, since a line of JSON may leave a column out; None is what a line of CSV has too much.
        names = list(dict.fromkeys(name for row in rows for name in row if name is not None))
        column = find_text_column(names, column, str(self._table))
        values = [rows[position].get(column) for position in self._kept]
        labels = [None if value is None else str(value) for value in values]
        # Paths may be any bytes, texts may not.
        if broken := next(
            (label for label in labels if label and any("\ud800" <= c <= "\udfff" for c in label)), None
        ):
            raise ValueError(f"{self._table}: {broken!r} is not UTF-8. Save the table in that encoding.")
        return labels

    def _lengths(self, parts: list[_Part], name: str) -> list[int | AudioFileError]:
        unknown = [position for position, part in enumerate(parts) if part.num_samples is None]
        scanned = _scan(unknown, lambda position: audio_info(self.root / parts[position].path).num_samples, name)
        found = dict(zip(unknown, scanned, strict=True)) if unknown else {}
        empty = AudioFileError("Its table gives it no length but 0.", "empty")
        return [
            found[position] if part.num_samples is None else part.num_samples or empty
            for position, part in enumerate(parts)
        ]

    def _check_headers(self, given: list[tuple[_Part, _Entry]], unit: int, name: str) -> None:
        """Compare some files with the table."""
        for position in _spread(len(given)):
            part, entry = given[position]
            length = audio_info(self.root / part.path).num_samples
            stop = part.start + (part.num_samples or 0)
            # The part of a file may be shorter than it is; a whole one only by what rounding can explain.
            missing = length - stop
            allowed = 2 * SAMPLING_RATE // unit + 2 if entry.num_samples is None else 0
            if missing < 0 or (entry.offset is None and missing > allowed):
                raise ValueError(
                    f"{name}: {part.path} reaches to sample {stop:,} (at 16 kHz) there, but the file has"
                    f" {length:,} samples. Make the table again, or leave its lengths out: headers are then read."
                )

    def load(self, index: int, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        """See `SpeechSource.load`."""
        part, length = self._parts[index], self.utterances[index].num_samples
        if num_samples is None and part.num_samples is not None:
            num_samples = length - start
        return load_audio(self.root / part.path, start=part.start + start, num_samples=num_samples)


def _decimals(value: Decimal) -> int:
    exponent = value.as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0


def _parts(entries: list[_Entry], unit: int) -> list[_Part]:
    """What to read for each entry, where its duration and offset may each be wrong by one in `unit` of a second."""

    def samples(units: int) -> int:  # rounded
        return (2 * units * SAMPLING_RATE + unit) // (2 * unit)

    spans = {}  # first and last unit of the entries with a duration
    ends: dict[str, int] = {}  # units that a file has at least
    for position, entry in enumerate(entries):
        if entry.duration is not None:
            first = int((entry.offset or 0) * unit)
            last = first + int(entry.duration * unit)
            spans[position] = first, last
            ends[entry.path] = max(last - (1 if entry.offset is None else 2), ends.get(entry.path, 0))
    parts = []
    for position, entry in enumerate(entries):
        if position in spans:
            first, last = spans[position]
            start = samples(first)
            parts.append(_Part(entry.path, start, max(0, samples(min(last, ends[entry.path])) - start)))
        else:
            parts.append(_Part(entry.path, 0, entry.num_samples))
    return parts


def _entries(path: Path, name: str) -> Iterator[_Entry]:
    column: str | None = None
    for number, row in _rows(path, name):
        if column is None:
            column = next((candidate for candidate in PATH_COLUMNS if candidate in row), None)
        if column is None:
            raise ValueError(
                f"{name} has no column with paths of audio. It has {', '.join(map(str, row))}; the paths must be in"
                f" one of {', '.join(PATH_COLUMNS)}. Rename it."
            )
        yield _entry(row, column, f"{name}, line {number}")


def _rows(path: Path, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Lines of a table, with their numbers."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if path.suffix.lower() == ".csv":
            reader = csv.DictReader(file)
            for row in reader:
                yield reader.line_num, row
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _object(line, f"{name}, line {number}")


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = _DECODER.decode(line.strip())
    except json.JSONDecodeError:
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {line.strip()[:80]!r} is not a JSON object, of which there must be one a line.")
    return row


def _entry(row: dict[str, Any], column: str, where: str) -> _Entry:
    path = row.get(column)
    if not isinstance(path, str) or not path:
        raise ValueError(f"{where}: {column} is {path!r}, where the path of a file must be.")
    given_id = row.get("id")
    utterance_id = path if given_id in (None, "") else str(given_id)
    duration, offset = (_number(row, key, where) for key in ("duration", "offset"))
    if offset is not None:
        if duration is None:
            raise ValueError(f"{where}: offset={offset} needs a duration, which says where the part ends.")
        return _Entry(path, utterance_id, None, duration, offset)
    frames, rate, samples = (_whole(row, key, where) for key in ("num_frames", "sampling_rate", "num_samples"))
    if frames is not None and rate:
        samples = resampled_length(frames, rate)
    return _Entry(path, utterance_id, samples, None if samples is not None else duration, None)


def _number(row: dict[str, Any], key: str, where: str) -> Decimal | None:
    given = row.get(key)
    if given in (None, ""):
        return None
    if type(given) is int and given >= 0:  # not bool
        return Decimal(given)
    try:
        value = Decimal(given if isinstance(given, (str, int, Decimal)) else "nan")
    except InvalidOperation:
        value = Decimal("nan")
    if not value.is_finite() or value < 0:
        raise ValueError(f"{where}: {key} is {given!r}, where a number of 0 or more must be.")
    return value


def _whole(row: dict[str, Any], key: str, where: str) -> int | None:
    value = _number(row, key, where)
    if value is not None and value != int(value):
        raise ValueError(f"{where}: {key} is {row[key]!r}, where a whole number must be.")
    return None if value is None else int(value)
