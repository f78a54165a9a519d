"""Open the source, or stream, that a name stands for."""

import glob
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .archives import TarSource
from .audio import require
from .manifests import TABLE_SUFFIXES, ManifestSource, TableSource
from .sources import AUDIO_SUFFIXES, DatasetSource, FileSource, FolderSource, SpeechSource, find_audio_files, is_hidden
from .streaming import SpeechStream

logger = logging.getLogger(__name__)

_ACCEPTED = """Accepted are:
  a folder with wav, flac, ogg, opus or mp3 files in it or below it,
  an uncompressed .tar archive, a folder of them, or a pattern ("data/train-*.tar"),
  a fairseq manifest (.tsv), or a table with a column of paths (.csv, .jsonl, .json),
  a folder written by datasets' save_to_disk, a .parquet file, or a folder of .parquet files,
  the name of a dataset on the Hub ("organisation/name"), with `split`."""


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def _has_parquet(path: Path) -> bool:
    return any(path.glob("*.parquet")) or any(path.glob("*/*.parquet"))


def _is_pattern(name: str) -> bool:
    return glob.has_magic(name) and name.endswith(".tar")


def _load_dataset(*arguments: Any, split: str | None, what: str, **options: Any) -> Any:
    """Call `datasets.load_dataset`; explain failures because of a missing split or torchcodec."""
    datasets = require("datasets")
    try:
        loaded = datasets.load_dataset(*arguments, split=split, **options)
    except datasets.exceptions.DatasetGenerationError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        problem = f"{what}: datasets cannot prepare this dataset without torchcodec"
        download = "`hf download --repo-type dataset NAME --local-dir FOLDER`"
        raise ValueError(
            f"{problem}. Download its files ({download}) and give that folder, or use streaming."
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


def _open_dataset(path: Path, name: str, split: str | None, config_name: str | None, **options: Any) -> Any:
    """Open a folder of `save_to_disk`, parquet, or a dataset on the Hub."""
    if _is_saved_dataset(path):
        return _choose_split(require("datasets").load_from_disk(name), split, name)
    if path.is_dir():
        return _load_dataset(name, split=split, what=name, **options)
    if path.is_file():
        dataset = _load_dataset("parquet", data_files=name, split=None, what=name, **options)
        return _choose_split(dataset, split, name)
    try:
        return _load_dataset(name, config_name, split=split, what=name, **options)
    except (FileNotFoundError, ConnectionError) as error:  # the first if there is no dataset of this name
        raise ValueError(f"{name} does not exist here, and was not found on the Hub ({error}). {_ACCEPTED}") from error


def _split_folder(path: Path, split: str | None) -> Path:
    if split is not None and not (path / split).is_dir():
        folders = ", ".join(sorted(entry.name for entry in path.iterdir() if entry.is_dir())) or "no folders"
        advice = "Choose one of them, or leave split out for all."
        raise ValueError(f"split={split!r} is not a folder in {path}, which has {folders}. {advice}")
    return path / (split or "")


def _open_files(path: Path, name: str, split: str | None) -> SpeechSource | None:
    """Open a folder with audio, a manifest, a table or archives; return None if it is none of these."""
    if path.is_dir():
        if next(find_audio_files(path), None) is not None:
            folder = _split_folder(path, split)
            if any(folder.glob("*.tar")):
                logger.warning("%s has .tar archives too, which are ignored because it has audio files.", folder)
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


def _parse_name(name: str | Path, config_name: str | None) -> tuple[Path, str]:
    """Return a name as path and as text; refuse one that does not exist and cannot be on the Hub."""
    path, name = Path(name), str(name)
    is_hub_name = not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None
    is_hub_name &= path.suffix.lower() not in (".tsv", ".parquet", ".tar", *TABLE_SUFFIXES)
    if config_name is not None and not is_hub_name:
        raise ValueError(f"config_name={config_name!r} is for a dataset on the Hub, and {name} is not one.")
    if not path.exists() and not is_hub_name and not _is_pattern(name):
        raise ValueError(f"{name} does not exist. {_ACCEPTED}")
    return path, name


def open_source(
    name: str | Path, *, split: str | None = None, config_name: str | None = None, audio_column: str = "audio"
) -> SpeechSource:
    """
    Open the recordings that a name stands for.

    Args:
        name: A folder with audio; a `.tar` archive, a folder of them or a pattern; a fairseq manifest (`.tsv`) or
            another table of paths (`.csv`, `.jsonl`, `.json`); a folder written by `save_to_disk`, a `.parquet` file
            or a folder of them; or the name of a dataset on the Hub.
        split: Split of a dataset that has several, or the name of a subfolder of a folder with audio or archives.
        config_name: Configuration of a Hub dataset that has several.
        audio_column: Column of a dataset that has the audio.

    Raises:
        ValueError: If the name stands for nothing (the message lists what is accepted), a split is missing or does
            not exist, or as the source's own class.
        ImportError: If `datasets` is needed and not installed.
    """
    path, name = _parse_name(name, config_name)
    if not _is_saved_dataset(path):
        source = _open_files(path, name, split)
        if source is not None:
            return source
        if path.is_dir() and not _has_parquet(path):
            raise ValueError(f"{path} has no audio in it. {_ACCEPTED}")
        if path.is_file() and path.suffix != ".parquet":
            raise ValueError(f"{name} has no recordings. {_ACCEPTED}")
    return DatasetSource(_open_dataset(path, name, split, config_name), audio_column)


def open_stream(
    name: str | Path,
    *,
    split: str | None = None,
    config_name: str | None = None,
    audio_column: str = "audio",
    window_seconds: float = 14_400.0,
    seed: int | None = None,
) -> SpeechStream:
    """
    Open a dataset to read it from start to end, window by window, without a list of utterances or a copy on disk.

    `split` and `config_name` are those of `open_source`, `window_seconds` and `seed` (of the order of shards) those of
    `SpeechStream`.

    Args:
        name: A dataset on the Hub, a folder written by `save_to_disk`, parquet, or archives, read as WebDatasets.
        audio_column: As in `open_source`; for WebDatasets the suffix of the audio files.

    Raises:
        ValueError: As `open_source`, or if the name stands for recordings that cannot be streamed.
        ImportError: If `datasets` is not installed.
    """
    path, name = _parse_name(name, config_name)
    if _is_saved_dataset(path):
        dataset = _open_dataset(path, name, split, None)
        dataset = dataset.to_iterable_dataset(num_shards=max(1, min(len(dataset), len(dataset.cache_files))))
    elif _is_pattern(name) or path.suffix == ".tar" or (path.is_dir() and any(path.glob("**/*.tar"))):
        archives = name if path.suffix == ".tar" else str(path / "**" / "*.tar")
        dataset = _load_dataset("webdataset", data_files=archives, split=None, what=name, streaming=True)
        dataset = _choose_split(dataset, split, name)
    elif path.exists() and path.suffix != ".parquet" and not _has_parquet(path):
        rule = "streaming is for datasets (on the Hub, parquet, WebDataset archives, save_to_disk)"
        advice = "Leave streaming out: its audio is read on demand in any case."
        raise ValueError(f"{rule}, and {name} is not one. {advice}")
    else:
        dataset = _open_dataset(path, name, split, config_name, streaming=True)
    return SpeechStream(dataset, audio_column, window_seconds=window_seconds, shuffle_seed=seed)


def open_recordings(names: Sequence[str | Path]) -> SpeechSource:
    """
    Open audio files and folders of them, or one name of anything else that `open_source` opens.

    Recordings of several files and folders are named by their paths below the lowest folder that contains all of them.
    Raises `ValueError` if a name does not exist, nothing is readable, or several names are not all files and folders.
    """
    paths = [Path(name) for name in names]
    files: list[Path] = []
    for path in paths:
        if path.suffix.lower() in AUDIO_SUFFIXES:
            files.append(path)
        elif len(paths) == 1:
            return open_source(path)
        elif path.is_dir():
            files += [path / name for name in sorted(find_audio_files(path)) if not is_hidden(name)]
        else:
            raise ValueError(
                f"{path} is neither an audio file ({', '.join(AUDIO_SUFFIXES)}) nor a folder. Name several of those,"
                " or one manifest, archive or dataset alone."
            )
    return FileSource(files)
