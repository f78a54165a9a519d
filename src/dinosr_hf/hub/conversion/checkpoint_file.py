"""
Open a checkpoint without running anything of it.

A checkpoint is a pickle, a program for a small machine, beside the bytes of its tensors. `read_pickle` is such a
machine that can call nothing: names of classes and functions stay names, those of a fixed list become plain data,
every other one is refused. Nothing is imported, and no memory is taken for what a file claims, but does not have.
"""

from __future__ import annotations

import math
import os
import pickletools
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

# Far above what a checkpoint of a large model has (tens of thousands of steps), and read in less than a second.
MAX_STEPS = 250_000
MAX_PICKLE_BYTES = 16 * 2**20
MAX_DEPTH = 50
MAX_VALUES = 1_000_000
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class CheckpointError(ValueError):
    """A checkpoint that cannot be converted; the message says what about it."""


@dataclass(frozen=True)
class Name:
    """A class or function that the file names."""

    full: str


@dataclass
class Inert:
    """An object of a named class, as data: its arguments, and the state that was to be put into it."""

    name: str
    args: tuple = ()
    state: Any = None


@dataclass(frozen=True)
class Claim:
    """A tensor as the file describes it; sizes in elements."""

    key: str
    dtype: torch.dtype
    storage_size: int
    offset: int = 0
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()


STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
MAPPINGS = ("collections.OrderedDict", "collections.defaultdict")
NODES = ("Any", "String", "Integer", "Float", "Boolean", "Enum")
OMEGACONF_NODES = tuple(f"omegaconf.nodes.{kind}Node" for kind in NODES)
# torch.load(weights_only=True) does not know these: a file that has one is built from what `read_pickle` returns.
ONLY_HERE = (
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", *OMEGACONF_NODES),
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "typing.Any", "argparse.Namespace"),
    *("builtins.dict", "builtins.list", "builtins.int", "builtins.str", "builtins.float", "builtins.bool"),
)
KNOWN = {*STORAGES, *MAPPINGS, *ONLY_HERE, "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"}
KNOWN |= {"torch.Size", "torch.device"}
OLD_NAMES = {"__builtin__.long": "builtins.int", "__builtin__.unicode": "builtins.str"}


class Refused(Exception):
    """Why a file is not opened."""


def _name(module: str, name: str) -> Name:
    full = f"{module}.{name}"
    full = OLD_NAMES.get(full, full.replace("__builtin__.", "builtins.", 1))
    if full not in KNOWN:
        raise Refused(f"it asks for {full[:100]}, which is neither a tensor nor a plain container")
    return Name(full)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _tensor(args: tuple) -> Claim:
    storage, offset, shape, stride = args[:4]
    counts = [offset, *shape, *stride]
    if not isinstance(storage, Claim) or len(shape) != len(stride) or not all(map(_is_count, counts)):
        raise Refused("it describes a tensor that cannot be")
    size = math.prod(shape)
    last = offset + sum((count - 1) * step for count, step in zip(shape, stride, strict=True))
    # The second refuses one number that is to be spread over gigabytes.
    if size and (last >= storage.storage_size or size > storage.storage_size):
        raise Refused(f"it claims a tensor of shape {tuple(shape)} in {storage.storage_size:,} numbers")
    return Claim(storage.key, storage.dtype, storage.storage_size, offset, tuple(shape), tuple(stride))


def _call(function: Any, args: Any) -> Any:
    if not isinstance(function, Name) or not isinstance(args, tuple):
        raise Refused("it calls what is no function")
    name = function.full
    if name == "torch._utils._rebuild_tensor_v2" and len(args) >= 4:
        return _tensor(args)
    if name == "torch._utils._rebuild_parameter" and args and isinstance(args[0], Claim):
        return args[0]
    if name in MAPPINGS:
        return {}
    if name in ("torch.Size", "torch.device"):
        return args[0] if args else ()
    return Inert(name, args)


def _storage(pid: Any) -> Claim:
    match pid:
        case ("storage", Name(full=kind), str(key), _, int(size), *_) if kind in STORAGES and _is_count(size):
            return Claim(key, STORAGES[kind], size)
    raise Refused("it describes numbers that cannot be")


class _Machine:
    """The stack of a pickle. Every method is a step; `names` are the classes and functions seen."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.names: set[str] = set()

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def last(self, count: int) -> tuple:
        items = tuple(self.stack[-count:])
        if len(items) < count:
            raise IndexError
        del self.stack[-count:]
        return items

    def put(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise Refused("it puts entries into what is no dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # Others could take for ever to hash.
            if not isinstance(key, str | int | float | None):
                raise Refused("it has a dictionary whose keys are not text or numbers")
            target[key] = value

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise Refused("it appends to what is no list")
        self.stack[-1].extend(items)

    def build(self) -> None:
        (state,) = self.last(1)
        target = self.stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, dict):  # the metadata of a state dict, of which nothing is needed
            raise Refused("it fills in what is no object")

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused("it asks for a class without a name")
        self.stack.append(found := _name(module, name))
        self.names.add(found.full)

    def step(self, code: str, arg: Any) -> None:
        if code in CONSTANTS:
            self.stack.append(CONSTANTS[code]())
        elif code in LITERALS:
            self.stack.append(arg)
        elif code in STEPS:
            STEPS[code](self, arg)
        elif code not in ("PROTO", "FRAME"):
            raise Refused(f"its pickle has the step {code}, which no checkpoint needs")


CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINBYTES", "SHORT_BINBYTES", "BINSTRING", "SHORT_BINSTRING"),
}


def _memo_put(machine: _Machine, arg: int) -> None:
    machine.memo[arg] = machine.stack[-1]


STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.stack.append(machine.last(1)),
    "TUPLE2": lambda machine, _: machine.stack.append(machine.last(2)),
    "TUPLE3": lambda machine, _: machine.stack.append(machine.last(3)),
    "APPEND": lambda machine, _: machine.extend(list(machine.last(1))),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.put(list(machine.last(2))),
    "SETITEMS": lambda machine, _: machine.put(machine.since_mark()),
    "BUILD": lambda machine, _: machine.build(),
    "GLOBAL": lambda machine, arg: machine.name(*arg.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name(*machine.last(2)),
    "REDUCE": lambda machine, _: machine.stack.append(_call(*machine.last(2))),
    "NEWOBJ": lambda machine, _: machine.stack.append(_call(*machine.last(2))),
    "BINPERSID": lambda machine, _: machine.stack.append(_storage(machine.last(1)[0])),
    "MEMOIZE": lambda machine, _: _memo_put(machine, len(machine.memo)),
    "BINPUT": _memo_put,
    "LONG_BINPUT": _memo_put,
    "BINGET": lambda machine, arg: machine.stack.append(machine.memo[arg]),
    "LONG_BINGET": lambda machine, arg: machine.stack.append(machine.memo[arg]),
}


def read_pickle(stream: BinaryIO) -> tuple[Any, set[str]]:
    """
    Follow a pickle's steps with plain data only; the stream then stands behind it.

    Returns:
        The content: plain containers and values, `Inert` for objects, `Claim` for tensors. And the names in it.

    Raises:
        Refused: If it is no pickle, is damaged, has another class or function, or is too large.
    """
    machine = _Machine()
    try:
        for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
            if count > MAX_STEPS:
                raise Refused(f"its pickle has more than {MAX_STEPS:,} steps")
            if opcode.name == "STOP":
                (content,) = machine.last(1)
                return content, machine.names
            machine.step(opcode.name, arg)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeError, struct.error) as error:
        raise Refused(f"it is no pickle, or a damaged one ({error.__class__.__name__})") from error
    raise Refused("its pickle does not end")


def _inert_value(value: Inert) -> Any:
    """What an object is about: the values of a configuration, without its metadata."""
    if isinstance(value.state, tuple) and len(value.state) == 2:
        value.state = value.state[1]
    state = value.state if isinstance(value.state, dict) else {}
    if "omegaconf" in value.name:
        return state.get("_val" if value.name in OMEGACONF_NODES else "_content")
    return state


def plain(content: Any, tensor: Callable[[Claim], Any]) -> Any:
    """
    Containers and values alone.

    Args:
        content: As from `read_pickle`.
        tensor: What to put where a tensor is.

    Raises:
        Refused: If it is nested too deeply, or contains itself, or would be huge when written out.
    """
    done: dict[int, tuple[Any, int]] = {}
    open_ids: set[int] = set()

    def walk(value: Any, depth: int) -> tuple[Any, int]:
        if not isinstance(value, dict | list | tuple | Inert | Claim | Name):
            return value, 1
        if id(value) in done:
            return done[id(value)]
        if depth > MAX_DEPTH or id(value) in open_ids:
            raise Refused(f"it nests containers more than {MAX_DEPTH} deep, or in themselves")
        open_ids.add(id(value))
        size = 1
        result: Any
        if isinstance(value, Claim):
            result = tensor(value)
        elif isinstance(value, Name):
            result = value.full
        elif isinstance(value, Inert):
            result, size = walk(_inert_value(value), depth + 1)
        else:
            items = [walk(item, depth + 1) for item in (value.values() if isinstance(value, dict) else value)]
            size += sum(size for _, size in items)
            inner = [item for item, _ in items]
            result = dict(zip(value, inner, strict=True)) if isinstance(value, dict) else type(value)(inner)
        if size > MAX_VALUES:
            raise Refused(f"it refers to its own parts so often that it has more than {MAX_VALUES:,} values")
        open_ids.discard(id(value))
        done[id(value)] = result, size
        return done[id(value)]

    return walk(content, 0)[0]


# Where the numbers of a storage begin, and how many bytes there are.
Places = dict[str, tuple[int, int]]


def _read_zip(file: Path) -> tuple[Any, set[str], Places]:
    with zipfile.ZipFile(file) as archive, file.open("rb") as raw:
        entries = archive.infolist()
        twice = [name for name, count in Counter(entry.filename for entry in entries).items() if count > 1]
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or twice or any(entry.compress_type for entry in entries):
            raise Refused("it is a zip archive, but not one that torch.save writes")
        if pickles[0].file_size > MAX_PICKLE_BYTES:
            raise Refused(f"its pickle has more than {MAX_PICKLE_BYTES:,} bytes")
        places: Places = {}
        folder = pickles[0].filename.removesuffix("data.pkl") + "data/"
        for entry in entries:
            if entry.filename.startswith(folder):
                raw.seek(entry.header_offset + 26)
                name_length, extra_length = struct.unpack("<HH", raw.read(4))
                start = entry.header_offset + 30 + name_length + extra_length
                places[entry.filename.removeprefix(folder)] = start, entry.file_size
        with archive.open(pickles[0]) as stream:
            content, names = read_pickle(stream)  # type: ignore[arg-type]
    return content, names, places


def _read_legacy(file: Path) -> tuple[Any, set[str], Places]:
    """What torch.save wrote before 1.6: pickles one after another, then a count and the numbers of each storage."""
    with file.open("rb") as stream:
        if read_pickle(stream)[0] != LEGACY_MAGIC:
            raise Refused("it is not what torch.save writes")
        read_pickle(stream)
        read_pickle(stream)
        content, names = read_pickle(stream)
        keys, _ = read_pickle(stream)
        sizes: dict[str, int] = {}
        plain(content, lambda claim: sizes.setdefault(claim.key, claim.dtype.itemsize))
        places: Places = {}
        for key in keys if isinstance(keys, list) else []:
            (count,) = struct.unpack("<q", stream.read(8))
            places[key] = stream.tell(), count * sizes.get(key, 1)
            stream.seek(max(0, places[key][1]), os.SEEK_CUR)
    return content, names, places


def _open(file: Path) -> Any:
    is_zip = zipfile.is_zipfile(file)
    content, names, places = (_read_zip if is_zip else _read_legacy)(file)
    length = file.stat().st_size
    storages: dict[str, torch.UntypedStorage] = {}

    def check(claim: Claim) -> None:
        start, num_bytes = places.get(claim.key, (0, 0))
        wanted = claim.storage_size * claim.dtype.itemsize
        if wanted > num_bytes or start + num_bytes > length:
            raise Refused(f"it claims a tensor of {wanted:,} bytes, but has {min(num_bytes, length):,} for it")

    def build(claim: Claim) -> torch.Tensor:
        start, num_bytes = places[claim.key]
        if claim.key not in storages:
            storage = whole[start : start + num_bytes] if num_bytes else torch.UntypedStorage(0)
            storages[claim.key] = storage if start % claim.dtype.itemsize == 0 else storage.clone()
        return torch.empty(0, dtype=claim.dtype).set_(storages[claim.key], claim.offset, claim.shape, claim.stride)

    plain(content, check)
    if not names & set(ONLY_HERE):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    whole: Any = torch.UntypedStorage.from_file(str(file), False, length)
    return plain(content, build)


def open_checkpoint(file: str | os.PathLike) -> dict[Any, Any]:
    """
    Read a checkpoint that may come from anyone.

    The file is checked by `read_pickle` first. Then `torch.load(weights_only=True)` opens it if it has only what that
    knows; configurations of omegaconf and argparse become plain dictionaries here. Tensors stay in the file until
    they are used (mapped, not read), and writing to them does not change it.

    Args:
        file: As torch.save wrote it, of any version.

    Raises:
        CheckpointError: Says what is wrong with the file.
    """
    file = Path(file)
    if not file.is_file():
        raise CheckpointError(f"{file} is not a file. Give the path of a checkpoint.")
    problem = f"{file} cannot be opened as a checkpoint without running code from it: "
    try:
        checkpoint = _open(file)
    except Refused as error:
        raise CheckpointError(f"{problem}{error}.") from error
    except Exception as error:
        # zipfile and torch raise a class of their own for each way in which a file can be wrong
        raise CheckpointError(f"{problem}it is damaged ({error.__class__.__name__}).") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{file} holds a {type(checkpoint).__name__}, not a checkpoint's dictionary.")
    return checkpoint
