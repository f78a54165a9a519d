"""
Where utterances come from: what all sources have in common; folders and `datasets`. Headers are read once, audio when
it is asked for.

Nothing is decoded to disk. `S` samples at 16 kHz.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from .audio import AudioFileError, audio_info, load_audio, read_resampled, require, resampled_length

logger = logging.getLogger(__name__)

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3")

# Columns that may have what was said; the first one that exists has it.
TEXT_COLUMNS = ("transcription", "transcript", "text", "sentence", "normalized_text", "raw_text")

Item = TypeVar("Item")


class Utterance(NamedTuple):
    """An utterance: its id, unique within its source, and its length in samples at 16 kHz."""

    id: str
    num_samples: int


class SpeechSource(ABC):
    """
    A list of utterances and a way to their samples. Picklable, for the workers of a `DataLoader`.

    Attributes:
        utterances: In a fixed order; masks and crops depend on the ids, so that a corpus can be moved.
        skipped: Reason -> ids of what was left out.
    """

    utterances: list[Utterance]
    skipped: dict[str, list[str]]

    def __len__(self) -> int:
        return len(self.utterances)

    @abstractmethod
    def load(self, index: int, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        """
        Samples of utterance `index`, or of a part of it, which is all that is read.

        Returns:
            float32 (S,) at 16 kHz.

        Raises:
            AudioFileError: If the audio has gone bad or is shorter than was listed.
        """

    def labels(self, column: str | None = None) -> list[str | None]:
        """
        What was said, or whatever else is known of each utterance.

        Args:
            column: Where it stands; None: where transcripts usually do.

        Returns:
            One text an utterance, in their order; None where there is none.

        Raises:
            ValueError: If this kind of source has no labels, or there is no such column.
        """
        raise ValueError(
            f"{type(self).__name__} has recordings only. Transcripts come with a folder that has metadata.csv or"
            " LibriSpeech's .trans.txt files, with a table (.csv, .jsonl), a .tsv manifest with a .wrd file beside it,"
            " or a dataset."
        )

    def _keep(self, lengths: Iterable[tuple[str, int | AudioFileError]], name: str) -> list[int]:
        """Fill `utterances` and `skipped` from (id, length or error); returns the positions of those kept."""
        self.utterances, self.skipped = [], {}
        kept: list[int] = []
        example = ""
        for position, (utterance_id, length) in enumerate(lengths):
            if isinstance(length, AudioFileError):
                example = example or str(length)
                self.skipped.setdefault(length.reason, []).append(utterance_id)
            else:
                self.utterances.append(Utterance(utterance_id, length))
                kept.append(position)
        num_skipped = sum(map(len, self.skipped.values()))
        if num_skipped:
            counts = ", ".join(f"{len(ids):,} {reason}" for reason, ids in sorted(self.skipped.items()))
            text = f"{name}: {num_skipped:,} of {num_skipped + len(kept):,} recordings left out ({counts}). {example}"
            if not kept:
                raise ValueError(text)
            logger.warning(text)
        if not kept:
            raise ValueError(f"{name} has no utterances.")
        return kept


def _scan(items: Sequence[Item], length_of: Callable[[Item], int], name: str) -> list[int | AudioFileError]:
    """Length of each item or why it has none, read by several threads; with a progress bar on a terminal."""
    tqdm = require("tqdm").tqdm

    def scan_one(item: Item) -> int | AudioFileError:
        try:
            return length_of(item)
        except AudioFileError as error:
            return error

    # Headers are waited for rather than computed (network disks), so more threads than cores.
    with ThreadPool(min(32, 4 * (os.cpu_count() or 1))) as pool:
        lengths = pool.imap(scan_one, items, chunksize=32)
        return list(tqdm(lengths, f"Reading headers of {name}", len(items), disable=None, delay=2, unit=" files"))


def read_lines(file: Path) -> list[str]:
    """
    Lines of a file of transcripts, without their ends.

    Raises:
        ValueError: If it is not UTF-8.
    """
    try:
        with open(file, encoding="utf-8-sig") as lines:
            return [line.rstrip("\n") for line in lines]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}). Save it in that encoding.") from error


def find_text_column(columns: Sequence[str], column: str | None, name: str) -> str:
    """
    The column of labels: the one that is asked for, else the first of `TEXT_COLUMNS` that exists.

    Raises:
        ValueError: If there is none; the message has the columns that exist.
    """
    if column is not None and column in columns:
        return column
    found = None if column is not None else next((known for known in TEXT_COLUMNS if known in columns), None)
    if found is None:
        wanted = f"column {column!r}" if column is not None else f"column of transcripts ({', '.join(TEXT_COLUMNS)})"
        raise ValueError(f"{name} has no {wanted}. It has {', '.join(columns) or 'none'}: name one of them.")
    return found


def _number_repeats(names: Iterable[str]) -> list[str]:
    """The same names, later occurrences of a name with #2, #3, ... behind it."""
    seen: Counter[str] = Counter()
    numbered = []
    for name in names:
        seen[name] += 1
        numbered.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return numbered


def _find_audio(root: Path) -> Iterator[str]:
    """Relative paths (with /) of audio files in a folder and below, hidden files too; symbolic links are followed."""
    visited = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # by a link
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        prefix = os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        prefix = "" if prefix == "./" else prefix
        yield from (prefix + name for name in names if name.lower().endswith(AUDIO_SUFFIXES))


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


class FolderSource(SpeechSource):
    """
    All audio files (wav, flac, ogg, opus, mp3; any rate, any channels) in a folder and below.

    An utterance's id is its path relative to the folder. Hidden folders are not looked into; hidden files (which macOS
    leaves on foreign disks) are skipped and counted.

    Args:
        path: The folder. All headers are read once, in threads.

    Raises:
        ValueError: If it is no folder or has no readable audio.
    """

    def __init__(self, path: str | Path) -> None:
        self.root = Path(path)
        if not self.root.is_dir():
            raise ValueError(f"{path} is not a folder. Give a folder that has audio files in it or below it.")
        found = sorted(_find_audio(self.root))
        names = [name for name in found if not _is_hidden(name)]
        if not names:
            raise ValueError(f"{path} has no audio files in it or below it. Looked for {', '.join(AUDIO_SUFFIXES)}.")
        lengths = _scan(names, lambda name: audio_info(self.root / name).num_samples, str(path))
        self._keep(zip(names, lengths, strict=True), str(path))
        if len(found) > len(names):
            self.skipped["hidden"] = [name for name in found if _is_hidden(name)]

    def labels(self, column: str | None = None) -> list[str | None]:
        """From the `.trans.txt` files of LibriSpeech and Libri-light, `id text` a line; see `SpeechSource.labels`."""
        transcripts: dict[str, str] = {}
        for file in sorted(self.root.rglob("*.trans.txt")):
            folder = file.parent.relative_to(self.root)
            for line in read_lines(file):
                utterance_id, _, text = line.strip().partition(" ")
                # Those beside a recording come first: names are unique in LibriSpeech, but need not be elsewhere.
                transcripts[(folder / utterance_id).as_posix()] = text
                transcripts.setdefault(utterance_id, text)
        if column is not None or not transcripts:
            problem = f"column={column!r}: {self.root}" if column is not None else str(self.root)
            raise ValueError(
                f"{problem} has no table of transcripts: neither metadata.csv or metadata.jsonl in it, nor"
                " .trans.txt files below it. Write `file_name,transcription` lines to metadata.csv there."
            )
        paths = [Path(utterance.id).with_suffix("") for utterance in self.utterances]
        return [transcripts.get(path.as_posix(), transcripts.get(path.name)) for path in paths]

    def load(self, index: int, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        """See `SpeechSource.load`."""
        return load_audio(self.root / self.utterances[index].id, start=start, num_samples=num_samples)


class FileSource(FolderSource):
    """
    Audio files that are named one by one.

    An utterance's id is its path relative to the lowest folder that has all of them.

    Args:
        paths: The files. One that is named twice counts once.

    Raises:
        ValueError: If there are none, or none of them is readable audio.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        files = list(dict.fromkeys(os.path.abspath(path) for path in paths))
        if not files:
            raise ValueError("There are no files. Name at least one.")
        self.root = Path(os.path.commonpath([os.path.dirname(file) for file in files]))
        names = [os.path.relpath(file, self.root).replace(os.sep, "/") for file in files]
        lengths = _scan(names, lambda name: audio_info(self.root / name).num_samples, f"{len(names)} files")
        self._keep(zip(names, lengths, strict=True), "The files")


class DatasetSource(SpeechSource):
    """
    A `datasets.Dataset` with a column of audio.

    Accepted are `Audio` columns (files or their bytes, decoded by `load_audio`, never by torchcodec), columns of paths
    or of files' bytes, `{"array", "sampling_rate"}` as in the synthetic corpus, and lists of floats. The samples of a
    part are the only ones touched. An utterance's id is its `id` if there is such a column, else its row number.

    Args:
        dataset: A map-style `datasets.Dataset`.
        audio_column: Name of the column.
        sampling_rate: Of lists of floats, Hz; the other kinds know their own.

    Raises:
        ValueError: If the dataset is of another kind, lacks the column or has something else in it.
        ImportError: Without `datasets`.
    """

    def __init__(self, dataset: Any, audio_column: str = "audio", *, sampling_rate: int | None = None) -> None:
        datasets = require("datasets")
        if not isinstance(dataset, datasets.Dataset):
            choice = f": choose one of its splits, {', '.join(dataset)}" if isinstance(dataset, dict) else ""
            raise ValueError(f"A map-style datasets.Dataset is needed, not {type(dataset).__name__}{choice}.")
        if audio_column not in dataset.column_names:
            raise ValueError(
                f"audio_column={audio_column!r} is not a column of the dataset, which has"
                f" {', '.join(dataset.column_names)}. Name the one that has the audio."
            )
        # Arrow rows are what is stored: nothing is decoded on the way to them.
        self._rows = dataset.select_columns([audio_column]).with_format("arrow")
        self._others = dataset.remove_columns([audio_column])
        self._sampling_rate = sampling_rate
        self._kind = _audio_kind(self._rows.features.arrow_schema.field(audio_column).type, audio_column)
        if (self._kind == "samples") != (sampling_rate is not None):
            raise ValueError(
                f"sampling_rate={sampling_rate}, but the column {audio_column!r} has {self._kind}: sampling_rate is"
                " for columns of plain lists of floats, and they need it."
            )
        names = map(str, range(len(dataset)))
        if "id" in dataset.column_names:
            names = map(str, dataset.select_columns(["id"]).with_format(None)["id"])
        self._positions = self._keep(zip(_number_repeats(names), self._lengths(), strict=True), "The dataset")

    def _lengths(self) -> Iterable[int | AudioFileError]:
        compute = require("pyarrow.compute")
        if self._kind == "files":
            # Headers are looked at where the bytes lie, in the memory-mapped file.
            return _scan(range(len(self._rows)), lambda row: audio_info(self._file(row)).num_samples, "the dataset")
        missing = AudioFileError("The row has no samples.", "empty")
        lengths: list[int | AudioFileError] = []
        for first in range(0, len(self._rows), 256):
            column = self._rows[first : first + 256].column(0)
            if self._kind == "arrays":
                rates = compute.struct_field(column, "sampling_rate").to_pylist()
                column = compute.struct_field(column, "array")
            else:
                rates = [self._sampling_rate] * len(column)
            for num_frames, rate in zip(compute.list_value_length(column).to_pylist(), rates, strict=True):
                lengths.append((resampled_length(num_frames, int(rate)) if num_frames and rate else 0) or missing)
        return lengths

    def labels(self, column: str | None = None) -> list[str | None]:
        """From a column of text, numbers or class labels, which become their names; see `SpeechSource.labels`."""
        column = find_text_column(self._others.column_names, column, "The dataset")
        values = self._others.select_columns([column]).with_format(None)[column]
        feature = self._others.features[column]
        if hasattr(feature, "int2str"):  # a ClassLabel, whose missing values are None or -1
            names = [None if value is None or value < 0 else feature.int2str(value) for value in values]
        else:
            names = [None if value is None else str(value) for value in values]
        return [names[position] for position in self._positions]

    def _value(self, row: int) -> Any:
        return self._rows[row].column(0)[0]

    def _file(self, row: int) -> Any:
        """Path, or file object on the bytes, of a row."""
        stored = _stored_file(self._value(row))
        return stored if isinstance(stored, str) else require("pyarrow").BufferReader(stored)

    def load(self, index: int, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        """See `SpeechSource.load`."""
        name, row = self.utterances[index].id, self._positions[index]
        try:
            if self._kind == "files":
                return load_audio(self._file(row), start=start, num_samples=num_samples)
            value, rate = self._value(row), self._sampling_rate
            if self._kind == "arrays":
                value, rate = value["array"], int(value["sampling_rate"].as_py())
            assert rate is not None
            samples = value.values  # an Arrow view, not yet of Python numbers
            return read_resampled(
                lambda first, count: samples.slice(first, count).to_numpy(zero_copy_only=False),
                len(samples),
                rate,
                start=start,
                num_samples=num_samples,
            )
        except AudioFileError as error:
            raise AudioFileError(f"Utterance {name}: {error}", error.reason) from error


def _stored_file(value: Any) -> Any:
    """What an Arrow scalar of a column of "files" stores: a buffer of the file's bytes, or its path as a string."""
    pa = require("pyarrow")
    fields = [value]
    if pa.types.is_struct(value.type):
        fields = [value[name] for name in ("bytes", "path") if value.is_valid and name in value.type.names]
    for field in fields:
        if field.is_valid and not pa.types.is_null(field.type):
            is_path = pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
            return field.as_py() if is_path else field.as_buffer()
    raise AudioFileError("The row has neither bytes nor a path.", "missing")


def _audio_kind(arrow_type: Any, column: str) -> str:
    """What a column of this Arrow type holds: "files", "arrays" or "samples"."""
    pa = require("pyarrow")

    def is_samples(kind: Any) -> bool:
        return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_floating(kind.value_type)

    if pa.types.is_struct(arrow_type):
        names = set(arrow_type.names)
        if {"array", "sampling_rate"} <= names and is_samples(arrow_type.field("array").type):
            return "arrays"
        if names & {"bytes", "path"}:
            return "files"
    is_text = pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type)
    if is_text or pa.types.is_binary(arrow_type) or pa.types.is_large_binary(arrow_type):
        return "files"
    if is_samples(arrow_type):
        return "samples"
    raise ValueError(
        f"The column {column!r} is {arrow_type}, which is not audio. Audio is an Audio column, paths, bytes of files,"
        ' {"array": list of floats, "sampling_rate": int}, or a list of floats.'
    )
