"""
Where utterances come from: folders, manifests, `datasets`. Headers are read once, audio when it is asked for.

Nothing is decoded to disk. `S` samples at 16 kHz.
"""

from __future__ import annotations

import logging
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from .audio import SAMPLING_RATE, AudioFileError, audio_info, load_audio, read_resampled, require, resampled_length

logger = logging.getLogger(__name__)

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3")

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

    def load(self, index: int, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        """See `SpeechSource.load`."""
        return load_audio(self.root / self.utterances[index].id, start=start, num_samples=num_samples)


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
        for position in sorted({round(k * (len(rows) - 1) / 15) for k in range(16)} if rows else ()):
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

    def _value(self, row: int) -> Any:
        return self._rows[row].column(0)[0]

    def _file(self, row: int) -> Any:
        """Path, or file object on the bytes, of a row."""
        pa = require("pyarrow")
        value = self._value(row)
        fields = [value]
        if pa.types.is_struct(value.type):
            fields = [value[name] for name in ("bytes", "path") if value.is_valid and name in value.type.names]
        for field in fields:
            if field.is_valid:
                is_path = pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
                return field.as_py() if is_path else pa.BufferReader(field.as_buffer())
        raise AudioFileError("The row has neither bytes nor a path.", "missing")

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


_ACCEPTED = """Accepted are:
  a folder with wav, flac, ogg, opus or mp3 files in it or below it,
  a fairseq manifest (.tsv),
  a folder written by datasets' save_to_disk, a .parquet file, or a folder of .parquet files,
  the name of a dataset on the Hub ("organisation/name"), with `split`."""


def _load_dataset(*arguments: Any, split: str | None, what: str, **options: Any) -> Any:
    """`datasets.load_dataset`, with advice where it fails for want of a split or of torchcodec."""
    datasets = require("datasets")
    try:
        loaded = datasets.load_dataset(*arguments, split=split, **options)
    except datasets.exceptions.DatasetGenerationError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        raise ValueError(
            f"{what}: datasets cannot prepare this one without torchcodec. Download its files (`hf download"
            " --repo-type dataset NAME --local-dir FOLDER`) and give that folder."
        ) from error
    return _choose_split(loaded, None, what)


def _choose_split(dataset: Any, split: str | None, what: str) -> Any:
    if not isinstance(dataset, dict):
        if split is not None:
            raise ValueError(f"split={split!r}: {what} is a single split. Leave split out.")
        return dataset
    if split is None and len(dataset) == 1:
        return next(iter(dataset.values()))
    if split not in dataset:
        raise ValueError(f"split={split!r}: {what} has the splits {', '.join(dataset)}. Choose one of them.")
    return dataset[split]


def _open_folder(path: Path, split: str | None, audio_column: str) -> SpeechSource:
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        dataset = _choose_split(require("datasets").load_from_disk(str(path)), split, str(path))
        return DatasetSource(dataset, audio_column)
    if next(_find_audio(path), None) is None:
        if not any(path.glob("*.parquet")) and not any(path.glob("*/*.parquet")):
            raise ValueError(f"{path} has no audio in it. {_ACCEPTED}")
        return DatasetSource(_load_dataset(str(path), split=split, what=str(path)), audio_column)
    if split is None:
        return FolderSource(path)
    if not (path / split).is_dir():
        folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise ValueError(
            f"split={split!r} is not a folder in {path}, which has {', '.join(folders) or 'no folders'}. Choose one of"
            " them, or leave split out for all."
        )
    return FolderSource(path / split)


def open_source(
    name: str | Path, *, split: str | None = None, config_name: str | None = None, audio_column: str = "audio"
) -> SpeechSource:
    """
    Open whatever a name stands for.

    Args:
        name: A folder with audio, a fairseq manifest (`.tsv`), a folder written by `save_to_disk`, a `.parquet` file
            or a folder of them, or the name of a dataset on the Hub.
        split: Of a dataset that has several; of a folder with audio, the name of a folder in it.
        config_name: Of a Hub dataset that has several configurations.
        audio_column: Column of a dataset that has the audio.

    Raises:
        ValueError: If the name stands for nothing, with a list of what is accepted; if a split is needed or does not
            exist; and as the source's own class.
        ImportError: Without `datasets`, where it is needed.
    """
    path = Path(name)
    is_hub_name = not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)) is not None
    if config_name is not None and not is_hub_name:
        raise ValueError(f"config_name={config_name!r} belongs to a dataset on the Hub, and {name} is not one.")
    if path.is_dir():
        return _open_folder(path, split, audio_column)
    if path.is_file() and path.suffix == ".tsv":
        if split is not None:
            raise ValueError(f"split={split!r}: {name} is a manifest, which has no splits. Leave split out.")
        return ManifestSource(path)
    if path.is_file() and path.suffix == ".parquet":
        dataset = _load_dataset("parquet", data_files=str(path), split=None, what=str(path))
        return DatasetSource(_choose_split(dataset, split, str(path)), audio_column)
    if not is_hub_name or path.suffix in (".tsv", ".parquet"):
        raise ValueError(f"{name} is {'nothing to train on' if path.exists() else 'not here'}. {_ACCEPTED}")
    try:
        dataset = _load_dataset(str(name), config_name, split=split, what=str(name))
    except (FileNotFoundError, ConnectionError) as error:  # the first: datasets knows no such name
        raise ValueError(f"{name} is not here, and not found on the Hub ({error}). {_ACCEPTED}") from error
    return DatasetSource(dataset, audio_column)
