"""
Read a checkpoint that may come from anyone, without running anything of it.

`pickle_check` refuses files that are out of bounds, then `torch.load(weights_only=True)` reads the file. It imports
nothing that the file names: classes of omegaconf and argparse become inert `StandIn` objects, and these dictionaries.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ...utils.pickle_check import STAND_INS, PickleCheck, check_torch_file, expect, refusing

MAX_DEPTH = 50


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


def _plain(value: Any, check: PickleCheck, depth: int = 0) -> Any:
    """Return containers, values and tensors alone: configurations become dictionaries and lists."""
    check.count("values")  # shared ones as often as they are referred to
    expect(depth <= MAX_DEPTH, f"it nests containers more than {MAX_DEPTH} deep, or in themselves")
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
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()  # the real classes may be among them
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    finally:
        torch.serialization.add_safe_globals(others)
    return _plain(content, PickleCheck(file.stat().st_size))


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
    try:
        is_zip = check_torch_file(file)
        with refusing(file):
            checkpoint = _open(file, is_zip)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    if not isinstance(checkpoint, dict):
        raise ConversionError(f"{file} holds a {type(checkpoint).__name__}, not a checkpoint's dictionary.")
    return checkpoint
