"""Transcripts beside recordings in a folder: the `.trans.txt` files of LibriSpeech, Libri-light and their like."""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Collection, Sequence
from pathlib import Path

from ..utils.text_files import read_lines
from ..utils.visible_text import name_key
from .finding import find_files
from .name_matching import match_names, without_suffix

logger = logging.getLogger(__name__)

SUFFIX = ".trans.txt"


def _parse(line: str, folder: str, known: Collection[str]) -> tuple[str, str]:
    """Return the path that a line is about, relative to the root, and its text."""
    name, tab, text = line.partition("\t")
    key = name_key(posixpath.join(folder, name.strip()))
    if tab and key in known:  # a name before a tab may have spaces
        return key, text.strip()
    name, *rest = line.split(maxsplit=1)
    return name_key(posixpath.join(folder, name)), " ".join(rest).strip()


def read_transcripts(root: Path, names: Sequence[str]) -> list[str | None] | None:
    """
    Read the `.trans.txt` files in and below a folder: `id text` or `id<TAB>text` a line.

    `names` are the paths of all recordings, relative to the folder. A line is about the recording beside its file, or
    with a path as id below it. Other lines are matched by name, where that is unique (see `match_names`). Returns the
    text of each recording, None for those without a line; or None if there is no such file. Raises `ValueError` if two
    lines give a recording different texts, and if no recording has a line because names are not unique.
    """
    files = find_files(root, SUFFIX).names
    if not files:
        return None
    known = {name_key(form) for name in names for form in (name, without_suffix(name))}
    texts: dict[str, str] = {}
    places: dict[str, str] = {}
    for file in files:
        for number, line in enumerate(read_lines(root / file), start=1):
            if not line.strip():
                continue
            key, text = _parse(line, posixpath.dirname(file), known)
            place = f"{root / file}, line {number}"
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
    return [texts[matches.names[name]] if name in matches.names else None for name in names]
