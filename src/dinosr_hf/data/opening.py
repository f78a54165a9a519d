"""
From the name of a collection of recordings to the source, or stream, that reads it.
"""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

from .archives import TarSource
from .audio import require
from .manifests import TABLE_SUFFIXES, ManifestSource, TableSource
from .sources import (
    AUDIO_SUFFIXES,
    DatasetSource,
    FileSource,
    FolderSource,
    SpeechSource,
    _find_audio,
    _is_hidden,
)
from .streaming import SpeechStream

logger = logging.getLogger(__name__)

_ACCEPTED = """Accepted are:
  a folder with wav, flac, ogg, opus or mp3 files in it or below it,
  an uncompressed .tar archive, a folder of them, or a pattern ("data/train-*.tar"),
  a fairseq manifest (.tsv), or a table with a column of paths (.csv, .jsonl, .json),
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
            " --repo-type dataset NAME --local-dir FOLDER`) and give that folder, or use streaming."
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


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def _has_parquet(path: Path) -> bool:
    return any(path.glob("*.parquet")) or any(path.glob("*/*.parquet"))


def _is_pattern(name: str) -> bool:
    return glob.has_magic(name) and name.endswith(".tar")


def _open_dataset(path: Path, name: str, split: str | None, config_name: str | None, options: dict[str, Any]) -> Any:
    """What `datasets` opens: a folder of `save_to_disk`, parquet, or a name on the Hub."""
    if _is_saved_dataset(path):
        return _choose_split(require("datasets").load_from_disk(name), split, name)
    if path.is_dir():
        return _load_dataset(name, split=split, what=name, **options)
    if path.is_file():
        dataset = _load_dataset("parquet", data_files=name, split=None, what=name, **options)
        return _choose_split(dataset, split, name)
    try:
        return _load_dataset(name, config_name, split=split, what=name, **options)
    except (FileNotFoundError, ConnectionError) as error:  # the first: datasets knows no such name
        raise ValueError(f"{name} is not here, and not found on the Hub ({error}). {_ACCEPTED}") from error


def _split_folder(path: Path, split: str | None) -> Path:
    if split is None:
        return path
    if not (path / split).is_dir():
        folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise ValueError(
            f"split={split!r} is not a folder in {path}, which has {', '.join(folders) or 'no folders'}. Choose one of"
            " them, or leave split out for all."
        )
    return path / split


def _open_files(path: Path, name: str, split: str | None) -> SpeechSource | None:
    """A source of what is neither a dataset nor on the Hub; None if it is none of these."""
    if path.is_dir():
        if next(_find_audio(path), None) is not None:
            folder = _split_folder(path, split)
            if any(folder.glob("*.tar")):
                logger.warning("%s has .tar archives too, which are not read beside its audio files.", folder)
            return FolderSource(folder)
        return TarSource(_split_folder(path, split)) if any(path.glob("**/*.tar")) else None
    is_list = path.is_file() and path.suffix.lower() in (".tsv", *TABLE_SUFFIXES)
    is_archive = (path.is_file() and ".tar" in path.suffixes[-2:]) or _is_pattern(name)
    if split is not None and (is_list or is_archive):
        kind = "a manifest" if is_list else "an archive"
        raise ValueError(f"split={split!r}: {name} is {kind}, which has no splits. Leave split out.")
    if is_list:
        return ManifestSource(path) if path.suffix.lower() == ".tsv" else TableSource(path)
    return TarSource(name) if is_archive else None


def _open_stream(path: Path, name: str, split: str | None, config_name: str | None) -> Any:
    """A `datasets.IterableDataset`."""
    if _is_saved_dataset(path):
        dataset = _open_dataset(path, name, split, None, {})
        return dataset.to_iterable_dataset(num_shards=max(1, min(len(dataset), len(dataset.cache_files))))
    archives = name if path.suffix == ".tar" else str(path / "**" / "*.tar")
    if _is_pattern(name) or path.suffix == ".tar" or (path.is_dir() and any(path.glob("**/*.tar"))):
        dataset = _load_dataset("webdataset", data_files=archives, split=None, what=name, streaming=True)
        return _choose_split(dataset, split, name)
    if path.exists() and path.suffix != ".parquet" and not _has_parquet(path):
        raise ValueError(
            f"streaming is for datasets (on the Hub, parquet, WebDataset archives, save_to_disk), and {name} is none."
            " Its audio is read piece by piece in any case: leave streaming out."
        )
    return _open_dataset(path, name, split, config_name, {"streaming": True})


@overload
def open_source(
    name: str | Path,
    *,
    split: str | None = ...,
    config_name: str | None = ...,
    audio_column: str = ...,
    streaming: Literal[False] = ...,
    window_seconds: float = ...,
    seed: int | None = ...,
) -> SpeechSource: ...
@overload
def open_source(
    name: str | Path,
    *,
    split: str | None = ...,
    config_name: str | None = ...,
    audio_column: str = ...,
    streaming: bool,
    window_seconds: float = ...,
    seed: int | None = ...,
) -> SpeechSource | SpeechStream: ...
def open_source(
    name: str | Path,
    *,
    split: str | None = None,
    config_name: str | None = None,
    audio_column: str = "audio",
    streaming: bool = False,
    window_seconds: float = 14_400.0,
    seed: int | None = None,
) -> SpeechSource | SpeechStream:
    """
    Open whatever a name stands for.

    Args:
        name: A folder with audio; a `.tar` archive, a folder of them or a pattern; a fairseq manifest (`.tsv`) or
            another table of paths (`.csv`, `.jsonl`, `.json`); a folder written by `save_to_disk`, a `.parquet` file
            or a folder of them; or the name of a dataset on the Hub.
        split: Of a dataset that has several; of a folder with audio or archives, the name of a folder in it.
        config_name: Of a Hub dataset that has several configurations.
        audio_column: Column of a dataset that has the audio; in a stream of WebDataset archives the files' suffix.
        streaming: Whether a dataset is read from its beginning to its end, window by window, without a list of its
            utterances and without a copy on disk. Archives are then taken for WebDatasets.
        window_seconds: Of a stream, see `SpeechStream`.
        seed: Of the order of a stream's shards, see `SpeechStream`; no other source has an order of its own.

    Returns:
        A `SpeechSource`, or with `streaming` a `SpeechStream`.

    Raises:
        ValueError: If the name stands for nothing, with a list of what is accepted; if a split is needed or does not
            exist; if it cannot be streamed; and as the source's own class.
        ImportError: Without `datasets`, where it is needed.
    """
    path, name = Path(name), str(name)
    is_hub_name = not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None
    is_hub_name &= path.suffix.lower() not in (".tsv", ".parquet", ".tar", *TABLE_SUFFIXES)
    if config_name is not None and not is_hub_name:
        raise ValueError(f"config_name={config_name!r} belongs to a dataset on the Hub, and {name} is not one.")
    if not path.exists() and not is_hub_name and not _is_pattern(name):
        raise ValueError(f"{name} is not here. {_ACCEPTED}")
    if streaming:
        dataset = _open_stream(path, name, split, config_name)
        return SpeechStream(dataset, audio_column, window_seconds=window_seconds, shuffle_seed=seed)
    if not _is_saved_dataset(path):
        source = _open_files(path, name, split)
        if source is not None:
            return source
        if path.is_dir() and not _has_parquet(path):
            raise ValueError(f"{path} has no audio in it. {_ACCEPTED}")
        if path.is_file() and path.suffix != ".parquet":
            raise ValueError(f"{name} is nothing to train on. {_ACCEPTED}")
    return DatasetSource(_open_dataset(path, name, split, config_name, {}), audio_column)


def open_recordings(names: Sequence[str | Path]) -> SpeechSource:
    """
    Open audio files, or folders of them, or one name of anything else that `open_source` opens.

    Args:
        names: Files and folders, whose recordings are then called by their paths below the lowest folder that has all
            of them; or one name.

    Raises:
        ValueError: If a name is not here, nothing is readable, or something else than files and folders is not alone.
    """
    paths = [Path(name) for name in names]
    is_audio = [path.suffix.lower() in AUDIO_SUFFIXES for path in paths]
    if len(paths) == 1 and not is_audio[0]:
        return open_source(paths[0])
    files: list[Path] = []
    for path, is_file in zip(paths, is_audio, strict=True):
        if is_file:
            files.append(path)
        elif path.is_dir():
            files += [path / name for name in sorted(_find_audio(path)) if not _is_hidden(name)]
        else:
            raise ValueError(
                f"{path} is neither an audio file ({', '.join(AUDIO_SUFFIXES)}) nor a folder. Name several of those,"
                " or one manifest, archive or dataset alone."
            )
    return FileSource(files)
