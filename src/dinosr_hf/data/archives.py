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
from typing import IO, NamedTuple

import numpy as np

from ..utils.damaged_files import explain_damage
from ..utils.names import printable_name
from .audio import AudioFileError, audio_info, load_audio
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
            if reason != "hidden":
                example = printable_name(names[0])
                logger.warning("%s: left out: %s (%s), such as %s.", path, f"{len(names):,}", reason, example)

    @contextmanager
    def _open(self, member: _Member) -> Iterator[IO[bytes]]:
        """Open a member; `AudioFileError` raised within the block gets the member's id."""
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
            info = tarfile.TarInfo(member.id)
            info.offset_data, info.size = member.offset, member.num_bytes
            with tarfile.open(path, "r:") as archive:
                file = archive.extractfile(info)
                assert file is not None
                yield file
        except AudioFileError as error:
            message, reason = str(error), error.reason
            if reason.startswith(("unreadable", "unsupported")) and (kind := unsupported_kind(member.id)) is not None:
                message, reason = f"It cannot be read: {how_to_convert(member.id, kind)}", f"unsupported {kind}"
            raise AudioFileError(f"{member.id}: {message}", reason) from error

    def _length(self, member: _Member) -> int:
        with self._open(member) as file:
            return audio_info(file).num_samples

    def load(self, index: int, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        with self._open(self._members[self._positions[index]]) as file:
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


def _audio_members(path: Path, root: Path) -> Iterator[_Member]:
    """Yield the audio files in an archive, in their order."""
    with open(path, "rb") as file:
        magic = file.read(8)
        file.seek(max(0, path.stat().st_size - tarfile.BLOCKSIZE))
        has_end = not file.read().strip(b"\0")
    compression = next((name for start, name in _COMPRESSIONS.items() if magic.startswith(start)), None)
    if compression is not None:
        raise ValueError(_why_compressed(path, compression))
    if not has_end:
        logger.warning("%s has no end-of-archive mark; it may be truncated. What is in it is used.", path)
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # otherwise it keeps all of them
                if member.isdir() or not has_suffix(member.name, AUDIO_SUFFIXES + UNSUPPORTED_SUFFIXES):
                    continue
                reason = "hidden" if is_hidden(member.name) else None
                if reason is None and (not member.isreg() or member.issparse()):
                    reason = "link"  # or sparse, which audio is not
                name = f"{path.relative_to(root).as_posix()}/{member.name}"
                yield _Member(str(path), name, member.offset_data, member.size, reason)
    except (tarfile.TarError, OSError, EOFError) as error:
        if (damage := explain_damage(path)) is not None:
            raise ValueError(damage) from error
        problem = f"{path} cannot be read as a tar archive: {error}"
        raise ValueError(f"{problem}. Download it again, or remove it.") from error
