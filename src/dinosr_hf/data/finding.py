"""
Find files in folders: one search for audio, transcripts, alignments, archives and tables.

Hidden files, and all files in hidden folders, are skipped and counted. Links are followed, but no folder is searched
twice.
"""

import glob
import os
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# What libsndfile reads, and what people record speech in; a file's content decides what it is.
AUDIO_SUFFIXES: tuple[str, ...] = (
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".w64"),
    *(".rf64", ".wave", ".bwf", ".sph", ".nist", ".voc", ".mp2", ".mpga", ".8svx", ".svx", ".wve"),
)

# Samples without a header: no file of these kinds says its rate and encoding.
HEADERLESS_SUFFIXES = (".raw", ".pcm", ".vox", ".sln", ".sln16", ".ulaw", ".alaw", ".gsm", ".g722", ".g729")

# Recordings that were compressed once more, one by one.
PACKED_SUFFIXES = tuple(f"{suffix}{end}" for suffix in AUDIO_SUFFIXES for end in (".gz", ".bz2", ".xz", ".zst"))

# Audio, and video with audio, that libsndfile cannot decode.
UNSUPPORTED_SUFFIXES: tuple[str, ...] = (
    *(".m4a", ".m4b", ".m4r", ".mp4", ".m4v", ".mov", ".aac", ".3gp", ".3gpp", ".3g2", ".amr", ".awb", ".webm"),
    *(".weba", ".mkv", ".mka", ".avi", ".flv", ".mpg", ".mpeg", ".wma", ".wmv", ".asf", ".ape", ".wv", ".tta", ".mpc"),
    *(".tak", ".shn", ".alac", ".ac3", ".eac3", ".dts", ".ra", ".rm", ".spx", ".dss", ".ds2", ".silk", ".slk", ".qcp"),
    *(".evs", ".dsf", ".dff", *HEADERLESS_SUFFIXES, *PACKED_SUFFIXES),
)

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip", ".7z", ".rar")

# Of files that lie beside recordings.
_TEXT_SUFFIXES = (
    *(".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".html", ".pdf", ".yaml", ".yml", ".py", ".sh", ".gz"),
    *(".textgrid", ".ctm", ".stm", ".lab", ".phn", ".wrd", ".eaf", ".srt", ".vtt", ".log", ".png", ".jpg", ".parquet"),
)

# First bytes of such files, and where they are.
_SIGNATURES = (
    (4, b"ftyp", ".mp4"),
    (0, b"\x1aE\xdf\xa3", ".webm"),
    (0, b"#!AMR", ".amr"),
    (0, b"0&\xb2u\x8ef\xcf\x11", ".wma"),
    (0, b"\xff\xf1", ".aac"),
    (0, b"\xff\xf9", ".aac"),
    (0, b"ADIF", ".aac"),
    (0, b"MAC ", ".ape"),
    (0, b"wvpk", ".wv"),
    (0, b"TTA1", ".tta"),
    (0, b"ajkg", ".shn"),
    (0, b".RMF", ".rm"),
    (0, b"\x02dss", ".dss"),
    (0, b"\x03dss", ".dss"),
    (0, b"\x03ds2", ".ds2"),
    (0, b"#!SILK", ".silk"),
    (1, b"#!SILK", ".silk"),
    (8, b"AVI ", ".avi"),
    (28, b"Speex ", ".spx"),
)


class Found(NamedTuple):
    """
    What a search of a folder found: paths relative to it, with /, each list sorted.

    Attributes:
        names: Files with one of the suffixes.
        hidden: Files with one of the suffixes whose name, or that of a folder they are in, begins with a dot.
        unreachable: Links to folders that lead nowhere, and folders that cannot be listed ("": the root itself).
    """

    names: list[str]
    hidden: list[str]
    unreachable: list[str]


def is_hidden(name: str) -> bool:
    """Return whether a part of a relative path (with /) begins with a dot."""
    return any(part.startswith(".") and part.strip(".") for part in name.split("/"))


def has_suffix(name: str | Path, suffixes: str | tuple[str, ...]) -> bool:
    """Return whether the name of a file ends in one of the suffixes, which are in lower case, in any case."""
    return os.path.basename(name).lower().endswith(suffixes)


def _listed(root: str | Path) -> Iterator[tuple[str, os.DirEntry | None]]:
    """Yield the relative path and the entry of each file below `root`; no entry for a folder that cannot be listed."""
    folders, later, visited = [""], list[str](), set()
    while folders or later:
        # Hidden folders come last: what a link in one of them leads to may be in the open, too.
        below = folders.pop() if folders else later.pop()
        path = os.path.join(root, below)
        real = os.path.realpath(path)
        if real in visited:  # by a link
            continue
        visited.add(real)
        try:
            with os.scandir(path) as listing:
                entries = sorted(listing, key=lambda entry: entry.name, reverse=True)
        except OSError:
            yield below.rstrip("/"), None
            continue
        for entry in entries:
            name = below + entry.name
            if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                (later if is_hidden(name) else folders).append(f"{name}/")
            else:
                yield name, entry


def _may_be_lost(entry: os.DirEntry) -> bool:
    """Return whether an entry is a link that leads nowhere, and could have led to a folder: `notes.txt` does not."""
    is_file = has_suffix(entry.name, _TEXT_SUFFIXES)
    return not is_file and entry.is_symlink() and not os.path.exists(entry.path)


def find_files(root: str | Path, *suffixes: str) -> Found:
    """Search a folder, and all below it, for files with one of the suffixes, given in lower case."""
    found = Found([], [], [])
    for name, entry in _listed(root):
        if entry is not None and has_suffix(entry.name, suffixes):
            (found.hidden if is_hidden(name) else found.names).append(name)
        elif not is_hidden(name) and (entry is None or _may_be_lost(entry)):
            found.unreachable.append(name)
    for names in found:
        names.sort()
    return found


def find_audio(folder: str | Path) -> Found:
    """
    Search a folder for audio, also of kinds that cannot be read, to report them; `names` has the unreachable too.

    Raises `ValueError` if there is no such folder, or no audio in it.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder. Give a folder that has audio files in it or below it.")
    names, hidden, unreachable = find_files(folder, *AUDIO_SUFFIXES, *UNSUPPORTED_SUFFIXES)
    if "" in unreachable:
        raise ValueError(f"{folder} cannot be listed. Check its permissions.")
    if not names:
        looked = f"Looked for {', '.join(AUDIO_SUFFIXES)}"
        raise ValueError(f"{folder} has no audio files in it or below it. {looked}; hidden files: {len(hidden):,}.")
    return Found(sorted(names + unreachable), hidden, unreachable)


def literal_paths(paths: Iterable[str | Path]) -> list[str]:
    """Return paths for `data_files` of `datasets`, which takes each for a pattern; `ValueError` if it has `::`."""
    # Without links to folders, which such patterns do not follow.
    real = [os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)) for path in paths]
    if broken := next((path for path in real if "::" in path), None):
        raise ValueError(f"{broken}: datasets takes :: in a path for a nested archive. Rename the file or folder.")
    return [glob.escape(path) for path in real]


def unsupported_kind(name: str | Path, head: bytes = b"") -> str | None:
    """
    Return the kind of an audio file that libsndfile cannot read, as a suffix such as ".m4a"; None if it is not known.

    Args:
        name: Name of the file; empty if it has none.
        head: Its first 1,024 bytes, if they are at hand.
    """
    for suffix in UNSUPPORTED_SUFFIXES:
        if has_suffix(name, suffix):
            return suffix
    if head.startswith(b"NIST_1A") and b"shorten" in head:
        return ".shn"
    return next((kind for at, start, kind in _SIGNATURES if head.startswith(start, at)), None)


def how_to_convert(name: str | Path, kind: str) -> str:
    """Return the sentences that say what such a file is, and the command that converts it."""
    given = os.path.basename(name) or f"x{kind}"
    quoted, flac = (shlex.quote(text) for text in (given, f"{os.path.splitext(given)[0]}.flac"))
    if kind in HEADERLESS_SUFFIXES:
        command = f"ffmpeg -f s16le -ar 16000 -ac 1 -i {quoted} {flac}"
        return f"It has samples without a header. Convert it with its encoding and rate, for example: {command}"
    if kind in PACKED_SUFFIXES:
        return "It is compressed once more. Decompress it."
    is_named = has_suffix(given, kind)
    what = f"libsndfile cannot read {kind}" if is_named else f"It is {kind} audio, which libsndfile cannot read"
    return f"{what}. Convert it, for example: ffmpeg -i {quoted} {flac}"
