"""Manifests: lists of recordings with their lengths, so that files need not be opened to plan with them."""

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..utils.names import printable_name
from ..utils.text_files import csv_rows, json_lines, read_lines, text_lines
from ..utils.visible_text import name_key, remove_invisible
from .audio import SAMPLING_RATE, AudioFileError, audio_info, load_audio, resampled_length
from .finding import AUDIO_SUFFIXES, find_files
from .label_text import label_text, without_fractions
from .sources import NoLabelsError, SpeechSource, find_text_column, read_lengths

_NUM_CHECKED = 16  # number of files whose headers are compared with the manifest
_MAX_DECIMALS = 9  # decimals of seconds that are used; more of them say nothing about samples
_MAX_NUMBER = 10**12  # of frames or seconds, which no recording has

TABLE_SUFFIXES = (".csv", ".jsonl", ".json")
_TEXT_SUFFIXES = (".csv", ".tsv")  # of tables that tell no numbers from text

# Names of columns with the path of the audio; the first one that exists is used.
PATH_COLUMNS = ("path", "audio_filepath", "file_name", "audio", "wav")

Item = TypeVar("Item")


def _with_slashes(path: str, root: Path) -> str:
    """Return a path that Windows wrote with slashes, unless backslashes are part of a file's name."""
    return path if "\\" not in path or (root / path).exists() else path.replace("\\", "/")


def _spread(items: Sequence[Item]) -> list[Item]:
    """Return up to `_NUM_CHECKED` evenly spread items, the first and the last among them."""
    positions = np.linspace(0, len(items) - 1, min(_NUM_CHECKED, len(items))).round().astype(int)
    return [items[position] for position in positions]


class ManifestSource(SpeechSource):
    """
    A fairseq manifest: the first line is a folder, each other `relative/path<TAB>frames`.

    A folder that is not absolute is relative to the manifest's. Only 16 files, spread evenly, are opened: their
    headers must agree with the manifest. Frames are at the files' own rate, which must be the same for all; if it is
    not 16 kHz, lengths are converted. Raises `ValueError` if lines are not of this form, headers disagree, or one of
    the 16 files cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self._manifest = Path(path)
        lines = text_lines(path, errors="surrogateescape")
        root = next(lines, "").strip()
        self.root = self._manifest.parent / root
        if not root or not self.root.is_dir():
            rule = (
                "its first line must be the folder that the paths below it are relative to; or, of a table, name its"
                f" columns, of which one must be {' or '.join(PATH_COLUMNS)}"
            )
            raise ValueError(f"{path}: {rule}. But {root!r} is not a folder here. Correct that line.")
        rows = [self._parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 2) if line.strip()]
        rate = self._check_headers([row for row in rows if row[1] > 0])
        self._paths = [file_name for file_name, _ in rows]
        empty = AudioFileError("Its manifest gives 0 frames.", "empty")
        self._set_utterances(self._paths, (resampled_length(frames, rate) or empty for _, frames in rows), str(path))

    def labels(self, column: str | None = None) -> list[str | None]:
        """Read the file beside the manifest with the suffix `column` (None: wrd) and one line per recording."""
        file, name = self._manifest.with_suffix(f".{column or 'wrd'}"), self._manifest.name
        if not file.is_file():
            raise NoLabelsError(f"{file} does not exist. It must have a line for each line of {name} but the first.")
        lines = read_lines(file)
        if len(lines) != len(self._paths):
            counts = f"{len(lines):,} lines for the {len(self._paths):,} recordings of {name}"
            raise ValueError(f"{file} has {counts}. Make both again, together.")
        return [lines[position] for position in self._positions]

    def _parse(self, line: str, where: str) -> tuple[str, int]:
        path, _, frames = line.partition("\t")
        if not path or not frames.strip().isdecimal() or len(frames.strip()) > len(str(_MAX_NUMBER)):
            form = "`relative/path<TAB>frames`, which each line but the first must be"
            raise ValueError(f"{where}: {line.strip()[:200]!r} is not {form}.")
        return _with_slashes(path, self.root), int(frames)

    def _check_headers(self, rows: list[tuple[str, int]]) -> int:
        """Compare some files with the manifest; return the sampling rate of the files."""
        rates: dict[int, str] = {}
        for file_name, frames in _spread(rows):
            num_samples, rate, _ = audio_info(self.root / file_name)
            if resampled_length(frames, rate) != num_samples:
                found = f"{num_samples:,} samples at 16 kHz (its own rate is {rate:,} Hz)"
                problem = f"{self._manifest}: {file_name} has {frames:,} frames there, but the file has {found}"
                raise ValueError(f"{problem}. Make the manifest again.")
            rates.setdefault(rate, file_name)
        if len(rates) > 1:
            shown = ", ".join(f"{file_name} {rate:,} Hz" for rate, file_name in rates.items())
            problem = (
                f"{self._manifest} has files of different rates ({shown}), so its frames do not say how long they"
            )
            raise ValueError(f"{problem} are. Give the folder instead of the manifest, or one manifest per rate.")
        return next(iter(rates), SAMPLING_RATE)

    def load(self, index: int, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        path = self.root / self._paths[self._positions[index]]
        return load_audio(path, start=start, num_samples=num_samples)


class _Entry(NamedTuple):
    """A line of a table: file, id and length (None: that of the file), or the seconds that `_in_samples` converts."""

    path: str
    id: str
    num_samples: int | None = None
    duration: Decimal | None = None
    offset: Decimal | None = None
    start: int = 0
    max_rest: float = 0  # samples that the file may have after it

    @property
    def is_part(self) -> bool:
        """Whether the table gives it a place in its file."""
        return self.offset is not None or self.max_rest == math.inf


def _root_of(entries: list[_Entry], folder: Path) -> Path:
    """Return what the paths are relative to: the table's folder or, as in Common Voice, `clips` in it."""

    def has_files(root: Path) -> bool:
        return any(os.path.exists(root / entry.path) for entry in _spread(entries))

    clips = folder / "clips"
    return clips if entries and not has_files(folder) and has_files(clips) else folder


class TableSource(SpeechSource):
    """
    A table of recordings: `.csv` or `.tsv` with column names in the first line, or `.jsonl` (`.json`) with an object
    per line.

    Columns:

    - `path`, `audio_filepath`, `file_name`, `audio` or `wav`, the first that exists, or the one that `audio_column`
      names: the file, relative to the table's folder, or absolute;
    - `num_frames` and `sampling_rate`, else `num_samples` (at 16 kHz), else `duration` (seconds): its length. If a
      line has none, the file's header is read;
    - `offset` (seconds), with `duration`: the part of the file that is the utterance;
    - `id`: the utterance's id, else the path, of a part with its offset: `talk.flac@12.5`. Duplicates get #2, #3, ...

    Other columns are only read by `labels`. So the `metadata.csv` of an audio folder is such a table, and so are the
    manifests of NeMo and the `.tsv` files of Common Voice, whose recordings are in the folder `clips` beside them.
    Where lengths are given, only 16 files, spread evenly, are opened: their headers must agree.

    Durations are often rounded. The most precise one of a table tells how many decimals can be trusted, and half a
    unit of the last decimal is left out at the end of each file, since it may not be there. With five decimals or more
    nothing is left out.

    Raises `ValueError` if lines cannot be parsed, there is no column of paths, headers disagree, or one of the 16
    files cannot be read.
    """

    def __init__(self, path: str | Path, audio_column: str = "audio") -> None:
        self._table, self.root = Path(path), Path(path).parent
        self._entries = _in_samples(list(_entries(self._table, path_columns(audio_column))))
        self.root = _root_of(self._entries, self.root)
        self._check_headers()
        ids = (entry.id for entry in self._entries)
        self._set_utterances(ids, self._lengths(), str(path))

    def labels(self, column: str | None = None) -> list[str | None]:
        """Read a column of the table, which is opened again; see `SpeechSource.labels`."""
        # All rows, since a line of JSON may leave a column out; twice, since one column is all that fits into memory.
        names = list(dict.fromkeys(name for _, row in _rows(self._table) for name in row))
        column = find_text_column(names, column, str(self._table))
        fields = [(number, row.get(column)) for number, row in _rows(self._table)]
        self._refuse_parts_without_offset(fields, column, names)
        kept = (fields[position] for position in self._positions)
        labels = [label_text(value, f"{self._table}, line {number}, {column}") for number, value in kept]
        return without_fractions(labels) if self._table.suffix.lower() in _TEXT_SUFFIXES else labels

    def _refuse_parts_without_offset(
        self, fields: Sequence[tuple[int, Any]], column: str, names: Sequence[str]
    ) -> None:
        """Raise `ValueError` if lines of the same file, of all of it, have different labels."""
        first: dict[str, tuple[int, Any]] = {}
        for entry, (number, value) in zip(self._entries, fields, strict=True):
            if entry.is_part or value in (None, ""):
                continue
            before, other = first.setdefault(entry.path, (number, value))
            if str(value) == str(other):
                continue
            own = [name for name in ("start", "end", "begin", "stop", "channel") if name in names]
            hint = f" Its columns {', '.join(own)} are not read." if own else ""
            raise ValueError(
                f"{self._table}, lines {before} and {number}: {printable_name(entry.path)} has two different values of"
                f" {column}.{hint} If the lines are parts of it, give each an offset and a duration, in seconds."
            )

    def unlisted(self) -> list[str]:
        """Return the audio files in the table's folder and below that the table does not name; hidden ones aside."""
        listed = {name_key(str(self.root / entry.path)) for entry in self._entries}
        found = find_files(self.root, *AUDIO_SUFFIXES).names
        return [name for name in found if name_key(str(self.root / name)) not in listed]

    def _lengths(self) -> list[int | AudioFileError]:
        unknown = [self.root / entry.path for entry in self._entries if entry.num_samples is None]
        headers = iter(read_lengths(unknown, lambda file: audio_info(file).num_samples, str(self._table)))
        empty = AudioFileError("Its table gives it no length but 0.", "empty")
        return [next(headers) if e.num_samples is None else e.num_samples or empty for e in self._entries]

    def _check_headers(self) -> None:
        """Compare some files with the table."""
        for entry in _spread([entry for entry in self._entries if entry.num_samples]):
            length = audio_info(self.root / entry.path).num_samples
            stop = entry.start + (entry.num_samples or 0)
            if not 0 <= length - stop <= entry.max_rest:
                problem = f"{self._table}: {entry.path} reaches to sample {stop:,} (at 16 kHz) there, but the file has"
                advice = "Make the table again, or leave its lengths out: headers are then read."
                raise ValueError(f"{problem} {length:,} samples. {advice}")

    def load(self, index: int, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        entry = self._entries[self._positions[index]]
        if num_samples is None and entry.num_samples is not None:
            num_samples = entry.num_samples - start
        return load_audio(self.root / entry.path, start=entry.start + start, num_samples=num_samples)


def path_columns(audio_column: str) -> tuple[str, ...]:
    """Return the columns that may have the paths of a table: the named one, or `PATH_COLUMNS` by default."""
    return PATH_COLUMNS if audio_column == "audio" else (audio_column,)


def names_paths(table: Path, audio_column: str = "audio") -> bool:
    """Return whether the first line of a `.csv` or `.jsonl` file, that of names, has one of `path_columns`."""
    lines = (remove_invisible(line).strip() for line in text_lines(table, errors="surrogateescape"))
    first = next((line for line in lines if line and not line.strip('"').startswith("sep=")), "")
    columns = "|".join(map(re.escape, path_columns(audio_column)))
    return re.search(rf'(?:^|[,;\t{{]) *"?(?:{columns})"? *(?:[,;\t:]|$)', first) is not None


def open_tsv(path: str | Path, audio_column: str = "audio") -> ManifestSource | TableSource:
    """Open a `.tsv`: a table, such as Common Voice's, if its first line names a column of paths; else a manifest."""
    names = next(text_lines(path, errors="surrogateescape"), "").split("\t")
    is_table = len(names) > 1 and set(path_columns(audio_column)) & set(names)
    return TableSource(path, audio_column) if is_table else ManifestSource(path)


def _in_samples(entries: list[_Entry]) -> list[_Entry]:
    """Convert durations and offsets, which may be wrong by half of the last decimal of the most precise one."""

    def decimals(value: Decimal | None) -> int:
        exponent = 0 if value is None else value.as_tuple().exponent
        return max(0, -exponent) if isinstance(exponent, int) else 0

    most = max((decimals(value) for entry in entries for value in (entry.duration, entry.offset)), default=0)
    unit = 2 * 10 ** min(_MAX_DECIMALS, most)  # in a second; a figure may be wrong by one of them

    def samples(units: int) -> int:  # rounded
        return (2 * units * SAMPLING_RATE + unit) // (2 * unit)

    def span(entry: _Entry) -> tuple[int, int]:
        first = int((entry.offset or 0) * unit)
        return first, first + int((entry.duration or 0) * unit)

    ends: dict[str, int] = defaultdict(int)  # units that a file has at least
    for entry in entries:
        ends[entry.path] = max(ends[entry.path], span(entry)[1] - (1 if entry.offset is None else 2))
    converted = []
    for entry in entries:
        if entry.duration is not None:
            first, last = span(entry)
            start, stop = samples(first), samples(min(last, ends[entry.path]))
            # A part may end before its file; a whole file may be longer only by what rounding can explain.
            max_rest = 2 * SAMPLING_RATE // unit + 2 if entry.offset is None else math.inf
            entry = _Entry(entry.path, entry.id, max(0, stop - start), start=start, max_rest=max_rest)
        converted.append(entry)
    return converted


def _entries(table: Path, columns: Sequence[str]) -> Iterator[_Entry]:
    column: str | None = None
    for number, row in _rows(table):
        column = column or next((candidate for candidate in columns if candidate in row), None)
        if column is None:
            names, wanted = ", ".join(map(str, row)), ", ".join(columns)
            rule = f"the paths must be in one of {wanted}. Rename it, or give its name as audio_column."
            raise ValueError(f"{table} has no column with paths of audio. Its columns are {names}; {rule}")
        where = f"{table}, line {number}"
        path, samples = row.get(column), None
        if not isinstance(path, str) or not path or set("\n\0") & set(path):
            raise ValueError(f"{where}: {column} is {path!r}, but must be the path of a file.")
        duration, offset = (_number(row, key, where) for key in ("duration", "offset"))
        if offset is None:
            keys = ("num_frames", "sampling_rate", "num_samples")
            frames, rate, samples = (_number(row, key, where, is_whole=True) for key in keys)
            if frames is not None and rate:
                samples = Decimal(resampled_length(int(frames), int(rate)))
        elif duration is None:
            raise ValueError(f"{where}: offset={offset} needs a duration, which says where the part ends.")
        path = _with_slashes(path, table.parent)
        part = path if offset is None else f"{path}@{offset:f}"  # labels of the whole file are not those of a part
        name = label_text(row.get("id"), f"{where}, id") or part
        yield _Entry(path, name, int(samples)) if samples is not None else _Entry(path, name, None, duration, offset)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the lines of a table, with their numbers."""
    suffix = path.suffix.lower()
    if suffix in _TEXT_SUFFIXES:
        yield from csv_rows(path, errors="surrogateescape", has_quotes=suffix == ".csv")
    else:
        yield from json_lines(path, errors="surrogateescape", decimals=True)


def _number(row: dict[str, Any], key: str, where: str, *, is_whole: bool = False) -> Decimal | None:
    given = row.get(key)
    if given in (None, ""):
        return None
    try:
        value = Decimal(given)
        is_valid = value.is_finite() and 0 <= value <= _MAX_NUMBER and not (is_whole and value % 1)
    except (InvalidOperation, TypeError, ValueError):
        is_valid = False
    if not is_valid or isinstance(given, bool):
        given = str(given) if isinstance(given, Decimal) else given
        kind = "a whole number" if is_whole else "a number"
        raise ValueError(f"{where}: {key} is {given!r}, but must be {kind} of at least 0 and at most {_MAX_NUMBER:,}.")
    return value
