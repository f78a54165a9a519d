"""Open the source, or stream, that a name stands for."""

import glob
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..utils.damaged_files import explain_damage
from ..utils.text_files import check_regular_file
from .archives import TarSource, check_archive, find_archives
from .audio import require
from .finding import AUDIO_SUFFIXES, COMPRESSED_SUFFIXES, UNSUPPORTED_SUFFIXES, find_files, has_suffix, literal_paths
from .manifests import TABLE_SUFFIXES, TableSource, open_tsv
from .parquet_folders import configurations, parquet_splits
from .sources import DatasetSource, FileSource, FolderSource, SpeechSource, dataset_errors
from .streaming import SpeechStream

logger = logging.getLogger(__name__)

_ACCEPTED = """Accepted are:
  a folder with wav, flac, ogg, opus, mp3, aiff, au, caf, w64 or sph files in it or below it, or one such file,
  an uncompressed .tar archive, a folder of them, or a pattern ("data/train-*.tar"),
  a fairseq manifest (.tsv), or a table with a column of paths (.csv, .tsv, .jsonl, .json),
  a folder written by datasets' save_to_disk, a .parquet file, or a folder of .parquet files,
  the name of a dataset on the Hub ("organisation/name"), with `split`."""


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


# What a folder can have, in the order in which the first one that it has is used.
_AUDIO, _ARCHIVES, _PARQUET = "audio files", ".tar archives", ".parquet files"
_UNSUPPORTED, _COMPRESSED = "audio files that cannot be read", "compressed archives"
_CONTENTS: dict[str, tuple[str, ...]] = {
    _AUDIO: AUDIO_SUFFIXES,
    _ARCHIVES: (".tar",),
    _PARQUET: (".parquet",),
    _UNSUPPORTED: UNSUPPORTED_SUFFIXES,
    _COMPRESSED: COMPRESSED_SUFFIXES,
}


def _contents(folder: Path) -> list[str]:
    """Return which of `_CONTENTS` are in a folder and below."""
    names, _, unreachable = find_files(folder, *(suffix for suffixes in _CONTENTS.values() for suffix in suffixes))
    if "" in unreachable:
        raise ValueError(f"{folder} cannot be listed. Check its permissions.")
    return [content for content, ends in _CONTENTS.items() if any(has_suffix(name, ends) for name in names)]


def _is_pattern(name: str) -> bool:
    return glob.has_magic(name) and has_suffix(name, ".tar")


def _load_dataset(*arguments: Any, split: str | None, what: str, **options: Any) -> Any:
    """Call `datasets.load_dataset`; explain failures because of damaged files, a missing split or torchcodec."""
    datasets = require("datasets")
    if arguments == ("parquet",):
        options["batch_size"] = 1_000  # the default, the rows of a file's first group, is refused if it has none
    try:
        with dataset_errors(what):
            loaded = datasets.load_dataset(*arguments, split=split, **options)
    except datasets.exceptions.DatasetGenerationError as error:
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
        with dataset_errors(name):
            dataset = require("datasets").load_from_disk(name)
        return _choose_split(dataset, split, name)
    if path.is_dir():
        if not (known := configurations(path)):
            return _load_dataset("parquet", data_files=parquet_splits(path), split=split, what=name, **options)
        if not (any(known.values()) if config_name is None else config_name in known):
            asked = "none is the default" if config_name is None else f"none is {config_name!r}"
            raise ValueError(
                f"The README.md of {name} lists the configurations {', '.join(known)}, and {asked}. Choose one of them"
                " as config_name (--data_config)."
            )
        if glob.has_magic(str(path.absolute())):
            raise ValueError(
                f"{name} has a README.md that lists the files of its splits, but datasets takes the path for a"
                " pattern, because of its brackets, * or ?. Rename the folder."
            )
        return _load_dataset(name, config_name, split=split, what=name, **options)
    if path.is_file():
        dataset = _load_dataset("parquet", data_files=literal_paths([path]), split=None, what=name, **options)
        return _choose_split(dataset, split, name)
    try:
        return _load_dataset(name, config_name, split=split, what=name, **options)
    except (FileNotFoundError, ConnectionError) as error:  # the first if there is no dataset of this name
        raise ValueError(f"{name} does not exist here, and was not found on the Hub ({error}). {_ACCEPTED}") from error


def _refuse_damaged(path: Path) -> None:
    """Raise `ValueError` for a file of a dataset on this machine that cannot be one, such as a Git LFS pointer."""
    files = [path]
    if path.is_dir():
        files = [path / name for name in find_files(path, ".parquet", ".arrow", ".tar").names]
    for file in files:
        if file.is_file() and (problem := explain_damage(file)) is not None:
            raise ValueError(problem)


def _split_folder(path: Path, split: str | None) -> Path:
    if split is not None and not (path / split).is_dir():
        folders = ", ".join(sorted(entry.name for entry in path.iterdir() if entry.is_dir())) or "no folders"
        advice = "Choose one of them, or leave split out for all."
        raise ValueError(f"split={split!r} is not a folder in {path}, which has {folders}. {advice}")
    return path / (split or "")


def _warn_of_others(path: Path, used: str, contents: list[str]) -> None:
    """Warn of contents of a folder that are ignored because others are used."""
    counted = {_AUDIO: _UNSUPPORTED, _ARCHIVES: _COMPRESSED}.get(used)  # by the source itself
    if ignored := " and ".join(content for content in contents if content not in (used, counted)):
        logger.warning("%s has %s too, which are ignored because it has %s.", path, ignored, used)


def _open_folder(path: Path, split: str | None) -> SpeechSource | None:
    """Open a folder with audio or archives; return None if it has parquet files."""
    inside = path / split if split is not None and (path / split).is_dir() else path
    contents = _contents(inside) or _contents(path)
    first = contents[0] if contents else ""
    _warn_of_others(inside, first, contents)
    if first in (_AUDIO, _UNSUPPORTED):
        return FolderSource(_split_folder(path, split))
    if first in (_ARCHIVES, _COMPRESSED):
        return TarSource(_split_folder(path, split))
    if not first:
        hidden = find_files(path, *AUDIO_SUFFIXES).hidden
        but = f", only hidden files such as {hidden[0]}" if hidden else ""
        raise ValueError(f"{path} has no audio in it{but}. {_ACCEPTED}")
    return None


def _open_file(path: Path, name: str, split: str | None, audio_column: str) -> SpeechSource | None:
    """Open a recording, a manifest, a table, an archive or a pattern of them; return None if it is none of these."""
    kinds: dict[str, tuple[tuple[str, ...], Callable[[Path], SpeechSource]]] = {
        "a recording": (AUDIO_SUFFIXES + UNSUPPORTED_SUFFIXES, lambda path: FileSource([path])),
        "a manifest": ((".tsv",), lambda path: open_tsv(path, audio_column)),
        "a table": (TABLE_SUFFIXES, lambda path: TableSource(path, audio_column)),
        "an archive": ((".tar", *COMPRESSED_SUFFIXES), TarSource),
    }
    for kind, (suffixes, opened) in kinds.items():
        if has_suffix(name, suffixes):
            if split is not None:
                raise ValueError(f"split={split!r}: {name} is {kind}, which has no splits. Leave split out.")
            return opened(path)
    return None


def _parse_name(name: str | Path, config_name: str | None) -> tuple[Path, str]:
    """Return a name as path and as text; refuse one that does not exist and cannot be on the Hub."""
    path, name = Path(name), str(name)
    if not name:
        raise ValueError(f"The name of the data is empty, as of a shell variable that is not set. {_ACCEPTED}")
    is_hub_name = not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None
    files = (".tsv", ".parquet", ".tar", *TABLE_SUFFIXES, *AUDIO_SUFFIXES, *UNSUPPORTED_SUFFIXES)
    is_hub_name &= not has_suffix(name, files)
    if config_name is not None and not is_hub_name:
        if not (path.is_dir() and configurations(path)):
            raise ValueError(f"config_name={config_name!r} is for a dataset with configurations, and {name} has none.")
        if _is_saved_dataset(path) or (kinds := _contents(path))[:1] != [_PARQUET]:
            found = "a saved dataset" if _is_saved_dataset(path) else " and ".join(kinds) or "no files of data"
            raise ValueError(
                f"config_name={config_name!r} chooses Parquet files by README.md, but {name} has {found}. Leave it"
                " out, and give the configuration's folder."
            )
    if not path.exists() and not is_hub_name and not _is_pattern(name):
        raise ValueError(f"{name} does not exist. {_ACCEPTED}")
    if path.exists() and not path.is_dir():
        check_regular_file(path)
    return path, name


def open_source(
    name: str | Path, *, split: str | None = None, config_name: str | None = None, audio_column: str = "audio"
) -> SpeechSource:
    """
    Open the recordings that a name stands for.

    Args:
        name: A folder with audio, or a recording; a `.tar` archive, a folder of them or a pattern; a fairseq manifest
            (`.tsv`) or another table of paths (`.csv`, `.jsonl`, `.json`); a folder written by `save_to_disk`, a
            `.parquet` file or a folder of them; or the name of a dataset on the Hub.
        split: Split of a dataset that has several, or the name of a subfolder of a folder with audio or archives.
        config_name: Configuration of a dataset that has several, on the Hub or in a folder whose README.md lists them.
        audio_column: Column of a dataset that has the audio, or of a table that has the paths; "audio": of a table the
            first of `manifests.PATH_COLUMNS`.

    Raises:
        ValueError: If the name stands for nothing (the message lists what is accepted), a split is missing or does
            not exist, or as the source's own class.
        ImportError: If `datasets` is needed and not installed.
    """
    path, name = _parse_name(name, config_name)
    if not _is_saved_dataset(path):
        source = None
        if path.is_dir():
            source = _open_folder(path, split)
        elif path.is_file() or _is_pattern(name):
            source = _open_file(path, name, split, audio_column)
            if source is None and not has_suffix(name, ".parquet"):
                raise ValueError(f"{name} has no recordings. {_ACCEPTED}")
        if source is not None:
            return source
    _refuse_damaged(path)
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
    contents = _contents(path) if path.is_dir() else []
    _refuse_damaged(path)
    if _is_saved_dataset(path):
        dataset = _open_dataset(path, name, split, None)
        dataset = dataset.to_iterable_dataset(num_shards=max(1, min(len(dataset), len(dataset.cache_files))))
    elif _ARCHIVES in contents or has_suffix(name, ".tar"):
        _warn_of_others(path, _ARCHIVES, contents)
        folder, split = (_split_folder(path, split), None) if path.is_dir() else (path, split)
        archives = find_archives(folder)[0]
        for archive in archives:
            check_archive(archive)  # before `datasets`, which would unpack compressed ones and sparse members
        files = literal_paths(archives)
        try:
            dataset = _load_dataset("webdataset", data_files=files, split=None, what=name, streaming=True)
        except ValueError as error:
            advice = "Leave streaming out, to read archives of any members in place."
            raise ValueError(f"{error} {advice}") from error
        dataset = _choose_split(dataset, split, name)
    elif path.exists() and _PARQUET not in contents and (path.is_dir() or not has_suffix(name, ".parquet")):
        rule = "streaming is for datasets (on the Hub, parquet, WebDataset archives, save_to_disk)"
        advice = "Leave streaming out: its audio is read on demand in any case."
        raise ValueError(f"{rule}, and {name} is not one. {advice}")
    else:
        _warn_of_others(path, _PARQUET, contents)
        dataset = _open_dataset(path, name, split, config_name, streaming=True)
    return SpeechStream(dataset, audio_column, window_seconds=window_seconds, shuffle_seed=seed, name=name)


def open_recordings(
    names: Sequence[str | Path],
    *,
    split: str | None = None,
    config_name: str | None = None,
    audio_column: str = "audio",
) -> SpeechSource:
    """
    Open audio files and folders of them, or one name of anything else that `open_source` opens.

    Recordings of several files and folders are named by their paths below the lowest folder that contains all of them.
    The options are those of `open_source`; `split` and `config_name` are for one name only. Raises `ValueError` if a
    name does not exist, nothing is readable, or several names are not all files and folders, or have such an option.
    """
    paths = [Path(name) for name in names]
    suffixes = AUDIO_SUFFIXES + UNSUPPORTED_SUFFIXES
    has_options = split is not None or config_name is not None
    if len(paths) == 1 and (has_options or paths[0].is_dir() or not has_suffix(paths[0], suffixes)):
        return open_source(names[0], split=split, config_name=config_name, audio_column=audio_column)
    for option, value in (("split", split), ("config_name", config_name)):
        if value is not None:
            raise ValueError(
                f"{option}={value!r} needs a single input, but there are {len(names)}. Run once per input."
            )
    for name, path in zip(names, paths, strict=True):
        if not name or not (path.is_dir() or has_suffix(path, suffixes)):
            kinds = f"neither an audio file ({', '.join(AUDIO_SUFFIXES)}) nor a folder"
            advice = "Name several of those, or one manifest, archive or dataset alone."
            if all(has_suffix(path, (".tar",)) for path in paths):
                advice = "Put quotes around a pattern of archives, or give their folder."
            raise ValueError(f"{name or 'An empty name'} is {kinds}. {advice}")
    return FileSource(paths)
