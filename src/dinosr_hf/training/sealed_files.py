"""Digests by which the files of a checkpoint, and the file that lists them, are found to be what was written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils.digests import file_digest
from ..utils.names import printable_name
from ..utils.text_files import read_json
from .resume import CheckpointError

_SEAL = "sha256"  # the entry of a sealed file with the digest of all others


def describe_files(folder: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Return `bytes` and `sha256` of each file in a folder and below, by its path in the folder, with `/`."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    described = ({"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in files)
    return {path.relative_to(folder).as_posix(): entry for path, entry in zip(files, described, strict=True)}


def check_files(folder: str | os.PathLike, described: Any) -> None:
    """
    Check that files are as they were when `describe_files` described them.

    Raises `CheckpointError` if one is missing, truncated, changed, a link or outside the folder.
    """
    folder = Path(folder)
    if not isinstance(described, Mapping) or not all(isinstance(entry, Mapping) for entry in described.values()):
        raise CheckpointError(f"{folder} has no list of its files.")
    for name, expected in described.items():
        file = folder / name
        if "\0" in name or os.path.isabs(name) or file.resolve() != folder.resolve() / name:
            raise CheckpointError(f"{folder} lists {printable_name(name)}, which is a link or outside the folder.")
        if not file.is_file():
            raise CheckpointError(f"{folder} lacks {name}.")
        size = file.stat().st_size
        if size != expected.get("bytes"):
            raise CheckpointError(f"{file} has {size:,} bytes instead of {expected.get('bytes')}: it is truncated.")
        if file_digest(file) != expected.get("sha256"):
            raise CheckpointError(f"{file} is not what was written: its SHA-256 differs.")


def _seal_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def seal(content: Mapping[str, Any]) -> str:
    """Return JSON text of `content`, whose keys are strings, with the digest of it all."""
    plain = json.loads(json.dumps(content))  # as it will be read: lists for tuples
    return json.dumps({**plain, _SEAL: _seal_of(plain)}, indent=1) + "\n"


def read_sealed(path: str | os.PathLike) -> dict[str, Any]:
    """Return the content that `seal` wrote to a file. Raises `CheckpointError` if it is missing or not that."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}: it is unfinished, or from another program.")
    try:
        content = read_json(path)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.pop(_SEAL, None) != _seal_of(content):
        raise CheckpointError(f"{path} is not what was written: its SHA-256 differs, or it has none.")
    return content
