"""Read recordings inside tar archives in place, without unpacking."""

import glob
import logging
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..utils.damaged_files import explain_damage
from ..utils.names import one_line, printable_name
from .audio import AudioFileError, about, audio_info, load_audio
from .containers import PiecedFile
from .finding import (
    AUDIO_SUFFIXES,
    COMPRESSED_SUFFIXES,
    HEADERLESS_SUFFIXES,
    UNSUPPORTED_SUFFIXES,
    find_files,
    has_suffix,
    how_to_convert,
    is_hidden,
    unsupported_kind,
)
from .sources import SpeechSource, read_lengths

logger = logging.getLogger(__name__)

_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_COMPRESSIONS |= {b"PK\x03\x04": "zip", b"7z\xbc\xaf": "7z", b"Rar!": "rar"}

# What `tarfile` raises for headers that are damaged or made to do harm.
_TAR_ERRORS = (tarfile.TarError, OSError, ArithmeticError, LookupError, MemoryError, RecursionError, ValueError)


class _Member(NamedTuple):
    """An audio file in an archive: path of the archive, id, position of its bytes, and why it is skipped, if it is."""

    archive: str
    id: str
    offset: int
    num_bytes: int
    skip_reason: str | None


class TarSource(SpeechSource):
    """
    The audio files in uncompressed tar archives, such as WebDataset's. Other members (texts, tables) are ignored.

    `path` is a `.tar` file, a folder with some in it or below it, or a pattern such as `data/train-*.tar`. Archives
    are listed once, and the headers of the audio read; later reads open their archive anew, so workers share nothing.
    An utterance's id is the path of the archive, relative to the folder that all of them are in, and the member's
    name: `train-000.tar/1272/a.flac`. Raises `ValueError` if there is no archive, no readable audio in them, or one is
    compressed or truncated.
    """

    def __init__(self, path: str | Path) -> None:
        archives, others = find_archives(path)
        root = Path(os.path.commonpath([archive.parent for archive in archives]))
        with ThreadPool(min(16, len(archives))) as pool:
            found = list(
                chain.from_iterable(pool.map(lambda archive: list(_audio_members(archive, root)), archives, 1))
            )
        self._members = [member for member in found if member.skip_reason is None]
        if not self._members:
            where, suffixes = f"{len(archives):,} archive(s), such as {archives[0]}", ", ".join(AUDIO_SUFFIXES)
            raise ValueError(f"{path}: there are no audio files in {where}. Looked for {suffixes}.")
        lengths = read_lengths(self._members, self._length, str(path))
        self._set_utterances((member.id for member in self._members), lengths, str(path))
        for member in found:
            if member.skip_reason is not None:
                self.skipped.setdefault(member.skip_reason, []).append(printable_name(member.id))
        for reason, names in others.items():
            self.skipped.setdefault(reason, []).extend(map(printable_name, names))

    @contextmanager
    def _open(self, member: _Member) -> Iterator[Any]:
        """Open a member; an `AudioFileError` within the block says how to convert a kind that cannot be read."""
        path = member.archive
        try:
            if not os.path.isfile(path):
                raise AudioFileError(f"{path} is not a file. Check the path.", "missing")
            if member.num_bytes == 0:
                raise AudioFileError("It is empty (0 bytes).", "empty")
            if os.path.getsize(path) < member.offset + member.num_bytes:
                raise AudioFileError(f"{path} has become shorter: it is truncated. Download it again.", "truncated")
            if has_suffix(member.id, HEADERLESS_SUFFIXES):
                raise AudioFileError("It has no header.")
            with open(path, "rb") as archive:
                place = path, member.offset, member.num_bytes, os.fstat(archive.fileno()).st_mtime_ns
                yield PiecedFile(archive, [(member.offset, member.offset + member.num_bytes)], place)
        except AudioFileError as error:
            kind = unsupported_kind(member.id)
            if kind is None or not error.reason.startswith(("unreadable", "unsupported")):
                raise
            message = f"It cannot be read: {how_to_convert(member.id, kind)}"
            raise AudioFileError(message, f"unsupported {kind}") from error

    def _length(self, member: _Member) -> int:
        with about(member.id), self._open(member) as file:
            return audio_info(file).num_samples

    def load(self, index: int, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        member = self._members[self._positions[index]]
        with about(member.id), self._open(member) as file:
            return load_audio(file, start=start, num_samples=num_samples)


def find_archives(path: str | Path) -> tuple[list[Path], dict[str, list[str]]]:
    """
    Return the tar archives that a file, a folder or a pattern stands for, and what is left out of a folder, by reason.

    Folders that exist are what they are called, whatever characters their names have. Raises `ValueError` if there is
    no archive.
    """
    path = Path(path).absolute()
    left_out: dict[str, list[str]] = {}
    if path.is_file():
        archives = [path]
    elif path.is_dir():
        names, hidden, unreachable = find_files(path, ".tar", *COMPRESSED_SUFFIXES)
        compressed = [name for name in names if not has_suffix(name, ".tar")]
        tars = [name for name in names if has_suffix(name, ".tar")]
        archives = [path / name for name in tars if os.path.isfile(path / name)]
        unreachable += [name for name in tars if not os.path.isfile(path / name)]  # broken links, pipes
        if compressed and not archives:
            raise ValueError(_why_compressed(path / compressed[0], "as its name says"))
        others = {"hidden": hidden, "compressed": compressed, "missing": unreachable}
        left_out = {reason: found for reason, found in others.items() if found}
        for reason, found in left_out.items():
            if reason != "hidden":
                example = printable_name(found[0])
                logger.warning("%s: left out: %s (%s), such as %s.", path, f"{len(found):,}", reason, example)
    else:
        folder = next(parent for parent in path.parents if parent.is_dir())
        pattern = os.path.join(glob.escape(str(folder)), *path.relative_to(folder).parts)
        # Where links make a circle, glob returns the same files again and again, under longer and longer names.
        by_place = {
            (os.path.realpath(os.path.dirname(found)), os.path.basename(found)): found
            for found in sorted(glob.glob(pattern, recursive=True), key=lambda name: (-len(name), name))
            if os.path.isfile(found)
        }
        archives = sorted(map(Path, by_place.values()))
    if not archives:
        raise ValueError(f"{path}: there is no tar archive here. Give a .tar file, a folder of them, or a pattern.")
    return archives, left_out


def _why_compressed(path: Path, compression: str) -> str:
    return (
        f"{path} is compressed ({compression}), so its members cannot be read in place. Decompress the archive"
        " (compression hardly shrinks audio), or unpack it and give the folder."
    )


def _why_unreadable(path: Path, error: Exception) -> str:
    with open(path, "rb") as file:
        start = file.read(8)
    for magic, compression in _COMPRESSIONS.items():
        if start.startswith(magic):
            return _why_compressed(path, compression)
    if (damage := explain_damage(path)) is not None:
        return damage
    problem = f"{path} cannot be read as a tar archive: {one_line(error)}"
    return f"{problem}. Download it again, or pack its files anew."


def _members(path: Path, may_be_joined: bool) -> Iterator[tarfile.TarInfo]:
    """
    Yield the members of an archive. Raises `ValueError` if it is compressed, damaged, or has sparse members.

    `TarFile` takes a damaged header for the end, and may go back to earlier members for ever. Here neither passes.
    """
    try:
        with open(path, "rb") as file, tarfile.TarFile(fileobj=file) as archive:
            position, size, has_ended = 0, path.stat().st_size, False
            while position < size:
                file.seek(position)
                if not any(file.read(tarfile.BLOCKSIZE)):  # the end; another archive follows if `cat` joined them
                    position, has_ended = position + tarfile.BLOCKSIZE, True
                    continue
                file.seek(position)
                member = tarfile.TarInfo.fromtarfile(archive)
                if has_ended and not may_be_joined:
                    problem = f"at byte {position:,}, another archive follows its end, which a stream would leave out"
                    raise tarfile.ReadError(problem)
                if member.issparse():
                    name = printable_name(member.name)[:200]
                    raise tarfile.ReadError(f"{name} is sparse, as `tar --sparse` packs files")
                if member.size < 0 or not position < archive.offset <= size:
                    claim = f"a member claims {member.size:,} bytes of the archive's {size:,}"
                    raise tarfile.ReadError(f"at byte {position:,}, {claim}")
                position = archive.offset
                yield member
    except _TAR_ERRORS as error:
        raise ValueError(_why_unreadable(path, error)) from error


def check_archive(path: Path) -> None:
    """Raise `ValueError` for an archive that is compressed, damaged, sparse, joined, or has names other than UTF-8."""
    for member in _members(path, may_be_joined=False):
        if member.name.encode("utf-8", "ignore").decode() != member.name:
            problem = f"the name {printable_name(member.name)} in it is not UTF-8, which a stream needs"
            raise ValueError(f"{path} cannot be streamed: {problem}. Leave streaming out.")


def _audio_members(path: Path, root: Path) -> Iterator[_Member]:
    """Yield the audio files in an archive, in their order."""
    for member in _members(path, may_be_joined=True):
        if member.isdir() or not has_suffix(member.name, AUDIO_SUFFIXES + UNSUPPORTED_SUFFIXES):
            continue
        reason = "hidden" if is_hidden(member.name) else None if member.isreg() else "link"
        name = f"{path.relative_to(root).as_posix()}/{member.name}"
        yield _Member(str(path), name, member.offset_data, member.size, reason)
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - tarfile.BLOCKSIZE))
        if file.read().strip(b"\0"):
            logger.warning("%s has no end-of-archive mark; it may be truncated. What is in it is used.", path)
