"""
Read a checkpoint that may come from anyone, without running anything of it.

`pickle_check` refuses files that are out of bounds, then `torch.load(weights_only=True)` reads the file. It imports
nothing that the file names: classes of omegaconf and argparse become inert `StandIn` objects, and these dictionaries.
"""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from ...utils.damaged_files import explain_damage
from .pickle_check import STAND_INS, PickleCheck, Refused, require

MAX_PICKLE_BYTES = 16 * 2**20
MAX_DEPTH = 50
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class ConversionError(ValueError):
    """A checkpoint cannot be converted; the message says why."""


class StandIn:
    """An object of a class that is not imported: it keeps its state and calls nothing."""

    state: Any = None
    entry: str | None = None  # of the state, where the values are; None: all of it

    def __new__(cls, *args: Any) -> StandIn:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


SAFE_GLOBALS: list[Any] = [
    *((type(name, (StandIn,), {"entry": entry}), name) for name, entry in STAND_INS.items()),
    (lambda *_: {}, "collections.defaultdict"),
]


def _check_zip(file: Path, num_bytes: int) -> None:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        is_stored = all(entry.compress_type == 0 and entry.compress_size == entry.file_size for entry in entries)
        # torch's reader of archives ignores the case of names, and does not look for one that begins later.
        is_unique = len({entry.filename.lower() for entry in entries}) == len(entries)
        is_usual = len(pickles) == 1 and is_stored and is_unique and min(e.header_offset for e in entries) == 0
        require(is_usual, "it is a zip archive, but not one that torch.save writes")
        require(pickles[0].file_size <= MAX_PICKLE_BYTES, f"its pickle has more than {MAX_PICKLE_BYTES:,} bytes")
        folder = pickles[0].filename.removesuffix("data.pkl") + "data/"
        sizes = {e.filename.removeprefix(folder): min(e.file_size, num_bytes - e.header_offset) for e in entries}
        PickleCheck(num_bytes, sizes).follow(io.BytesIO(archive.read(pickles[0])))


def _check_legacy(file: Path, num_bytes: int) -> None:
    """Check a file from before torch 1.6: five pickles one after another, then the storages."""
    with file.open("rb") as stream:
        start = io.BytesIO(stream.read(MAX_PICKLE_BYTES))
    check = PickleCheck(num_bytes)
    require(check.follow(start) == LEGACY_MAGIC, "it is not what torch.save writes")
    *_, keys = [check.follow(start) for _ in ("version", "system", "content", "keys of the storages")]
    is_list = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    require(is_list and check.claims.keys() <= set(keys), "it lacks storages that it describes")


def _plain(value: Any, check: PickleCheck, depth: int = 0) -> Any:
    """Return containers, values and tensors alone: configurations become dictionaries and lists."""
    check.count("values")  # shared ones as often as they are referred to
    require(depth <= MAX_DEPTH, f"it nests containers more than {MAX_DEPTH} deep, or in themselves")
    if isinstance(value, StandIn):
        state = value.state if isinstance(value.state, dict) else {}
        return _plain(state if value.entry is None else state.get(value.entry), check, depth + 1)
    if isinstance(value, dict):
        return {key: _plain(item, check, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item, check, depth + 1) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value.detach() if isinstance(value, torch.Tensor) else value


def _open(file: Path, is_zip: bool) -> Any:
    num_bytes = file.stat().st_size
    (_check_zip if is_zip else _check_legacy)(file, num_bytes)
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()  # the real classes may be among them
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    finally:
        torch.serialization.add_safe_globals(others)
    return _plain(content, PickleCheck(num_bytes))


def open_checkpoint(file: str | os.PathLike) -> dict[Any, Any]:
    """
    Read a checkpoint as plain containers, values and tensors.

    Tensors of a file from torch 1.6 or later stay mapped: they are read when used, and writing to them does not change
    the file.

    Args:
        file: Path of what `torch.save` wrote, in any version of its format.

    Raises:
        ConversionError: If the file is damaged, out of bounds, or not a dictionary of tensors, plain containers and
            configurations.
    """
    file = Path(file)
    if not file.is_file():
        raise ConversionError(f"{file} is not a file. Give the path of a checkpoint.")
    with file.open("rb") as stream:
        start = stream.read(4)
    is_zip = start == b"PK\x03\x04"  # as torch.load decides
    if (damage := explain_damage(file)) is not None:
        raise ConversionError(damage)
    if not is_zip and start[:1] != b"\x80":  # of a pickle
        raise ConversionError(f"{file} is not a checkpoint that torch.save wrote.")
    problem = f"{file} cannot be opened as a checkpoint without running code from it: "
    try:
        checkpoint = _open(file, is_zip)
    except Refused as error:
        raise ConversionError(f"{problem}{error}.") from error
    except Exception as error:  # pickletools, zipfile and torch each raise their own for a damaged file
        raise ConversionError(f"{problem}it is damaged ({error.__class__.__name__}).") from error
    if not isinstance(checkpoint, dict):
        raise ConversionError(f"{file} holds a {type(checkpoint).__name__}, not a checkpoint's dictionary.")
    return checkpoint
