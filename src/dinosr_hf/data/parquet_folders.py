"""Folders of parquet files, such as a download from the Hub or its converted branch: which file is of which split."""

import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from huggingface_hub import metadata_load
from yaml import YAMLError

from ..utils.command_line import argument_errors
from ..utils.names import printable_name
from .finding import find_files, literal_paths

logger = logging.getLogger(__name__)

# The words for splits that `datasets` knows, in names of folders and files.
_WORDS = {"train": "train", "training": "train"}
_WORDS |= dict.fromkeys(("validation", "valid", "dev", "val"), "validation")
_WORDS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")


def has_configurations(folder: Path) -> bool:
    """Return whether the folder's README.md lists the files of the dataset's splits, in its head, for `datasets`."""
    readme = folder / "README.md"
    with argument_errors(f"{readme} does not begin with valid YAML: ", (YAMLError,)):
        return readme.is_file() and bool((metadata_load(readme) or {}).get("configs"))


def _split_in(name: str) -> str | None:
    words = re.split(r"[-._ 0-9]+", name.lower())
    return next((_WORDS[word] for word in words if word in _WORDS), None)


def _by_shard(name: PurePosixPath) -> str | None:
    found = re.fullmatch(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*", str(name))
    return found[1] if found else None


def _split_folder_of(name: PurePosixPath) -> PurePosixPath | None:
    return next((folder for folder in name.parents if _split_in(folder.name) is not None), None)


def _by_folder(name: PurePosixPath) -> str | None:
    folder = _split_folder_of(name)
    return None if folder is None else _split_in(folder.name)


def _by_file(name: PurePosixPath) -> str | None:
    return _split_in(name.name)


_RULES: tuple[Callable[[PurePosixPath], str | None], ...] = (_by_shard, _by_folder, _by_file, lambda name: "train")


def _check_configurations(folder: Path, names: Iterable[PurePosixPath]) -> None:
    """Raise `ValueError` if a split is in several folders, each of which must be a configuration of its own."""
    places: dict[str, PurePosixPath] = {}
    for name in names:
        if (place := _split_folder_of(name)) is not None:
            other = places.setdefault(place.name, place)
            if other.parent != place.parent:
                raise ValueError(
                    f"{folder} has the split {place.name} in {other.parent} and in {place.parent}, which may be"
                    f" configurations with the same recordings. Give one of them: {folder / other.parent}."
                )


def parquet_splits(folder: Path) -> dict[str, list[str]]:
    """
    Return the parquet files in a folder and below, by split, as `literal_paths`.

    The rule is that of `datasets`: the splits are those of `data/SPLIT-00000-of-00001.parquet`, else of the names of
    folders, else of the names of files, in which a word such as train, dev or test stands for a split; else all is
    "train". Files of no split are left out with a warning. Raises `ValueError` if a split has several folders.
    """
    found = find_files(folder, ".parquet")
    if found.unreachable:
        problem = f"{len(found.unreachable):,} links lead nowhere, or to folders that cannot be listed"
        logger.warning("%s: %s, such as %s.", folder, problem, printable_name(found.unreachable[0]))
    names = [PurePosixPath(name) for name in found.names]
    rule = next(rule for rule in _RULES if any(map(rule, names)))
    if rule is _by_folder:
        _check_configurations(folder, names)
    splits: dict[str, list[PurePosixPath]] = {}
    for name in names:
        splits.setdefault(rule(name) or "", []).append(name)
    if other := splits.pop("", None):
        problem = f"{len(other):,} parquet files belong to no split and are left out"
        logger.warning("%s: %s, such as %s.", folder, problem, printable_name(str(other[0])))
    known = list(dict.fromkeys(_WORDS.values()))
    order = sorted(splits, key=lambda split: (known.index(split) if split in known else len(known), split))
    return {split: literal_paths(folder / name for name in splits[split]) for split in order}
