"""
Sources of utterances: the interface that all share, folders, and `datasets`.

Headers are read once, audio when it is asked for; nothing is decoded to disk. `S` samples at 16 kHz.
"""

import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from .audio import AudioFileError, AudioInput, Samples, audio_info, load_audio, require

logger = logging.getLogger(__name__)

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3")

# Names of columns with transcripts; the first one that exists is used.
TEXT_COLUMNS = ("transcription", "transcript", "text", "sentence", "normalized_text", "raw_text")

Item = TypeVar("Item")
Result = TypeVar("Result")


class Utterance(NamedTuple):
    """An utterance: its id, unique within its source, and its length in samples at 16 kHz."""

    id: str
    num_samples: int


class SpeechSource(ABC):
    """
    A list of utterances, and a method that reads their samples. Picklable, for the workers of a `DataLoader`.

    Attributes:
        utterances: In a fixed order. Masks and crops depend on the ids, so a corpus can be moved.
        skipped: Ids of what was left out, by reason.
    """

    utterances: list[Utterance]
    skipped: dict[str, list[str]]
    _positions: list[int]

    def __len__(self) -> int:
        return len(self.utterances)

    @abstractmethod
    def load(self, index: int, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        """
        Read utterance `index`, or only a part of it, float32 (S,) at 16 kHz.

        Raises `AudioFileError` if the audio cannot be read or is shorter than was listed.
        """

    def labels(self, column: str | None = None) -> list[str | None]:
        """
        Return the transcript, or another label, of each utterance, in their order; None where there is none.

        Raises `ValueError` if this kind of source has no labels, or no such `column` (None: that of transcripts).
        """
        raise ValueError(
            f"{type(self).__name__} has no transcripts. Give a folder with metadata.csv or LibriSpeech's .trans.txt"
            " files, a table (.csv, .jsonl), a .tsv manifest with a .wrd file beside it, or a dataset."
        )

    def _set_utterances(self, names: Iterable[str], lengths: Iterable[int | AudioFileError], name: str) -> None:
        """Fill `utterances`, `skipped`, and the `_positions` of utterances in `lengths`. Repeated names get #2, ..."""
        self.utterances, self.skipped, self._positions = [], {}, []
        seen: Counter[str] = Counter()
        example = ""
        for position, (given, length) in enumerate(zip(names, lengths, strict=True)):
            seen[given] += 1
            utterance_id = given if seen[given] == 1 else f"{given}#{seen[given]}"
            if isinstance(length, AudioFileError):
                example = example or str(length)
                self.skipped.setdefault(length.reason, []).append(utterance_id)
            else:
                self.utterances.append(Utterance(utterance_id, length))
                self._positions.append(position)
        if self.skipped:
            counts = ", ".join(f"{len(ids):,} {reason}" for reason, ids in sorted(self.skipped.items()))
            num_skipped = sum(map(len, self.skipped.values()))
            if not self.utterances:
                raise ValueError(f"{name}: none of {num_skipped:,} recordings can be read ({counts}): {example}")
            logger.warning(f"{name}: {num_skipped:,} of {seen.total():,} recordings left out ({counts}). {example}")
        elif not self.utterances:
            raise ValueError(f"{name} has no utterances.")


def map_in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], description: str, *, show_progress: bool = True
) -> list[Result]:
    """Call `function` for each item, in more threads than cores: reading headers is mostly waiting (network disks)."""
    disable = None if show_progress else True  # None: unless this is not a terminal
    with ThreadPool(min(32, 4 * (os.cpu_count() or 1))) as pool:
        results = pool.imap(function, items, chunksize=16)
        return list(require("tqdm").tqdm(results, description, len(items), disable=disable, delay=2, unit=" files"))


def read_lengths(items: Sequence[Item], length_of: Callable[[Item], int], name: str) -> list[int | AudioFileError]:
    """Return the length of each item, or the error that says why it has none."""

    def length_or_error(item: Item) -> int | AudioFileError:
        try:
            return length_of(item)
        except AudioFileError as error:
            return error

    return map_in_threads(length_or_error, items, f"{name}: reading headers")


def read_lines(file: Path) -> list[str]:
    """Return the lines of a file of transcripts, without line ends. Raises `ValueError` if it is not UTF-8."""
    try:
        with open(file, encoding="utf-8-sig") as lines:
            return [line.rstrip("\n") for line in lines]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}). Save it in that encoding.") from error


def find_text_column(columns: Sequence[str], column: str | None, name: str) -> str:
    """Return `column`, or if None the first of `TEXT_COLUMNS` that exists. Raises `ValueError` if there is none."""
    found = next((known for known in (TEXT_COLUMNS if column is None else [column]) if known in columns), None)
    if found is None:
        wanted = f"column {column!r}" if column is not None else f"column of transcripts ({', '.join(TEXT_COLUMNS)})"
        raise ValueError(f"{name} has no {wanted}. Its columns are {', '.join(columns) or 'none'}: name one of them.")
    return found


def find_audio_files(root: Path) -> Iterator[str]:
    """Yield relative paths (with /) of audio files, also hidden ones, in a folder and below; links are followed."""
    visited = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # by a link
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        below = Path(folder).relative_to(root)
        yield from ((below / name).as_posix() for name in names if name.lower().endswith(AUDIO_SUFFIXES))


def list_audio_files(folder: Path) -> list[str]:
    """Return the paths of `find_audio_files`, sorted. Raises `ValueError` if there are none, or no such folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Give a folder that has audio files in it or below it.")
    names = sorted(find_audio_files(folder))
    if not names:
        raise ValueError(f"{folder} has no audio files in it or below it. Looked for {', '.join(AUDIO_SUFFIXES)}.")
    return names


def is_hidden(path: str) -> bool:
    """Return whether the file name in a path (with /) begins with a dot."""
    return path.rpartition("/")[2].startswith(".")


class FolderSource(SpeechSource):
    """
    All audio files (wav, flac, ogg, opus, mp3; any rate, any number of channels) in a folder and below.

    An utterance's id is its path relative to the folder. All headers are read once, in threads. Hidden folders are not
    searched; hidden files (which macOS leaves on foreign disks) are skipped and counted. Raises `ValueError` if `path`
    is not a folder or has no readable audio.
    """

    def __init__(self, path: str | Path) -> None:
        found = list_audio_files(Path(path))
        self._set_files(Path(path), [name for name in found if not is_hidden(name)], str(path))
        if hidden := [name for name in found if is_hidden(name)]:
            self.skipped["hidden"] = hidden

    def _set_files(self, root: Path, names: list[str], name: str) -> None:
        self.root = root
        lengths = read_lengths(names, lambda file: audio_info(root / file).num_samples, name)
        self._set_utterances(names, lengths, name)

    def labels(self, column: str | None = None) -> list[str | None]:
        """Read the `.trans.txt` files of LibriSpeech and Libri-light, `id text` a line; see `SpeechSource.labels`."""
        transcripts: dict[str, str] = {}
        for file in sorted(self.root.rglob("*.trans.txt")):
            folder = file.parent.relative_to(self.root)
            for line in read_lines(file):
                utterance_id, _, text = line.strip().partition(" ")
                # A transcript beside the recording takes precedence: names are unique in LibriSpeech, maybe not here.
                transcripts[(folder / utterance_id).as_posix()] = text
                transcripts.setdefault(utterance_id, text)
        if column is not None or not transcripts:
            wanted = "transcripts: no .trans.txt files below it and" if column is None else f"column {column!r}:"
            raise ValueError(
                f"{self.root} has no {wanted} no metadata.csv or metadata.jsonl in it. Write"
                f" `file_name,{column or 'transcription'}` lines to metadata.csv there."
            )
        paths = [Path(utterance.id).with_suffix("") for utterance in self.utterances]
        return [transcripts.get(path.as_posix(), transcripts.get(path.name)) for path in paths]

    def load(self, index: int, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        return load_audio(self.root / self.utterances[index].id, start=start, num_samples=num_samples)


class FileSource(FolderSource):
    """
    Audio files given one by one; duplicates are ignored.

    An utterance's id is its path below the lowest folder that contains all of them. Raises `ValueError` if none of
    them is readable audio.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        files = list(dict.fromkeys(os.path.abspath(path) for path in paths))
        if not files:
            raise ValueError("There are no files. Name at least one.")
        root = Path(os.path.commonpath([os.path.dirname(file) for file in files]))
        self._set_files(root, [Path(file).relative_to(root).as_posix() for file in files], "The files")


def check_dataset(dataset: Any, class_name: str) -> None:
    """Raise `ValueError` if an object is not of this class of `datasets`."""
    if not isinstance(dataset, getattr(require("datasets"), class_name)):
        choice = f": choose one of its splits, {', '.join(dataset)}" if isinstance(dataset, dict) else ""
        raise ValueError(f"A datasets.{class_name} is needed, not {type(dataset).__name__}{choice}.")


def check_column(audio_column: str, columns: Sequence[str]) -> None:
    """Raise `ValueError` if there is no such column."""
    if audio_column not in columns:
        problem = f"audio_column={audio_column!r} is not a column of the dataset, which has {', '.join(columns)}"
        raise ValueError(f"{problem}. Name the one that has the audio.")


def kind_of_audio(arrow_type: Any, column: str, sampling_rate: int | None) -> str:
    """Return what a column of an Arrow type stores: "files", "arrays" (with their rates) or "samples" (lists)."""
    types = require("pyarrow").types

    def is_samples(kind: Any) -> bool:
        return (types.is_list(kind) or types.is_large_list(kind)) and types.is_floating(kind.value_type)

    fields = set(arrow_type.names) if types.is_struct(arrow_type) else set()
    scalars = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    if {"array", "sampling_rate"} <= fields and is_samples(arrow_type.field("array").type):
        kind = "arrays"
    elif fields & {"bytes", "path"} or any(is_kind(arrow_type) for is_kind in scalars):
        kind = "files"
    elif is_samples(arrow_type):
        kind = "samples"
    else:
        raise ValueError(
            f"The column {column!r} is {arrow_type}, which is not audio. Audio is an Audio column, paths, bytes of"
            ' files, {"array": list of floats, "sampling_rate": int}, or a list of floats.'
        )
    if (kind == "samples") != (sampling_rate is not None):
        rule = "sampling_rate must be given for lists of floats, and only for them"
        raise ValueError(f"sampling_rate={sampling_rate}, but the column {column!r} has {kind}: {rule}.")
    return kind


def stored_audio(value: Any, kind: str, sampling_rate: int | None) -> Any:
    """Return what an Arrow scalar of such a column stores, without a copy: a path, a file object, or `Samples`."""
    pa = require("pyarrow")
    if kind == "files":
        fields = [value]
        if pa.types.is_struct(value.type):
            fields = [value[name] for name in ("bytes", "path") if value.is_valid and name in value.type.names]
        for field in fields:
            if field.is_valid:
                is_path = pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
                return field.as_py() if is_path else pa.BufferReader(field.as_buffer())
        raise AudioFileError("The row has neither bytes nor a path.", "missing")
    if kind == "arrays" and value.is_valid:
        value, sampling_rate = value["array"], value["sampling_rate"].as_py()
    if not value.is_valid or not sampling_rate:
        raise AudioFileError("The row has no samples.", "empty")
    return Samples(value.values.to_numpy(zero_copy_only=False), int(sampling_rate))


class StoredSource(SpeechSource):
    """Utterances whose audio is stored in rows."""

    @abstractmethod
    def _stored(self, row: int) -> AudioInput: ...

    def load(self, index: int, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        try:
            return load_audio(self._stored(self._positions[index]), start=start, num_samples=num_samples)
        except AudioFileError as error:
            raise AudioFileError(f"Utterance {self.utterances[index].id}: {error}", error.reason) from error


class DatasetSource(StoredSource):
    """
    A `datasets.Dataset` with a column of audio.

    The column can be of `Audio` (files or their bytes, decoded by `load_audio`, never by torchcodec), paths, bytes of
    files, `{"array", "sampling_rate"}` as in the synthetic corpus, or lists of floats. Only the samples of a requested
    part are touched. An utterance's id is its `id` if there is such a column, else its row number.

    Args:
        dataset: A map-style `datasets.Dataset`.
        audio_column: Name of the column of audio.
        sampling_rate: Sampling rate of lists of floats, Hz; required for them, and for them only.

    Raises `ValueError` if the dataset is of another kind, lacks the column or has something else in it, and
    `ImportError` if `datasets` is not installed.
    """

    def __init__(self, dataset: Any, audio_column: str = "audio", *, sampling_rate: int | None = None) -> None:
        check_dataset(dataset, "Dataset")
        check_column(audio_column, dataset.column_names)
        # In Arrow format rows are what is stored: nothing is decoded.
        self._rows = dataset.select_columns([audio_column]).with_format("arrow")
        self._others = dataset.remove_columns([audio_column])
        self._sampling_rate = sampling_rate
        column_type = self._rows.features.arrow_schema.field(audio_column).type
        self._kind = kind_of_audio(column_type, audio_column, sampling_rate)
        names = self._column("id") if "id" in self._others.column_names else range(len(dataset))
        lengths = read_lengths(
            range(len(dataset)), lambda row: audio_info(self._stored(row)).num_samples, "The dataset"
        )
        self._set_utterances(map(str, names), lengths, "The dataset")

    def _column(self, name: str) -> Any:
        return self._others.select_columns([name]).with_format(None)[name]

    def labels(self, column: str | None = None) -> list[str | None]:
        """Read a column of text, numbers or class labels, as their names; see `SpeechSource.labels`."""
        column = find_text_column(self._others.column_names, column, "The dataset")
        values, feature = list(self._column(column)), self._others.features[column]
        is_class = hasattr(feature, "int2str")  # a ClassLabel, where -1 is a missing value
        name_of, missing = (feature.int2str, (None, -1)) if is_class else (str, (None,))
        return [None if values[row] in missing else name_of(values[row]) for row in self._positions]

    def _stored(self, row: int) -> AudioInput:
        return stored_audio(self._rows[row].column(0)[0], self._kind, self._sampling_rate)
