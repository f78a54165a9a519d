"""What is wrong with a file that does not open: it is empty, cut, or a Git LFS pointer or web page in its place."""

from __future__ import annotations

import json
import math
import os
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .names import one_line, printable_name

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
_AGAIN = "Download it again."


def explain_stand_in(start: bytes, num_bytes: int | None) -> str | None:
    """
    Say what is in the place of a file that starts with these bytes, and what to do; None if it may be the file.

    `num_bytes` is its size, None if it is not known.
    """
    size = "" if num_bytes is None else f" of {num_bytes:,} bytes"
    if start.startswith(LFS_POINTER):
        advice = "Run `git lfs pull` in its repository, or download the file."
        return f"is a Git LFS pointer{size}, not the file itself. {advice}"
    if start[:100].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return f"is a web page{size}, not the file itself. {_AGAIN}"
    return None


def safetensors_shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """
    Return the shapes of the tensors of a safetensors file, by name; only its header is read.

    Raises `ValueError` if it is no such file, or has other bytes than its header says.
    """
    try:
        with safe_open(path, "numpy") as opened:
            names = opened.keys()
            return {name: tuple(opened.get_slice(name).get_shape()) for name in names}
    except (OSError, SafetensorError) as error:
        reason = printable_name(one_line(error))[:200]  # may have the name of a tensor
        raise ValueError(f"is damaged: {reason} ({os.path.getsize(path):,} bytes). {_AGAIN}") from error


def _ends_as_parquet(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-min(4, os.path.getsize(path)), os.SEEK_END)
        return file.read() in (b"PAR1", b"PARE")  # the second: with an encrypted footer


def explain_damage(path: str | os.PathLike) -> str | None:
    """
    Say what is wrong with a file, in a sentence that begins with its path, and what to do; None if it looks whole.

    Knows Git LFS pointers, web pages, empty files, and incomplete safetensors, zip archives (`torch.save`, `.npz`) and
    JSON.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        return f"{path} is not a regular file. Give a regular file."
    try:
        with open(path, "rb") as file:
            start = file.read(512)
        size = os.path.getsize(path)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}."
    if size == 0:
        return f"{path} is empty (0 bytes). {_AGAIN}"
    if (problem := explain_stand_in(start, size)) is not None:
        return f"{path} {problem}"
    if path.suffix == ".safetensors":
        try:
            safetensors_shapes(path)
        except ValueError as error:
            return f"{path} {error}"
    elif path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            return f"{path} is not valid JSON ({error}; {size:,} bytes). {_AGAIN}"
    elif start.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(path):
            return f"{path} was cut: it begins as an archive of {size:,} bytes, but has no end. {_AGAIN}"
    elif path.suffix == ".parquet" and not _ends_as_parquet(path):
        return f"{path} is not a whole Parquet file: it has {size:,} bytes, and no end. {_AGAIN}"
    elif path.suffix in (".bin", ".pt", ".ckpt") and not start.startswith(b"\x80"):  # of a pickle
        return f"{path} is not what torch.save writes ({size:,} bytes). {_AGAIN}"
    return None


def count_weights(paths: list[Path]) -> int:
    """Return the number of weights in safetensors files. Raises `ValueError` with the path of a damaged one."""
    count = 0
    for path in paths:
        try:
            count += sum(map(math.prod, safetensors_shapes(path).values()))
        except ValueError as error:
            raise ValueError(f"{path} {error}") from error
    return count
