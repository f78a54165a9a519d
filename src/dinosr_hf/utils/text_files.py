"""
Text files that people bring: tables, transcripts, labels, options, language models.

Each is a regular file in UTF-8, with or without byte order marks and gzip. Anything else raises a `ValueError` that
names the file, the line and what to change; a missing file raises `OSError`. Limits keep a file that unpacks to
gigabytes, or has no line ends, from taking the memory.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from decimal import Decimal
from itertools import chain
from typing import Any, BinaryIO

import yaml

from .damaged_files import explain_stand_in
from .names import one_line
from .visible_text import visible_text

MAX_LINE_BYTES = 2**26  # labels at 50 Hz of a recording of 24 hours have about 30 million
# Text compresses to a tenth, labels at a fixed rate to a fiftieth; repetitions without content to a thousandth.
MAX_COMPRESSION, _UNSUSPECTED_BYTES = 100, 2**25
_MAX_TEXT_BYTES = 2**28
_MAX_YAML_VALUES = 10**6

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_ADVICE = "Save the file as UTF-8 text, in an editor or with `iconv -f OLD_ENCODING -t UTF-8`."


def check_regular_file(path: str | os.PathLike) -> None:
    """Raise `ValueError` for a folder, a pipe or a device: a read might never end. A missing file is an `OSError`."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise ValueError(f"{os.fspath(path)} is {kind}, not a file. Give a regular file.")


def _decode(line: bytes, name: str, number: int, errors: str) -> str:
    try:
        # Files joined by `cat` have several marks.
        text = line.removeprefix(_BYTE_ORDER_MARK).decode("utf-8", errors)
    except UnicodeDecodeError as error:
        problem = f"byte {error.start + 1} of the line is 0x{error.object[error.start]:02x}"
        raise ValueError(f"{name}, line {number}: it is not UTF-8 ({problem}). {_ADVICE}") from None
    if "\0" in text:
        raise ValueError(f"{name}, line {number}: it has a NUL byte, as UTF-16 and binary files do. {_ADVICE}")
    return text


def _check_compression(unpacked: int, raw: BinaryIO, name: str) -> None:
    if unpacked > max(_UNSUSPECTED_BYTES, MAX_COMPRESSION * raw.tell()):
        problem = f"{name} unpacks to over {MAX_COMPRESSION} times its size, as repetitions do"
        raise ValueError(f"{problem}. If it is right, unpack it and give the unpacked file.")


def text_lines(path: str | os.PathLike, *, errors: str = "strict") -> Iterator[str]:
    """
    Yield the lines of a text file, without line ends (of Unix, Windows or old Macs).

    `errors` is that of `bytes.decode`: "surrogateescape" for lists of files, whose names may be any bytes. Raises
    `ValueError` if the file is not as this module says, and `OSError` if it cannot be opened.
    """
    check_regular_file(path)
    name, number, unpacked = os.fspath(path), 1, 0
    with open(path, "rb") as raw:
        start = raw.peek(100)
        if (stand_in := explain_stand_in(start, os.fstat(raw.fileno()).st_size)) is not None:
            raise ValueError(f"{name} {stand_in}")
        if start.startswith(_UTF_16):
            raise ValueError(f"{name} is not UTF-8, but UTF-16. {_ADVICE}")
        file = gzip.GzipFile(fileobj=raw) if start.startswith(_GZIP) else raw
        try:
            if file is not raw:  # ahead, since what is made of the lines takes longer
                while (more := len(file.read(2**20))) and unpacked <= _UNSUSPECTED_BYTES:
                    unpacked += more
                _check_compression(unpacked, raw, name)
                unpacked = file.seek(0)
            while line := file.readline(MAX_LINE_BYTES + 1):
                unpacked += len(line)
                if len(line) > MAX_LINE_BYTES:
                    problem = f"it is longer than {MAX_LINE_BYTES:,} bytes"
                    raise ValueError(f"{name}, line {number}: {problem}. Is it a text file?")
                if file is not raw:
                    _check_compression(unpacked, raw, name)
                pieces = _decode(line, name, number, errors).rstrip("\r\n").split("\r")
                number += len(pieces)
                yield from pieces
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            problem = str(error).rstrip(".")
            raise ValueError(f"{name}, line {number}: the gzip file is damaged ({problem}). Copy it again.") from None


def read_lines(path: str | os.PathLike) -> list[str]:
    """Return the lines of a text file, without line ends; see `text_lines`."""
    return list(text_lines(path))


def read_text(path: str | os.PathLike) -> str:
    """Return the content of a text file of at most 256 MiB, with `\\n` at the end of each line; see `text_lines`."""
    if (size := os.stat(path).st_size) > _MAX_TEXT_BYTES:
        problem = f"has {size:,} bytes, but at most {_MAX_TEXT_BYTES:,} are read"
        raise ValueError(f"{os.fspath(path)} {problem}. Give another file.")
    return "".join(f"{line}\n" for line in text_lines(path))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {repeated!r} twice. Leave one")
    return content


def _number_parser(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
            is_allowed = -(10**300) < value < 10**300
        except (ArithmeticError, ValueError):  # Python refuses integers of more than 4,300 digits
            is_allowed = False
        if not is_allowed:
            raise ValueError(f"the number {text[:24]}{'...' * (len(text) > 24)} is too large")
        return value

    return parse


def _json_decoder(parse_float: Callable[[str], Any] = float) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=_object,
        parse_constant=parse_float,
        parse_float=_number_parser(parse_float),
        parse_int=_number_parser(int),
    )


def _parse_json(text: str, decoder: json.JSONDecoder, where: str, rule: str = "") -> Any:
    try:
        return decoder.decode(text)
    except json.JSONDecodeError as error:
        shown = text if len(text) <= 80 else f"{text[:80]}..."
        problem = f"{shown!r} is not valid JSON: {error.msg} at character {error.pos + 1}.{rule}"
        raise ValueError(f"{where}: {problem}") from None
    except RecursionError:
        raise ValueError(f"{where}: its brackets are nested too deeply. Flatten it.") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}.") from None


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file. Raises `ValueError` if it is none, repeats a key, or has a number over 1e300; `OSError`."""
    return _parse_json(read_text(path), _json_decoder(), os.fspath(path))


class _YamlLoader(yaml.SafeLoader):
    """Refuse a key that occurs twice, of which YAML takes the last."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # filled below

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        content = super().construct_mapping(node, deep)
        if len(content) < len(node.value):
            places: dict[str, Any] = {}
            for key, _ in node.value:
                if (first := places.setdefault(key.value, key.start_mark)) is not key.start_mark:
                    lines = f"line {first.line + 1} and in line {key.start_mark.line + 1}"
                    raise ValueError(f"{key.value} is set in {lines}. Leave one.")
        return content


# What is no text, by its first characters. For YAML 1.1 `no` (Norwegian) is false, 010 is 8 and 1:30 is 90.
for _tag, _pattern, _first in (
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", "[-+]?(?:0|[1-9][0-9_]*)", [*"-+0123456789"]),
    ("float", r"[-+]?(?:(?:0|[1-9][0-9_]*)\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", [*"-+."]),
):
    _YamlLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


def _num_values(content: Any, known: dict[int, int]) -> int:
    """Count the values in lists and mappings, without a visit to each that an alias (`*name`) repeats."""
    children = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    if id(content) not in known:
        known[id(content)] = 1 + sum(_num_values(child, known) for child in children)
    return known[id(content)]


def load_yaml(path: str | os.PathLike) -> Any:
    """
    Read a YAML file of text, numbers, true, false and null. Raises `ValueError` if it is none, or repeats a key.

    Words such as `no`, dates, times and numbers that begin with a zero are text, unlike in YAML 1.1. A missing file
    is an `OSError`.
    """
    text = read_text(path)
    try:
        content = yaml.load(text, _YamlLoader)
        if (num_values := _num_values(content, {})) > _MAX_YAML_VALUES:
            raise ValueError(f"its aliases (*name) make {num_values:,} values of it. Write out what they stand for.")
    except (yaml.YAMLError, ArithmeticError, LookupError, RecursionError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} is not valid YAML: {one_line(error)}.") from None
    return content


def json_lines(
    path: str | os.PathLike, *, errors: str = "strict", decimals: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """
    Yield line number and object of each line of a JSONL file; blank lines are skipped.

    With `decimals`, numbers with a fraction are `Decimal`, as they are written. Raises `ValueError` if a line is no
    object or as in `read_json`; `errors` is that of `text_lines`.
    """
    decoder = _json_decoder(Decimal if decimals else float)
    for number, line in enumerate(text_lines(path, errors=errors), start=1):
        if line.strip():
            where = f"{os.fspath(path)}, line {number}"
            content = _parse_json(line.strip(), decoder, where, " Each line must be a JSON object.")
            if not isinstance(content, dict):
                raise ValueError(f"{where}: {line.strip()[:80]!r} is not a JSON object; each line must be one.")
            yield number, content


def _delimiter(header: str) -> str:
    """Return what separates the columns: a comma, or if the first line has none, its only other separator."""
    found = [mark for mark in ";\t" if mark in header]
    return found[0] if len(found) == 1 and "," not in header else ","


def _check_names(names: list[str], path: str | os.PathLike, number: int) -> None:
    # pandas writes its index as a first column without a name.
    if not names:
        raise ValueError(f"{os.fspath(path)}, line {number}: no column has a name. Name them in the first line.")
    wrong = next((name for place, name in enumerate(names) if names.count(name) > 1 or (not name and place)), None)
    if wrong is not None:
        problem = f"the column name {wrong!r} occurs twice" if wrong else "a column has no name"
        rule = f"The first line must name the columns, but has {', '.join(map(repr, names))}"
        raise ValueError(f"{os.fspath(path)}, line {number}: {problem}. {rule}.")


def _problem(error: csv.Error) -> str:
    if "expected after" in str(error):
        return "a quote has text behind it, or one before it is not closed"
    return "a quote is not closed" if "end of data" in str(error) else str(error)


def _swallows(row: list[str], names: list[str], delimiter: str) -> str | None:
    """Return the name of a field with the rest of its line and the beginning of another: an open quote took them."""
    for place, text in enumerate(row):
        first, line_break, rest = text.partition("\n")
        last = rest.rpartition("\n")[2]
        if line_break and first.count(delimiter) >= len(row) - 1 - place and last.count(delimiter) >= place:
            return names[place]
    return None


def _read_rows(reader: Any, path: str | os.PathLike) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the first line, and the fields, of each row that has any text."""
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            advice = "Close each quote, put quotes around a text with separators or quotes, and double those in it."
            raise ValueError(f"{os.fspath(path)}, line {number}: {_problem(error)}. {advice}") from None
        if row is None:
            return
        if any(row):
            yield number, row


def csv_rows(
    path: str | os.PathLike, *, errors: str = "strict", has_quotes: bool = True
) -> Iterator[tuple[int, dict[str, str]]]:
    """
    Yield line number and fields, by column name, of each row of a CSV file whose first line names the columns.

    Commas separate the columns; or semicolons or tabs if the first line has one of these and no comma, or is Excel's
    `sep=;`. Without `has_quotes`, quotes are part of the text. Rows without any text are skipped, and so are columns
    and fields at the end of a line that have no name and no text.

    Raises `ValueError` for names that are repeated or empty, rows with more or fewer fields than columns, a quote that
    is not closed or has text behind it, fields over 131,072 characters, and a field of several lines that may be parts
    of several rows, which an open quote joined. `errors` is that of `text_lines`.
    """
    lines = text_lines(path, errors=errors)
    first = next(lines, "")
    delimiter = _delimiter(first)
    if (declared := re.fullmatch('"?sep=([,;\t])"?', first)) is not None:
        first, delimiter = "", declared[1]
    content = (f"{line}\n" for line in chain([first], lines))
    reader = csv.reader(
        content,
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE,
        skipinitialspace=True,
        strict=True,
    )
    rows = _read_rows(reader, path)
    if (header := next(rows, None)) is None:
        return
    names = [visible_text(name) for name in header[1]]
    while names and not names[-1]:
        names.pop()
    _check_names(names, path, header[0])
    for number, row in rows:
        where = f"{os.fspath(path)}, line {number}"
        while len(row) > len(names) and not row[-1]:
            row.pop()
        if len(row) != len(names):
            counts = f"the row has {len(row)} instead of {len(names)} fields ({', '.join(names)})"
            advice = f"Put quotes around a text that has {delimiter!r} in it"
            if len(row) < len(names) or not has_quotes:
                advice = f"Separate the fields by {delimiter!r}, which no text may have in it"
            raise ValueError(f"{where}: {counts}. {advice}.")
        if (name := _swallows(row, names, delimiter)) is not None:
            problem = f"{name} reaches to line {reader.line_num}. Close its quote, or write it in one line"
            raise ValueError(f"{where}: {problem}.")
        yield number, dict(zip(names, row, strict=True))
