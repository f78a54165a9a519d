"""
Tar archives of recordings, read where they lie: nothing is unpacked.

`S` samples at 16 kHz.
"""

from __future__ import annotations

import glob
import io
import logging
import os
import tarfile
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .audio import AudioFileError, audio_info, load_audio
from .sources import AUDIO_SUFFIXES, SpeechSource, _is_hidden, _number_repeats, _scan

logger = logging.getLogger(__name__)

_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

# Of what is read ahead of a decoder; a header and the first block of most files fit.
_BUFFER_BYTES = 32_768


class _Member(NamedTuple):
    """A file in an archive: number of the archive, and where its bytes are; `reason` says why it is of no use."""

    shard: int
    name: str
    offset: int
    num_bytes: int
    reason: str | None


class _Region(io.RawIOBase):
    """Some bytes of a file, read-only, as a file of their own."""

    def __init__(self, path: str, offset: int, num_bytes: int) -> None:
        self._file = io.FileIO(path)
        self._offset, self._num_bytes, self._position = offset, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._num_bytes - self._position))
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(memoryview(buffer)[:count]) or 0
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class TarSource(SpeechSource):
    """
    The audio files in uncompressed tar archives, as of WebDataset. Other members (texts, tables) are passed over.

    Archives are listed once, and headers of the audio read; then the bytes that are needed are read at their place.
    Each read opens its archive itself, so that workers share nothing. An utterance's id is the archive's path from
    the folder that all of them are in, and the member's name behind it: `train-000.tar/1272/a.flac`.

    Args:
        path: A `.tar` file, a folder with some in it or below it, or a pattern such as `data/train-*.tar`.

    Raises:
        ValueError: If there is no archive, or no readable audio in them, or one is compressed or truncated.
    """

    def __init__(self, path: str | Path) -> None:
        shards = _find_shards(path)
        self.root = Path(os.path.commonpath([shard.parent for shard in shards]))
        self._shards = [shard.relative_to(self.root).as_posix() for shard in shards]
        with ThreadPool(min(16, len(shards))) as pool:
            listed = pool.map(lambda number: list(_members(number, shards[number])), range(len(shards)), chunksize=1)
        found = [member for members in listed for member in members]
        members = [member for member in found if member.reason is None]
        if not members:
            raise ValueError(
                f"{path}: there are no audio files in {len(shards):,} archive(s), such as {shards[0]}. Looked for"
                f" {', '.join(AUDIO_SUFFIXES)}."
            )
        lengths = _scan(members, self._length, str(path))
        kept = self._keep(zip(_number_repeats(map(self._name, members)), lengths, strict=True), str(path))
        self._members = [members[position] for position in kept]
        for member in found:
            if member.reason is not None:
                self.skipped.setdefault(member.reason, []).append(self._name(member))

    def _name(self, member: _Member) -> str:
        return f"{self._shards[member.shard]}/{member.name}"

    def _open(self, member: _Member) -> io.BufferedReader:
        shard = str(self.root / self._shards[member.shard])
        try:
            if os.path.getsize(shard) < member.offset + member.num_bytes:
                raise AudioFileError(f"{shard} has become shorter: it is truncated. Fetch it again.", "truncated")
            region = _Region(shard, member.offset, member.num_bytes)
        except FileNotFoundError as error:
            raise AudioFileError(f"{shard} is not a file. Check the path.", "missing") from error
        return io.BufferedReader(region, _BUFFER_BYTES)

    def _length(self, member: _Member) -> int:
        try:
            if member.num_bytes == 0:
                raise AudioFileError("It is empty (0 bytes).", "empty")
            with self._open(member) as file:
                return audio_info(file).num_samples
        except AudioFileError as error:
            raise AudioFileError(f"{self._name(member)}: {error}", error.reason) from error

    def load(self, index: int, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        """See `SpeechSource.load`."""
        member = self._members[index]
        try:
            with self._open(member) as file:
                return load_audio(file, start=start, num_samples=num_samples)
        except AudioFileError as error:
            raise AudioFileError(f"{self._name(member)}: {error}", error.reason) from error


def _find_shards(path: str | Path) -> list[Path]:
    place = Path(path)
    if place.is_file():
        return [place.absolute()]
    pattern = str(path)
    if place.is_dir():  # whose own name may have characters that mean something in a pattern
        pattern = os.path.join(glob.escape(pattern), "**", "*.tar")
    shards = sorted(Path(found).absolute() for found in glob.glob(pattern, recursive=True) if os.path.isfile(found))
    if not shards:
        raise ValueError(f"{path}: there is no tar archive here. Give a .tar file, a folder of them, or a pattern.")
    return shards


def _members(number: int, shard: Path) -> Iterator[_Member]:
    """What is of interest in an archive, in its order."""
    with open(shard, "rb") as file:
        magic = file.read(8)
        file.seek(max(0, shard.stat().st_size - tarfile.BLOCKSIZE))
        if file.read().strip(b"\0"):
            logger.warning("%s has no mark at its end, as if it were truncated. What is in it is used.", shard)
    compression = next((name for start, name in _COMPRESSIONS.items() if magic.startswith(start)), None)
    if compression is not None:
        raise ValueError(
            f"{shard} is compressed ({compression}), so that nothing in it can be read at its place. Decompress the"
            " archive (audio hardly shrinks by it), or unpack it and give the folder."
        )
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # else it keeps all of them
                if member.isdir() or not member.name.lower().endswith(AUDIO_SUFFIXES):
                    continue
                reason = None
                if _is_hidden(member.name):
                    reason = "hidden"
                elif not member.isreg() or member.issparse():
                    reason = "link"  # or sparse, which audio is not
                yield _Member(number, member.name, member.offset_data, member.size, reason)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(
            f"{shard} cannot be read as a tar archive: {error}. Fetch it again, or take it away."
        ) from error
