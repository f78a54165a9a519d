"""Names that people give to recordings, as lines of text that are all different; and errors as a line."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable

# Control characters, separators of lines and paragraphs, and surrogates, which stand for bytes that are not UTF-8.
_NO_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable_name(name: str) -> str:
    r"""
    Return a name as one line of valid text: `\xff` for a byte that is not UTF-8, `\n` for a line break.

    Other names are returned as they are. The result may equal another name, so use it to show, not to open a file.
    """
    if _NO_TEXT.search(name) is None:
        return name
    with contextlib.suppress(UnicodeEncodeError):  # a surrogate that stands for no byte
        # Where the locale is ASCII, the bytes of all other characters are surrogates.
        name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return _NO_TEXT.sub(lambda found: ascii(found[0])[1:-1], name)


def one_line(error: BaseException) -> str:
    """Return the message of an error as one line without a full stop; its class if there is none."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def unique_names(names: Iterable[str]) -> list[str]:
    """
    Return names of which none repeats, in the same order: further ones of the name `a` become `a#2`, `a#3`, ...

    Numbers that another name has already are left out, so a name that occurs once stays as it is.
    """
    given = list(names)
    taken = set(given)
    if len(taken) == len(given):
        return given
    numbers: dict[str, int] = {}  # of the next one of a name
    found = []
    for name in given:
        number = numbers.get(name, 1)
        unique = name
        while number > 1 and (unique := f"{name}#{number}") in taken:
            number += 1
        numbers[name] = number + 1
        taken.add(unique)
        found.append(unique)
    assert len(set(found)) == len(found)
    return found
