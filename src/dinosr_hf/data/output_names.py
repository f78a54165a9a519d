"""Files of results that are named after recordings: where each is written, and that none replaces another."""

import hashlib
import logging
import os
import posixpath
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ..utils.names import printable_name
from .finding import AUDIO_SUFFIXES

logger = logging.getLogger(__name__)

MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 4095  # of file systems
_PARENT = "_up"  # the folder that stands for `..`


def _fit(name: str, suffix: str = "") -> str:
    """Shorten the name of a file or folder to what file systems take; a hash of all of it keeps it apart."""
    whole = name.encode()
    if len(whole) + len(suffix) <= MAX_NAME_BYTES:
        return name + suffix
    end = f"-{hashlib.sha256(whole).hexdigest()[:12]}{suffix}"
    return whole[: MAX_NAME_BYTES - len(end)].decode(errors="ignore") + end


def _stem(recording: str) -> str:
    stem, suffix = posixpath.splitext(recording)
    return stem if suffix.lower() in AUDIO_SUFFIXES else recording


def _on_disk(name: str) -> str:
    """Return the form in which Python has a name on the disk in UTF-8, whatever the locale: of ASCII, surrogates."""
    return os.fsdecode(name.encode())


def output_path(folder: str | Path, recording: str, suffix: str) -> Path:
    """
    Return the path in `folder` of a recording's output: its id, with `suffix` instead of that of an audio file.

    It is always inside of the folder and possible on usual file systems: `/data/a.wav` becomes `data/a.suffix`,
    `../a.wav` becomes `_up/a.suffix`, control characters are escaped as in `printable_name`, and names of over 255
    bytes are cut and end in a hash.
    """
    path = PurePosixPath(posixpath.normpath(_stem(printable_name(recording))))
    *folders, name = [_PARENT if part == ".." else part for part in path.parts if part.strip("/")] or ["_"]
    return Path(folder, *map(_on_disk, map(_fit, folders)), _on_disk(_fit(name, f".{suffix}")))


def output_paths(folder: str | Path, recordings: Iterable[str], suffix: str) -> dict[str, Path]:
    """
    Return the `output_path` of each recording, by id, after checking that all of them can be written.

    Warns of ids that their files cannot have, and of names that differ in case only. Raises `ValueError` if two
    recordings have the same file, a file of one is a folder of another, a folder or file on the disk is in the way, or
    a path is too long.
    """
    paths = {recording: output_path(folder, recording, suffix) for recording in recordings}
    _check_different(paths, Path(folder))
    _check_places(paths, Path(folder))
    changed = [name for name, path in paths.items() if path != Path(folder, _on_disk(f"{_stem(name)}.{suffix}"))]
    if changed:
        logger.warning(
            f"{len(changed):,} of {len(paths):,} recordings have names that are no possible names below {folder}"
            f" (absolute, with `..`, or too long), so others are used: {changed[0]} is written to {paths[changed[0]]}."
        )
    return paths


def _ignores_case(folder: Path) -> bool:
    """Return whether the disk of a folder, which need not exist yet, takes names that differ in case as the same."""
    for path in (folder.absolute(), *folder.absolute().parents):
        if path.name.swapcase() != path.name and path.exists():
            swapped = path.with_name(path.name.swapcase())
            return swapped.exists() and swapped.samefile(path)
    return False


def _check_different(paths: dict[str, Path], folder: Path) -> None:
    owners: dict[str, str] = {}
    alike: tuple[str, str] | None = None
    for name, path in paths.items():
        key = unicodedata.normalize("NFC", str(path)).casefold()
        other = owners.setdefault(key, name)
        if other == name:
            continue
        if paths[other] == path or _ignores_case(folder):
            same = [each for each in paths if paths[each] == path] if paths[other] == path else [other, name]
            raise ValueError(
                f"{', '.join(same[:9])} would all be written to {path}. Rename them, or take them one by one."
            )
        alike = alike or (other, name)
    if alike is not None:
        logger.warning("The files of %s and %s differ in case only: some disks cannot hold both.", *alike)


def _check_places(paths: dict[str, Path], folder: Path) -> None:
    owners = {path: name for name, path in paths.items()}
    folders: dict[Path, str] = {}
    for name, path in paths.items():
        if len(os.fsencode(path)) > _MAX_PATH_BYTES:
            problem = f"The path of {name[:80]}... below {folder} is longer than {_MAX_PATH_BYTES:,} bytes"
            raise ValueError(f"{problem}. Rename the recording.")
        if path.is_dir():
            raise ValueError(f"{name} would be written to {path}, which is a folder. Rename one of them.")
        for parent in path.parents:
            if parent in folders:
                break
            folders[parent] = name
            if parent in owners:
                problem = f"{owners[parent]} would be written to {parent}, which is the folder for {name}"
                raise ValueError(f"{problem}. Rename one of them.")
            if parent.exists() and not parent.is_dir():
                raise ValueError(f"{name} would be written to {path}, but {parent} is a file. Rename one of them.")
