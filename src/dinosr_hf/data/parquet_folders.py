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


def configurations(folder: Path) -> dict[str, bool]:
    """
    Return the configurations whose files the folder's README.md lists, in its head, for `datasets`.

    The values say whether it opens when none is named: the only one, one named "default", or marked as such.
    """
    readme = folder / "README.md"
    with argument_errors(f"{readme} does not begin with valid YAML of a dataset: ", (YAMLError, ValueError)):
        found = (metadata_load(readme) or {}).get("configs") if readme.is_file() else None
        configs = [each for each in found or [] if isinstance(each, dict)]
    names = {str(each.get("config_name", "default")): each.get("default") is True for each in configs}
    return {name: is_default or name == "default" or len(names) == 1 for name, is_default in names.items()}


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


def _check_configurations(folder: Path, places: Iterable[PurePosixPath]) -> None:
    """Raise `ValueError` if a folder or file of a split is in several places, which may be configurations."""
    first: dict[str, PurePosixPath] = {}
    for place in places:
        other = first.setdefault(re.sub(r"-\d{5}-of-\d{5}", "", place.name), place)
        if other.parent != place.parent:
            below = other.parent if other.parent.name else place.parent
            raise ValueError(
                f"{folder} has {other.name} in {other.parent} and {place.name} in {place.parent}, which may be"
                f" configurations with the same recordings. Give one of them, such as {folder / below}; if they are"
                " not, give each."
            )


def parquet_splits(folder: Path) -> dict[str, list[str]]:
    """
    Return the parquet files in a folder and below, by split, as `literal_paths`.

    The rule is that of `datasets`: the splits are those of `data/SPLIT-00000-of-00001.parquet`, else of the names of
    folders, else of the names of files, in which a word such as train, dev or test stands for a split; else all is
    "train". Files of no split are left out with a warning. Raises `ValueError` if folders or files of a split have the
    same name.
    """
    found = find_files(folder, ".parquet")
    if found.unreachable:
        problem = f"{len(found.unreachable):,} links lead nowhere, or to folders that cannot be listed"
        logger.warning("%s: %s, such as %s.", folder, problem, printable_name(found.unreachable[0]))
    names = [PurePosixPath(name) for name in found.names]
    rule = next(rule for rule in _RULES if any(map(rule, names)))
    if rule is _by_folder:
        _check_configurations(folder, filter(None, map(_split_folder_of, names)))
    elif rule is _by_file:
        _check_configurations(folder, filter(_by_file, names))
    splits: dict[str, list[PurePosixPath]] = {}
    for name in names:
        splits.setdefault(rule(name) or "", []).append(name)
    if other := splits.pop("", None):
        problem = f"{len(other):,} parquet files belong to no split and are left out"
        logger.warning("%s: %s, such as %s.", folder, problem, printable_name(str(other[0])))
    known = list(dict.fromkeys(_WORDS.values()))
    order = sorted(splits, key=lambda split: (known.index(split) if split in known else len(known), split))
    return {split: literal_paths(folder / name for name in splits[split]) for split in order}
