"""Find what belongs to a recording (a transcript, phones) by the names of both, and never another recording's."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from ..utils.visible_text import name_key


class NameMatches(NamedTuple):
    """The name that belongs to each recording; and to those that have none, the names that might be theirs."""

    names: dict[str, str]
    ambiguous: dict[str, list[str]]


def without_suffix(path: str) -> str:
    """Return a path without the suffix of its file; digits (`v1.5`) are none."""
    stem, dot, suffix = path.rpartition(".")
    return stem if dot and suffix.isalnum() and not suffix.isdigit() and not stem.endswith("/") else path


def _forms(path: str) -> list[str]:
    return list(dict.fromkeys((path, without_suffix(path))))


def _folders(path: str) -> Iterator[tuple[int, str]]:
    """Yield the folders of a path from the last to the first, with their numbers; "" for one in the root."""
    yield from enumerate(path.split("/")[-2::-1] or [""])


def _ends(path: str) -> Iterator[str]:
    """Yield a path as a whole, without its first folder, and so on down to the name of the file."""
    while path:
        yield path
        path = path.partition("/")[2]


def match_names(recordings: Iterable[str], names: Iterable[str]) -> NameMatches:
    """
    Find the names that belong to recordings. Ids and names are paths; both may be in either Unicode form.

    A recording has the name that is its path, with or without suffix. If there is none, the longest common end of both
    paths counts, down to the bare name of the file, but only if it is unique among all recordings and all names. And
    where the folder above it differs, it counts only if no folder there is one of recordings and of names: speakers
    often number their recordings alike, and what one of them lacks is not another's.
    """
    recordings, known = list(dict.fromkeys(recordings)), dict.fromkeys(names)
    found = {recording: form for recording in recordings for form in reversed(_forms(recording)) if form in known}
    if len(found) == len(recordings):
        return NameMatches(found, {})
    by_key: dict[str, list[str]] = defaultdict(list)
    for name in known:
        by_key[name_key(name)].append(name)
    paths = {recording: name_key(recording) for recording in recordings}
    taken, claims = set(found.values()), defaultdict(list)
    ambiguous: dict[str, list[str]] = {}
    rest: list[str] = []
    for recording in recordings:
        if recording in found:
            continue
        same = next((by_key[form] for form in _forms(paths[recording]) if form in by_key), None)
        if same is None:
            rest.append(recording)
        elif not taken.issuperset(same):
            claims[tuple(same)].append(recording)
    for options, claimants in claims.items():
        is_clear = len(options) == 1 and len({*map(without_suffix, claimants)}) == 1
        for recording in claimants:
            if is_clear:
                found[recording] = options[0]
            else:
                ambiguous[recording] = list(options)
    ends = _match_ends(paths, rest, by_key, {name_key(name) for name in found.values()})
    return NameMatches(found | ends.names, ambiguous | ends.ambiguous)


def _match_ends(
    paths: Mapping[str, str], rest: Iterable[str], by_key: Mapping[str, list[str]], taken: set[str]
) -> NameMatches:
    """Match the remaining recordings, of `paths`, with names by their ends."""
    keys_by_end: dict[str, list[str]] = defaultdict(list)
    for key in by_key:
        for end in _ends(key):
            keys_by_end[end].append(key)
    num_recordings = Counter(
        end
        for path in paths.values()
        for end in dict.fromkeys(end for form in _forms(path) for end in _ends(form))
        if end in keys_by_end
    )
    folders = ({folder for path in group for folder in _folders(path)} for group in (paths.values(), by_key))
    mirrored = {depth for depth, _ in set.intersection(*folders)}
    names_by_end: dict[str, list[str]] = {}  # of many recordings the same: one list for all
    found: dict[str, str] = {}
    ambiguous: dict[str, list[str]] = {}
    for recording in rest:
        # From the longest end to the shortest, each with its suffix first.
        levels = zip(*map(_ends, _forms(paths[recording])), strict=True)
        end = next((end for level in levels for end in level if end in keys_by_end), "")
        keys = keys_by_end.get(end, [])
        names = names_by_end.setdefault(end, [])
        if not names:
            names += (name for key in keys for name in by_key[key])
        is_apart = end.count("/") not in mirrored
        if not any(key not in taken and (is_apart or key == end) for key in keys):
            continue
        if len(names) == num_recordings[end] == 1:
            found[recording] = names[0]
        else:
            ambiguous[recording] = names
    return NameMatches(found, ambiguous)
