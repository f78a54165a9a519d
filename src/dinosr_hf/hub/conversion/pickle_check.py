"""
Check the cost of a checkpoint's pickles before torch reads them.

`torch.load(weights_only=True)` runs no code of a file, but these it cannot refuse once it has begun: tensors of
100,000 dimensions or larger than their storage, memory for bytes that the file does not have, dictionary keys that
collide or take forever to hash, cheap steps that repeat an expensive one. `PickleCheck` therefore follows the steps of
a pickle first. It knows tuples and lists by their items and other values by kind and length, and builds none of them.
"""

from __future__ import annotations

import math
import pickletools
from collections import Counter
from dataclasses import dataclass
from typing import Any, BinaryIO

# Far above 24 layers with the optimizer's state (80,000 steps, 8,000 calls), and checked in less than a second.
LIMITS = {
    "steps": 250_000,
    "calls": 20_000,
    "tuples": 60_000,
    "values": 100_000,
    "large or fractional numbers as keys": 2_000,
}
MAX_LENGTH = 16  # of shapes, and of all else that torch goes through at each call

# Classes that become inert objects -> the entry of their state that has the values; None: all of it.
STAND_INS = {
    **dict.fromkeys(("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"), "_content"),
    **{f"omegaconf.nodes.{kind}Node": "_val" for kind in ("Any", "String", "Integer", "Float", "Boolean", "Enum")},
    **dict.fromkeys(("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "argparse.Namespace")),
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


class Refused(Exception):
    """Why a file is not opened."""


def require(condition: bool, problem: str) -> None:
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
                    require(arg <= self.counts["steps"], "it numbers its values so that they may collide")
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
        require(target.kind == "dict", "it puts entries into what is no dictionary")
        is_plain = all(isinstance(key, str | int | float | None) for key in keys)
        require(is_plain, "it has a dictionary whose keys are not text or numbers")
        # Text is hashed with a random seed; of numbers, all but small integers can be chosen to collide.
        unusual = [key for key in keys if not isinstance(key, str) and not (_are_counts(key) and key < 2**16)]
        self.count("large or fractional numbers as keys", len(unusual))
        target.length += len(keys)

    def _set_state(self, target: Value, state: Any) -> None:
        self.count("calls")
        is_metadata = target.kind == "dict" and state.kind == "dict" and state.length <= MAX_LENGTH  # torch copies it
        require(target.kind == "object" or is_metadata, "it fills in what is no object")

    def _find(self, arg: str) -> Value:
        self.count("calls")
        name = arg.replace(" ", ".", 1)
        name = PYTHON_2.get(name, name.replace("__builtin__.", "builtins.", 1))
        require(name in KNOWN, f"it asks for {name[:100]}, which is neither a tensor nor a plain container")
        return Value(name)

    def _storage(self, tag: str, function: Value, key: str, _: str, length: int, *view: None) -> Value:
        self.count("calls")
        is_usual = tag == "storage" and isinstance(key, str) and _are_counts(length) and view in ((), (None,))
        require(is_usual, "it describes a storage that cannot be")
        num_bytes = length * ITEM_SIZES[function.kind]
        if key not in self.claims:
            free = self.free_bytes if self.storages is None else self.storages.get(key, 0)
            require(num_bytes <= free, f"it claims a tensor of {num_bytes:,} bytes, but has {free:,} for it")
            self.free_bytes -= num_bytes
        claim = function.kind, length
        require(self.claims.setdefault(key, claim) == claim, "it describes a storage in two ways")
        return Value("storage", length)

    def _call(self, function: Value, args: tuple[Any, ...]) -> Value:
        self.count("calls")
        require(isinstance(args, tuple) and len(args) <= MAX_LENGTH, "it makes a call that no checkpoint needs")
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
    require(len(shape) <= MAX_LENGTH, f"it describes a tensor of {len(shape):,} dimensions")
    is_possible = len(shape) == len(stride) and _are_counts(offset, *shape, *stride)
    require(is_possible, "it describes a tensor that cannot be")
    last = offset + sum((count - 1) * step for count, step in zip(shape, stride, strict=True))
    # The second condition refuses one number that is repeated over gigabytes.
    if (size := math.prod(shape)) and (last >= length or size > length):
        raise Refused(f"it claims a tensor of shape {shape} in {length:,} numbers")
