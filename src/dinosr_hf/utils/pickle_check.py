"""
Limit the time and memory that `torch.load` takes for a file of unknown origin, before it is read.

`torch.load(weights_only=True)` runs no code of a file, but these it cannot refuse once it has begun: tensors of
100,000 dimensions or larger than their storage, memory for bytes that the file does not have, dictionary keys that
collide or take forever to hash, cheap steps that repeat an expensive one. `PickleCheck` therefore follows the steps of
a pickle first. It knows tuples and lists by their items and other values by kind and length, and builds none of them.
The archive around the pickles must be one that Python and torch read in the same way, without parts that overlap.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import struct
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from .damaged_files import explain_damage

# Far above 24 layers with the optimizer's state (80,000 steps, 8,000 calls), and checked in less than a second.
LIMITS = {
    "steps": 250_000,
    "calls": 20_000,
    "tuples": 60_000,
    "values": 100_000,
    "large or fractional numbers as keys": 2_000,
}
MAX_PICKLE_BYTES = 16 * 2**20
MAX_DIRECTORY_BYTES = 2 * 2**20  # of an archive: 30,000 entries
MAX_LENGTH = 16  # of shapes, and of all else that torch goes through at each call

# Classes that become inert objects -> the entry of their state that has the values; None: all of it.
STAND_INS = {
    **dict.fromkeys(("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"), "_content"),
    **{f"omegaconf.nodes.{kind}Node": "_val" for kind in ("Any", "String", "Integer", "Float", "Boolean", "Enum")},
    **dict.fromkeys(("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "argparse.Namespace")),
    "fairseq.data.dictionary.Dictionary": None,  # in the state of fine-tuning tasks
    **dict.fromkeys(("typing.Any", *(f"builtins.{kind}" for kind in ("dict", "list", "bool", "int", "str", "float")))),
}
ITEM_SIZES = {
    **dict.fromkeys(("torch.DoubleStorage", "torch.LongStorage"), 8),
    **dict.fromkeys(("torch.FloatStorage", "torch.IntStorage"), 4),
    **dict.fromkeys(("torch.HalfStorage", "torch.BFloat16Storage", "torch.ShortStorage"), 2),
    **dict.fromkeys(("torch.CharStorage", "torch.ByteStorage", "torch.BoolStorage"), 1),
}
KNOWN = {
    *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch.Size", "torch.device"),
    *("collections.OrderedDict", "collections.defaultdict", *STAND_INS, *ITEM_SIZES),
}
PYTHON_2 = {"__builtin__.long": "builtins.int", "__builtin__.unicode": "builtins.str"}

LITERALS = {
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1"),
    *("BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"),
}
# Number of values that a step takes from the stack.
TAKEN = {
    **dict.fromkeys(("TUPLE1", "APPEND", "BINPERSID", "BUILD"), 1),
    **dict.fromkeys(("TUPLE2", "SETITEM", "REDUCE", "NEWOBJ"), 2),
    "TUPLE3": 3,
}


LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
NOT_TORCH = "it is a zip archive, but not one that torch.save writes"


class Refused(Exception):
    """Why a file is not opened."""


def expect(condition: bool, problem: str) -> None:
    """Raise `Refused` with a problem unless a condition holds."""
    if not condition:
        raise Refused(problem)


@dataclass
class Value:
    """A global (its kind is its name), or a storage, tensor, dictionary or object with its number of elements."""

    kind: str
    length: int = 0


def _are_counts(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 2**48 for value in values)


class PickleCheck:
    """
    Check all pickles of one file; a method raises `Refused` for what no checkpoint needs.

    Args:
        num_bytes: Size of the file.
        storages: Number of bytes in the file for each storage; None: unknown, but together no more than `num_bytes`.
    """

    def __init__(self, num_bytes: int, storages: dict[str, int] | None = None) -> None:
        self.free_bytes, self.storages = num_bytes, storages
        self.claims: dict[str, tuple[str, int]] = {}
        self.counts: Counter[str] = Counter()

    def count(self, what: str, number: int = 1) -> None:
        """Count something that `LIMITS` bounds."""
        self.counts[what] += number
        if self.counts[what] > LIMITS[what]:
            raise Refused(f"it has more than {LIMITS[what]:,} {what}")

    def follow(self, stream: BinaryIO) -> Any:
        """Return the value of one pickle and leave the stream behind it; a damaged one raises errors of its own."""
        stack: list[Any] = []
        outer: list[list[Any]] = []  # the stacks below each mark
        memo: dict[int, Any] = {}
        arg: Any
        for opcode, arg, _ in pickletools.genops(stream):
            self.count("steps")
            items: list[Any] = []
            if opcode.name in ("TUPLE", "APPENDS", "SETITEMS"):
                items, stack = stack, outer.pop()
            elif number := TAKEN.get(opcode.name):
                items, stack[-number:] = stack[-number:], []
            match opcode.name:
                case "BINPUT" | "LONG_BINPUT":
                    expect(arg <= self.counts["steps"], "it numbers its values so that they may collide")
                    memo[arg] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[arg])
                case name if name in LITERALS:
                    stack.append(arg)  # None for true and false
                case "MARK":
                    outer.append(stack)
                    stack = []
                case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" | "EMPTY_TUPLE":
                    self.count("tuples")
                    stack.append(tuple(items))
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append(Value("dict"))
                case "APPEND" | "APPENDS":
                    stack[-1].extend(items)
                case "SETITEM" | "SETITEMS":
                    self._add_keys(stack[-1], items[::2])
                case "GLOBAL":
                    stack.append(self._find(arg))
                case "BINPERSID":
                    stack.append(self._storage(*items[0]))
                case "REDUCE" | "NEWOBJ":
                    stack.append(self._call(*items))
                case "BUILD":
                    self._set_state(stack[-1], *items)
                case "STOP":
                    return stack.pop()
                case name if name != "PROTO":
                    raise Refused(f"its pickle has the step {name}, which no checkpoint needs")

    def _add_keys(self, target: Value, keys: list[Any]) -> None:
        expect(target.kind == "dict", "it puts entries into what is no dictionary")
        is_plain = all(isinstance(key, str | int | float | None) for key in keys)
        expect(is_plain, "it has a dictionary whose keys are not text or numbers")
        # Text is hashed with a random seed; of numbers, all but small integers can be chosen to collide.
        unusual = [key for key in keys if not isinstance(key, str) and not (_are_counts(key) and key < 2**16)]
        self.count("large or fractional numbers as keys", len(unusual))
        target.length += len(keys)

    def _set_state(self, target: Value, state: Any) -> None:
        self.count("calls")
        is_metadata = target.kind == "dict" and state.kind == "dict" and state.length <= MAX_LENGTH  # torch copies it
        expect(target.kind == "object" or is_metadata, "it fills in what is no object")

    def _find(self, arg: str) -> Value:
        self.count("calls")
        name = arg.replace(" ", ".", 1)
        name = PYTHON_2.get(name, name.replace("__builtin__.", "builtins.", 1))
        expect(name in KNOWN, f"it asks for {name[:100]}, which is neither a tensor nor a plain container")
        return Value(name)

    def _storage(self, tag: str, function: Value, key: str, _: str, length: int, *view: None) -> Value:
        self.count("calls")
        is_usual = tag == "storage" and isinstance(key, str) and _are_counts(length) and view in ((), (None,))
        expect(is_usual, "it describes a storage that cannot be")
        num_bytes = length * ITEM_SIZES[function.kind]
        if key not in self.claims:
            free = self.free_bytes if self.storages is None else self.storages.get(key, 0)
            expect(num_bytes <= free, f"it claims a tensor of {num_bytes:,} bytes, but has {free:,} for it")
            self.free_bytes -= num_bytes
        claim = function.kind, length
        expect(self.claims.setdefault(key, claim) == claim, "it describes a storage in two ways")
        return Value("storage", length)

    def _call(self, function: Value, args: tuple[Any, ...]) -> Value:
        self.count("calls")
        expect(isinstance(args, tuple) and len(args) <= MAX_LENGTH, "it makes a call that no checkpoint needs")
        match (function.kind, *args):
            case ("torch._utils._rebuild_tensor_v2", Value("storage", size), offset, tuple(shape), tuple(steps), _, _):
                _check_tensor(size, offset, shape, steps)
                return Value("tensor")
            case ("torch._utils._rebuild_parameter", Value("tensor") as tensor, _, _):
                return tensor
            case ("collections.OrderedDict",) | ("collections.defaultdict", *_):
                return Value("dict")
            case ("torch.Size", tuple(shape)) if len(shape) <= MAX_LENGTH:
                return Value("object")
            case (kind, *_) if kind in STAND_INS or kind == "torch.device":
                return Value("object")
        raise Refused("it makes a call that no checkpoint needs")


def _check_tensor(length: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    expect(len(shape) <= MAX_LENGTH, f"it describes a tensor of {len(shape):,} dimensions")
    is_possible = len(shape) == len(stride) and _are_counts(offset, *shape, *stride)
    expect(is_possible, "it describes a tensor that cannot be")
    last = offset + sum((count - 1) * step for count, step in zip(shape, stride, strict=True))
    # The second condition refuses one number that is repeated over gigabytes.
    if (size := math.prod(shape)) and (last >= length or size > length):
        raise Refused(f"it claims a tensor of shape {shape} in {length:,} numbers")


def _check_end(stream: BinaryIO, num_bytes: int) -> tuple[int, int]:
    """
    Return the number of entries of a zip archive and where their directory begins, before it is read.

    The directory reaches to the records at the archive's end, and these to the file's. Otherwise Python and torch may
    read two directories, so that what is checked is not what is loaded.
    """
    stream.seek(max(0, num_bytes - 98))
    tail = stream.read()
    *_, count, size, start, comment = struct.unpack("<4s4H2LH", tail[-22:])
    num_end_bytes = 22
    if tail[-42:-38] == b"PK\x06\x07":  # of the records for large archives
        num_end_bytes = 98
        expect(struct.unpack("<4sLQL", tail[-42:-22])[2] == num_bytes - num_end_bytes, NOT_TORCH)
        *_, count, size, start = struct.unpack("<4sQ2H2L4Q", tail[-98:-42])
    expect(comment == 0 and start + size + num_end_bytes == num_bytes, NOT_TORCH)
    expect(size <= MAX_DIRECTORY_BYTES, f"the directory of its archive has more than {MAX_DIRECTORY_BYTES:,} bytes")
    return count, start


def _check_zip(stream: BinaryIO, num_bytes: int) -> None:
    count, end = _check_end(stream, num_bytes)
    with zipfile.ZipFile(stream) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        is_stored = all(entry.compress_type == 0 and entry.compress_size == entry.file_size for entry in entries)
        # torch's reader of archives ignores the case of names, and does not look for one that begins later.
        is_unique = len({entry.filename.lower() for entry in entries}) == len(entries) == count
        expect(len(pickles) == 1 and is_stored and is_unique and entries[0].header_offset == 0, NOT_TORCH)
        ends = [*(entry.header_offset for entry in entries[1:]), end]
        is_apart = all(e.header_offset + e.file_size < after for e, after in zip(entries, ends, strict=True))
        expect(is_apart, "parts of its archive overlap")
        expect(pickles[0].file_size <= MAX_PICKLE_BYTES, f"its pickle has more than {MAX_PICKLE_BYTES:,} bytes")
        folder = pickles[0].filename.removesuffix("data.pkl") + "data/"
        sizes = {entry.filename.removeprefix(folder): entry.file_size for entry in entries}
        PickleCheck(num_bytes, sizes).follow(io.BytesIO(archive.read(pickles[0])))


def _check_legacy(stream: BinaryIO, num_bytes: int) -> None:
    """Check a file from before torch 1.6: five pickles one after another, then the storages."""
    start = io.BytesIO(stream.read(MAX_PICKLE_BYTES))
    try:
        tarfile.TarInfo.frombuf(start.getvalue()[: tarfile.BLOCKSIZE], tarfile.ENCODING, "surrogateescape")
    except tarfile.TarError:
        check = PickleCheck(num_bytes)
    else:
        raise Refused("it can be read as a tar archive too, which torch tries first")
    expect(check.follow(start) == LEGACY_MAGIC, "it is not what torch.save writes")
    *_, keys = [check.follow(start) for _ in ("version", "system", "content", "keys of the storages")]
    is_list = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    expect(is_list and check.claims.keys() <= set(keys), "it lacks storages that it describes")


@contextmanager
def refusing(file: str | os.PathLike) -> Iterator[None]:
    """Raise `ValueError`, with the file's name, for whatever goes wrong in a body that reads what torch.save wrote."""
    problem = f"{file} cannot be opened as a checkpoint without running code from it: "
    try:
        yield
    except Refused as error:
        raise ValueError(f"{problem}{error}.") from error
    except Exception as error:  # pickletools, zipfile and torch each raise their own for a damaged file
        raise ValueError(f"{problem}it is damaged ({error.__class__.__name__}).") from error


def check_torch_file(file: str | os.PathLike) -> bool:
    """
    Raise `ValueError` for a file that `torch.load(weights_only=True)` should not read; return whether it is a zip.

    Args:
        file: Path of what `torch.save` wrote, in any version of its format.
    """
    if (damage := explain_damage(file)) is not None:
        raise ValueError(damage)
    with open(file, "rb") as stream:
        start = stream.read(4)
        is_zip = start == b"PK\x03\x04"  # as torch.load decides
        if not is_zip and start[:1] != b"\x80":  # of a pickle
            raise ValueError(f"{file} is not a checkpoint that torch.save wrote.")
        stream.seek(0)
        with refusing(file):
            (_check_zip if is_zip else _check_legacy)(stream, os.fstat(stream.fileno()).st_size)
    return is_zip
