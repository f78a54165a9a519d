"""Read recordings inside tar archives in place, without unpacking."""

import glob
import logging
import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ..utils.damaged_files import explain_damage
from ..utils.names import printable_name
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

# Headers of a member beside its own, which hold a long name, a large size, or what else does not fit there.
_EXTENSIONS = {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
_EXTENSIONS |= {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE}
_MAX_EXTENSIONS, _MAX_EXTENSION_BYTES = 8, 2**20
_MAX_PADDING = 2**20  # zeros after the end of an archive


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


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Return the records of an extended header, each of the form `LENGTH KEY=VALUE` and a line break."""
    records: dict[bytes, bytes] = {}
    data, position = data.rstrip(b"\0"), 0
    while position < len(data):
        length = data[position : position + 8].partition(b" ")[0]
        end = position + (int(length) if length.isdigit() else 0)
        key, _, value = data[position + len(length) + 1 : end - 1].partition(b"=")
        if not key or data[end - 1 : end] != b"\n":
            raise tarfile.ReadError("an extended header is damaged")
        records[key] = value
        position = end
    return records


def _decode(name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        return name.decode(tarfile.ENCODING, "surrogateescape")


def _read_header(file: IO[bytes], position: int) -> tarfile.TarInfo | None:
    """Return the header at a position; None for the mark of an archive's end."""
    file.seek(position)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it was cut within a header")
    if not any(block):
        return None
    info = tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    info.offset_data = position + tarfile.BLOCKSIZE
    return info


def _find_joined(file: IO[bytes], position: int) -> int | None:
    """Return where another archive follows the end of one, as `cat a.tar b.tar` writes them; None if none does."""
    file.seek(position)
    rest = file.read(_MAX_PADDING)
    position += (len(rest) - len(rest.lstrip(b"\0"))) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    try:
        return position if _read_header(file, position) is not None else None
    except tarfile.TarError:
        return None


def _complete(info: tarfile.TarInfo, records: Mapping[bytes, bytes]) -> None:
    """Set name and size of a member by its extended headers, and refuse a sparse one, which may unpack to anything."""
    if path := records.get(b"path"):
        info.name = _decode(path)
    if size := records.get(b"size"):
        info.size = int(size) if size.isdigit() and len(size) < 20 else -1
    if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith(b"GNU.sparse.") for key in records):
        raise tarfile.ReadError(f"{printable_name(info.name)[:200]} is sparse, as `tar --sparse` packs files")
    if not info.isreg() and info.type in tarfile.SUPPORTED_TYPES:
        info.size = min(0, info.size)  # folders and links have no data, whatever is stated


def _members(file: IO[bytes], file_size: int, may_be_joined: bool) -> Iterator[tarfile.TarInfo]:
    """
    Yield the members of an archive. Raises `tarfile.TarError` if it is damaged, or made to do harm.

    Python's own reader, depending on its release, goes back to earlier members for ever, calls itself for each header
    of a name, takes minutes for a long one, and ends without an error at a damaged one. Here, each step goes forward.
    """
    shared: dict[bytes, bytes] = {}  # records for all members
    own: dict[bytes, bytes] = {}  # for the next one
    position = num_extensions = 0
    while position < file_size:
        info = _read_header(file, position)
        if info is None:
            joined = _find_joined(file, position)
            if joined is None:
                break
            if not may_be_joined:
                problem = f"at byte {joined:,}, another archive follows its end, which a stream would leave out"
                raise tarfile.ReadError(problem)
            position, shared = joined, {}
            continue
        is_extension = info.type in _EXTENSIONS
        if is_extension:
            num_extensions += 1
            if num_extensions > _MAX_EXTENSIONS or info.size > _MAX_EXTENSION_BYTES:
                limits = f"{_MAX_EXTENSIONS} extended headers, or one of more than {_MAX_EXTENSION_BYTES:,} bytes"
                raise tarfile.ReadError(f"at byte {position:,}, a member has more than {limits}")
        else:
            _complete(info, shared | own)
        if not 0 <= info.size <= file_size - info.offset_data:
            claim = f"a member claims {info.size:,} bytes of the archive's {file_size:,}"
            raise tarfile.ReadError(f"at byte {position:,}, {claim}")
        position = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if not is_extension:
            own, num_extensions = {}, 0
            yield info
            continue
        data = file.read(info.size)
        if info.type == tarfile.GNUTYPE_LONGNAME:
            own[b"path"] = data.partition(b"\0")[0]
        elif info.type != tarfile.GNUTYPE_LONGLINK:
            (shared if info.type == tarfile.XGLTYPE else own).update(_pax_records(data))
    if num_extensions:
        raise tarfile.ReadError("it ends after the extended headers of a member")


@contextmanager
def _reading(path: Path, may_be_joined: bool) -> Iterator[Iterator[tarfile.TarInfo]]:
    """Open an archive and give its members; `ValueError` with its name if it is compressed or damaged."""
    try:
        with open(path, "rb") as file:
            magic = file.read(8)
            compression = next((name for start, name in _COMPRESSIONS.items() if magic.startswith(start)), None)
            if compression is not None:
                raise ValueError(_why_compressed(path, compression))
            yield _members(file, file.seek(0, os.SEEK_END), may_be_joined)
    except (tarfile.TarError, OSError) as error:
        if (damage := explain_damage(path)) is not None:
            raise ValueError(damage) from error
        problem = f"{path} cannot be read as a tar archive: {error}"
        raise ValueError(f"{problem}. Download it again, or pack its files anew.") from error


def check_archive(path: Path) -> None:
    """Raise `ValueError` for an archive that is compressed, damaged, made to do harm, or several joined to one."""
    with _reading(path, may_be_joined=False) as members:
        for member in members:
            if member.name.encode("utf-8", "ignore").decode() != member.name:
                shown = printable_name(member.name)
                raise tarfile.ReadError(f"the name {shown} in it is not UTF-8, which a stream needs")


def _audio_members(path: Path, root: Path) -> Iterator[_Member]:
    """Yield the audio files in an archive, in their order."""
    with _reading(path, may_be_joined=True) as members:
        for member in members:
            if member.isdir() or not has_suffix(member.name, AUDIO_SUFFIXES + UNSUPPORTED_SUFFIXES):
                continue
            reason = "hidden" if is_hidden(member.name) else None if member.isreg() else "link"
            name = f"{path.relative_to(root).as_posix()}/{member.name}"
            yield _Member(str(path), name, member.offset_data, member.size, reason)
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - tarfile.BLOCKSIZE))
        if file.read().strip(b"\0"):
            logger.warning("%s has no end-of-archive mark; it may be truncated. What is in it is used.", path)
