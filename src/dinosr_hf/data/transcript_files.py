"""Transcripts beside recordings in a folder: the `.trans.txt` of LibriSpeech, the `transcripts.txt` of MLS."""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from ..utils.command_line import argument_errors
from ..utils.text_files import read_lines
from ..utils.visible_text import name_key
from .finding import find_files
from .name_matching import match_names, without_suffix

logger = logging.getLogger(__name__)

SUFFIXES = (".trans.txt", "transcripts.txt")


def _parse(line: str, folder: str, known: Collection[str], max_spaces: int, is_tabbed: bool) -> tuple[str, str]:
    """Return the path that a line is about, relative to the root, and its text. A name has up to `max_spaces`."""

    def key_of(name: str) -> str:
        return name_key(posixpath.join(folder, name.strip()))

    name, tab, text = line.partition("\t")
    if tab and (is_tabbed or key_of(name) in known):
        return key_of(name), text.strip()
    parts = re.split(r"(\s+)", line.strip(), maxsplit=max_spaces + 1)
    readings = [(key_of("".join(parts[:end])), "".join(parts[end + 1 :])) for end in range(1, len(parts) + 1, 2)]
    fitting = [reading for reading in readings if reading[0] in known]
    if len(fitting) > 1:
        options = f"{fitting[0][0]!r} and {fitting[1][0]!r}"
        raise ValueError(f"it fits two recordings, {options}. Put a tab behind the name.")
    return (fitting or readings)[0]


def read_transcripts(root: Path, names: Sequence[str]) -> list[str | None] | None:
    """
    Read the `.trans.txt` and `transcripts.txt` in and below a folder: `id text`, or in all lines `id<TAB>text`.

    `names` are the paths of all recordings, relative to the folder. A line is about the recording beside its file, or
    with a path as id below it. Other lines are matched by name, where that is unique (see `match_names`). Returns the
    text of each recording, None for those without a line; or None if there is no such file. Raises `ValueError` if two
    lines give a recording different texts, and if no recording has a line.
    """
    files = find_files(root, *SUFFIXES).names
    if not files:
        return None
    known = {name_key(form) for name in names for form in (name, without_suffix(name))}
    max_spaces = max(len(name.split()) for name in names) - 1
    texts: dict[str, str] = {}
    places: dict[str, str] = {}
    for file in files:
        lines = [(number, line) for number, line in enumerate(read_lines(root / file), start=1) if line.strip()]
        is_tabbed = all("\t" in line for _, line in lines)
        for number, line in lines:
            place = f"{root / file}, line {number}"
            with argument_errors(f"{place}: "):
                key, text = _parse(line, posixpath.dirname(file), known, max_spaces, is_tabbed)
            if texts.setdefault(key, text) != text:
                problem = f"{key!r} has another text in {places[key]}: {text!r} here, {texts[key]!r} there"
                raise ValueError(f"{place}: {problem}. Remove one of them.")
            places.setdefault(key, place)
    matches = match_names(names, texts)
    if matches.ambiguous:
        name, keys = next(iter(matches.ambiguous.items()))
        count = f"{len(matches.ambiguous):,} of {len(names):,} recordings have no transcript"
        problem = f"{count}, since lines fit them by a name that is not unique, for example {name}: {places[keys[0]]}"
        problem += ". Put the lines into the recordings' folders, or write paths such as `folder/name` for the names."
        if not matches.names:
            raise ValueError(f"{root}: {problem}")
        logger.warning("%s: %s", root, problem)
    elif texts and not matches.names:
        key, place = next(iter(places.items()))
        problem = f"no recording has a transcript: they are named like {names[0]!r}, but {place} is about {key!r}"
        raise ValueError(f"{root}: {problem}. Begin each line with the name of a recording and a space.")
    for name in names:
        forms = [key for key in (name_key(name), name_key(without_suffix(name))) if key in texts]
        if len({texts[key] for key in forms}) > 1:
            raise ValueError(f"{places[forms[0]]} and {places[forms[1]]} give {name!r} two texts. Remove one of them.")
    return [texts[matches.names[name]] if name in matches.names else None for name in names]
