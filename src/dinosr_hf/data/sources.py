"""
Sources of utterances: the interface that all share, folders, and `datasets`.

Headers are read once, audio when it is asked for; nothing is decoded to disk. `S` samples at 16 kHz.
"""

import logging
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from ..utils.names import printable_name, unique_names
from .audio import SAMPLING_RATE, AudioFileError, AudioInput, Samples, about, audio_info, load_audio, require
from .finding import find_audio
from .label_text import label_text
from .transcript_files import read_transcripts

logger = logging.getLogger(__name__)

# Names of columns with transcripts; the first one that exists is used.
TEXT_COLUMNS = ("transcription", "transcript", "text", "sentence", "normalized_text", "raw_text")

Item = TypeVar("Item")
Result = TypeVar("Result")


class Utterance(NamedTuple):
    """An utterance: its id, a line of text, unique within its source, and its length in samples at 16 kHz."""

    id: str
    num_samples: int


class NoLabelsError(ValueError):
    """A source has no labels, or none of the name that was asked for."""


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

        Raises `NoLabelsError` if this kind of source has none, or no such `column` (None: that of transcripts), and
        `ValueError` if one cannot be read, or is neither text nor a number.
        """
        raise NoLabelsError(
            f"{type(self).__name__} has no transcripts. Give a folder with metadata.csv or LibriSpeech's .trans.txt"
            " files, a table (.csv, .jsonl), a .tsv manifest with a .wrd file beside it, or a dataset."
        )

    @property
    def ids(self) -> list[str]:
        """Ids of the utterances, in their order."""
        return [utterance.id for utterance in self.utterances]

    @property
    def left_out(self) -> dict[str, str]:
        """Reason for each id in `skipped`, without hidden files, which are copies or no recordings."""
        return {name: reason for reason, names in self.skipped.items() if reason != "hidden" for name in names}

    @property
    def others(self) -> list[str]:
        """Ids of further recordings of the same data, whose labels may be among those of the utterances."""
        return list(self.left_out)

    @property
    def seconds(self) -> float:
        """Length of all utterances together."""
        return self.seconds_of(range(len(self)))

    def seconds_of(self, indices: Iterable[int]) -> float:
        """Return the length of some utterances together."""
        return sum(self.utterances[index].num_samples for index in indices) / SAMPLING_RATE

    def _set_utterances(self, names: Iterable[str], lengths: Iterable[int | AudioFileError], name: str) -> None:
        """
        Fill `utterances`, `skipped`, and the `_positions` of utterances in `lengths`.

        Ids are the names, `printable_name`, numbered by `unique_names`: the same whatever is skipped.
        """
        self.utterances, self.skipped, self._positions = [], {}, []
        ids = unique_names(map(printable_name, names))
        examples: dict[str, str] = {}  # one a reason, but one for all of "unsupported .m4a", "unsupported .amr", ...
        for position, (utterance_id, length) in enumerate(zip(ids, lengths, strict=True)):
            if isinstance(length, AudioFileError):
                examples.setdefault(length.reason.split()[0], str(length))
                self.skipped.setdefault(length.reason, []).append(utterance_id)
            else:
                self.utterances.append(Utterance(utterance_id, length))
                self._positions.append(position)
        if self.skipped:
            counts = ", ".join(f"{len(ids):,} {reason}" for reason, ids in sorted(self.skipped.items()))
            num_skipped = sum(map(len, self.skipped.values()))
            example = " ".join(examples.values())
            if not self.utterances:
                raise ValueError(f"{name}: none of {num_skipped:,} recordings can be read ({counts}): {example}")
            logger.warning(f"{name}: {num_skipped:,} of {len(ids):,} recordings left out ({counts}). {example}")
        elif not self.utterances:
            raise ValueError(f"{name} has no utterances.")


def map_in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], description: str, *, show_progress: bool = True
) -> list[Result]:
    """Call `function` for each item, in more threads than cores: reading headers is mostly waiting (network disks)."""
    disable = None if show_progress else True  # None: unless this is not a terminal
    with ThreadPool(min(32, 4 * (os.cpu_count() or 1))) as pool:
        results = pool.imap(function, items, chunksize=16)
        return list(tqdm(results, description, len(items), disable=disable, delay=2, unit=" files"))


def read_lengths(items: Sequence[Item], length_of: Callable[[Item], int], name: str) -> list[int | AudioFileError]:
    """Return the length of each item, or the error that says why it has none."""

    def length_or_error(item: Item) -> int | AudioFileError:
        try:
            return length_of(item)
        except AudioFileError as error:
            return error

    return map_in_threads(length_or_error, items, f"{name}: reading headers")


def find_text_column(columns: Sequence[str], column: str | None, name: str) -> str:
    """Return `column`, or if None the first of `TEXT_COLUMNS` that exists. Raises `ValueError` if there is none."""
    found = next((known for known in (TEXT_COLUMNS if column is None else [column]) if known in columns), None)
    if found is None:
        wanted = f"column {column!r}" if column is not None else f"column of transcripts ({', '.join(TEXT_COLUMNS)})"
        shown = ", ".join(columns) or "none"
        raise NoLabelsError(f"{name} has no {wanted}. Its columns are {shown}: name one of them.")
    return found


class FolderSource(SpeechSource):
    """
    All audio files (any kind that libsndfile reads, any rate, any number of channels) in a folder and below.

    An utterance's id is its path relative to the folder. All headers are read once, in threads. Hidden files (which
    macOS leaves on foreign disks) and files in hidden folders are skipped and counted, and so is audio of kinds that
    libsndfile cannot read, such as m4a. Raises `ValueError` if `path` is not a folder or has no readable audio.
    """

    def __init__(self, path: str | Path) -> None:
        found = find_audio(path)
        self._set_files(Path(path), found.names, str(path))
        if found.hidden:
            self.skipped["hidden"] = [*map(printable_name, found.hidden)]

    def _set_files(self, root: Path, names: list[str], name: str) -> None:
        self.root, self._names = root, names
        lengths = read_lengths(names, lambda file: audio_info(root / file).num_samples, name)
        self._set_utterances(names, lengths, name)

    def labels(self, column: str | None = None) -> list[str | None]:
        """Read the transcripts below the folder; see `read_transcripts` and `SpeechSource.labels`."""
        transcripts = None if column is not None else read_transcripts(self.root, self._names)
        if transcripts is None:
            files = "no .trans.txt or transcripts.txt below it and"
            wanted = f"transcripts: {files}" if column is None else f"column {column!r}:"
            raise NoLabelsError(
                f"{self.root} has no {wanted} no metadata.csv or metadata.jsonl with paths. Write"
                f" `file_name,{column or 'transcription'}` lines to metadata.csv there."
            )
        return [transcripts[position] for position in self._positions]

    def path(self, index: int) -> Path:
        """Return the path of the file of utterance `index`."""
        return self.root / self._names[self._positions[index]]

    def load(self, index: int, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        return load_audio(self.path(index), start=start, num_samples=num_samples)


class FileSource(FolderSource):
    """
    Audio files, and those in folders, given one by one; duplicates are ignored.

    An utterance's id is its path below the lowest folder that contains all of them. Raises `ValueError` if none of
    them is readable audio, or a folder has none.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        files: list[str] = []
        hidden: list[str] = []
        for path in map(os.path.abspath, paths):
            found = find_audio(path) if os.path.isdir(path) else None
            files += [path] if found is None else [os.path.join(path, name) for name in found.names]
            hidden += [] if found is None else [os.path.join(path, name) for name in found.hidden]
        if not files:
            raise ValueError("There are no files. Name at least one.")
        files = list(dict.fromkeys(files))
        root = Path(os.path.commonpath([os.path.dirname(file) for file in files]))
        self._set_files(root, [Path(file).relative_to(root).as_posix() for file in files], "The files")
        if hidden:
            self.skipped["hidden"] = sorted(map(printable_name, set(hidden)))


@contextmanager
def dataset_errors(name: str) -> Iterator[None]:
    """
    Raise errors of `datasets` in the body as one line that begins with the data's name and says what must hold.

    An `OSError` stays one, others become a `ValueError`. Errors of the system (a full disk, no permission) and of the
    network, and those about a package that is not installed, are raised as they are.
    """
    failed = require("datasets").exceptions.DatasetGenerationError
    try:
        yield
    except (
        *(failed, ValueError, TypeError, NotImplementedError, OSError),
        *(tarfile.TarError, RecursionError),  # of headers that lead to headers
    ) as error:
        cause = (error.__cause__ if isinstance(error, failed) else None) or error
        if isinstance(cause, OSError) and cause.errno is not None:  # pyarrow's have no number
            raise cause from None
        if isinstance(error, FileNotFoundError | ConnectionError) or isinstance(cause, ImportError):
            raise
        explain = getattr(cause, "details", cause.__str__)  # of a CastError: the columns that are not the same
        reason = printable_name(shorten(explain(), 1_000)).rstrip(".")
        rule = (
            "Check that its files are whole, have the same columns, of the same types, and that each split has rows."
        )
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{name} cannot be read by datasets: {reason}. {rule}") from error


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


def kind_of_audio(arrow_type: Any, column: str) -> str:
    """Return what a column of an Arrow type stores, "files" or "arrays"; raise `ValueError` if neither."""
    types = require("pyarrow").types

    def is_samples(kind: Any) -> bool:
        return (types.is_list(kind) or types.is_large_list(kind)) and types.is_floating(kind.value_type)

    fields = set(arrow_type.names) if types.is_struct(arrow_type) else set()
    scalars = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    if {"array", "sampling_rate"} <= fields and is_samples(arrow_type.field("array").type):
        return "arrays"
    if fields & {"bytes", "path"} or any(is_kind(arrow_type) for is_kind in scalars):
        return "files"
    what = "without its sampling rate" if is_samples(arrow_type) else "which is not audio"
    raise ValueError(
        f"The column {column!r} is {arrow_type}, {what}. Audio is an Audio column, paths, bytes of files, or"
        ' {"array": list of floats, "sampling_rate": int}. Make one of these of it.'
    )


def stored_audio(value: Any, kind: str) -> Any:
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
    samples, rate = (value[name] if value.is_valid else value for name in ("array", "sampling_rate"))
    if not samples.is_valid or not rate.as_py():
        raise AudioFileError("The row has no samples.", "empty")
    return Samples(samples.values.to_numpy(zero_copy_only=False), int(rate.as_py()))


def row_id(value: Any, row: int, name: str) -> str:
    """Return the id of a row: its text or number, else the row's number; `ValueError` if it is neither."""
    return label_text(value, f"{name}, row {row}, column 'id'") or str(row)


class StoredSource(SpeechSource):
    """Utterances whose audio is stored in rows."""

    @abstractmethod
    def _stored(self, row: int) -> AudioInput: ...

    def load(self, index: int, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        with about(f"Utterance {self.utterances[index].id}"):
            return load_audio(self._stored(self._positions[index]), start=start, num_samples=num_samples)


class DatasetSource(StoredSource):
    """
    A `datasets.Dataset` with a column of audio.

    The column can be of `Audio` (files or their bytes, decoded by `load_audio`, never by torchcodec), paths, bytes of
    files, or `{"array", "sampling_rate"}` as in the synthetic corpus. Only the samples of a requested part are read.
    An utterance's id is its `id`, text or a number, if it has one, else its row number.

    Args:
        dataset: A map-style `datasets.Dataset`.
        audio_column: Name of the column of audio.

    Raises `ValueError` if the dataset is of another kind, lacks the column or has something else in it, and
    `ImportError` if `datasets` is not installed.
    """

    def __init__(self, dataset: Any, audio_column: str = "audio") -> None:
        check_dataset(dataset, "Dataset")
        check_column(audio_column, dataset.column_names)
        # In Arrow format rows are what is stored: nothing is decoded.
        self._rows = dataset.select_columns([audio_column]).with_format("arrow")
        self._others = dataset.remove_columns([audio_column])
        column_type = self._rows.features.arrow_schema.field(audio_column).type
        self._kind = kind_of_audio(column_type, audio_column)
        given = self._column("id") if "id" in self._others.column_names else range(len(dataset))
        names = [row_id(value, row, "The dataset") for row, value in enumerate(given)]

        def length(row: int) -> int:
            with about(f"Utterance {names[row]}"):
                return audio_info(self._stored(row)).num_samples

        self._set_utterances(names, read_lengths(range(len(names)), length, "The dataset"), "The dataset")

    def _column(self, name: str) -> list[Any]:
        # In Arrow format nothing is decoded, such as a second column of audio.
        return [value.as_py() for value in self._others.select_columns([name]).with_format("arrow")[:].column(0)]

    def labels(self, column: str | None = None) -> list[str | None]:
        """Read a column of text, numbers or class labels, as their names; see `SpeechSource.labels`."""
        column = find_text_column(self._others.column_names, column, "The dataset")
        feature, values = self._others.features[column], self._column(column)
        name_of = getattr(feature, "int2str", None)  # of a ClassLabel, where -1 is a missing value

        def label(row: int) -> str | None:
            where, value = f"The dataset, row {row}, column {column!r}", values[row]
            if name_of is None or value is None:
                return label_text(value, where)
            if not -1 <= value < feature.num_classes:
                raise ValueError(f"{where}: {value} is no class: the column has {feature.num_classes} classes.")
            return None if value == -1 else str(name_of(value))

        return [label(row) for row in self._positions]

    def _stored(self, row: int) -> AudioInput:
        return stored_audio(self._rows[row].column(0)[0], self._kind)
