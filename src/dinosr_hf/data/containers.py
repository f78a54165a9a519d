"""
Find the streams of a file whose header cannot be believed: joined files, lengths that were never written, damage.

libsndfile reads the first stream of a file for as long as its header says. `find_streams` compares that with the bytes
that are there, without decoding them, and says of which parts of the file to make files that libsndfile reads whole.
"""

import io
import re
import struct
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

# Bytes, or the part of a file from the first to the second position.
Piece = bytes | tuple[int, int]


class StreamError(ValueError):
    """A file that has several streams which cannot be read as one."""


class Streams(NamedTuple):
    """Streams of a file, each a file of pieces; none if it is to be read as it is. `note` is to be told the user."""

    pieces: Sequence[Sequence[Piece]] = ()
    note: str = ""


class PiecedFile:
    """A binary file for reading, put together of bytes and of parts of another file."""

    def __init__(self, file: IO[bytes], pieces: Sequence[Piece]) -> None:
        self._file, self._pieces, self._position = file, pieces, 0
        self.size = sum(map(_length, pieces))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, count: int) -> bytes:
        data, start = b"", 0
        for piece in self._pieces:
            first, last = max(0, self._position - start), min(_length(piece), self._position + count - start)
            start += _length(piece)
            if first < last and isinstance(piece, bytes):
                data += piece[first:last]
            elif first < last:
                self._file.seek(int(piece[0]) + first)
                data += self._file.read(last - first)
        self._position += len(data)
        return data


def _length(piece: Piece) -> int:
    return len(piece) if isinstance(piece, bytes) else piece[1] - piece[0]


def find_streams(file: IO[bytes], size: int) -> Streams:
    """
    Return the streams of a file of so many bytes; none if libsndfile reads all of it as it is.

    WAV and AU: files joined to one, and lengths of samples that are 0 or less than what follows. Ogg: chained streams.
    MP3: files joined to one, a missing or wrong number of frames, and bytes between the frames that are none. Raises
    `StreamError` if MP3 frames differ in sampling rate or number of channels.
    """
    file.seek(0)
    head = file.read(12)
    if head[:4] in (b"RIFF", b"RIFX") and head[8:] == b"WAVE":
        return _sized_streams(file, size, _find_wav_data)
    if head[:4] in (b".snd", b"dns."):
        return _sized_streams(file, size, _find_au_data)
    if head[:4] == b"OggS":
        return _ogg_streams(_read(file, 0, size))
    start = _skip_tag(_read(file, 0, 10))
    is_padding = size > 12 and not any(head)
    if is_padding or (start and _read(file, start, 4) != b"fLaC") or _parse_frame(head, 0) is not None:
        return _mp3_streams(file, start, size)
    return Streams()


def _read(file: IO[bytes], position: int, count: int) -> bytes:
    file.seek(position)
    return file.read(count)


class _SizedData(NamedTuple):
    """Samples in a file: their first byte, their number of bytes as stated, and where that is stated."""

    start: int
    num_bytes: int
    size_position: int
    is_mp3: bool = False


def _find_wav_data(file: IO[bytes], start: int, end: int) -> _SizedData | None:
    order = ">I" if _read(file, start, 4) == b"RIFX" else "<I"
    position, is_mp3 = start + 12, False
    while len(head := _read(file, position, 8)) == 8:
        (num_bytes,) = struct.unpack(order, head[4:])
        if head[:4] == b"data":
            return _SizedData(position + 8, num_bytes, position + 4, is_mp3)
        if head[:4] == b"fmt ":
            is_mp3 = _read(file, position + 8, 2) == b"\x55\0"
        position += 8 + num_bytes + num_bytes % 2
    return None


def _find_au_data(file: IO[bytes], start: int, end: int) -> _SizedData | None:
    order = "<II" if _read(file, start, 4) == b"dns." else ">II"
    head = _read(file, start + 4, 8)
    if len(head) < 8:
        return None
    offset, num_bytes = struct.unpack(order, head)
    if offset < 24:  # within the header
        return None
    return _SizedData(start + offset, num_bytes, start + 8)


def _sized_streams(file: IO[bytes], size: int, find_data: Any) -> Streams:
    """Return the streams of a file whose samples' number of bytes is stated in front of them."""
    streams: list[list[Piece]] = []
    note, start = "", 0
    while (data := find_data(file, start, size)) is not None:
        end = data.start + data.num_bytes
        if data.is_mp3:  # of which libsndfile estimates the length
            end = min(end, size) if data.num_bytes else size
            mp3 = _mp3_streams(file, data.start, end)
            return mp3 if mp3.pieces else Streams([[(data.start, end)]], mp3.note)
        if end >= size:  # also if unknown, 0xFFFFFFFF; libsndfile reads on to the end of the file
            break
        following = end + data.num_bytes % 2
        magic = _read(file, start, 4)
        joined = next((place for place in (following, end) if _read(file, place, 4) == magic), None)
        if joined is not None:
            streams.append([(start, joined)])
            start = joined
            continue
        if not (_is_metadata(file, following, size, magic) or _is_metadata(file, end, size, magic)):
            if data.num_bytes and not any(_read(file, end, 1 << 20)):
                break  # padding
            streams.append([(start, data.size_position), b"\xff\xff\xff\xff", (data.size_position + 4, size)])
            found = f"{size - data.start:,} are there and read. Was its recorder killed?"
            return Streams(streams, f"its header promises {data.num_bytes:,} bytes of samples, but {found}")
        break
    if streams:
        streams.append([(start, size)])
        note = f"it is {len(streams)} files joined to one, all of which are read"
    return Streams(streams, note)


def _is_metadata(file: IO[bytes], position: int, size: int, magic: bytes) -> bool:
    """Return whether there is the end of the file, a tag or another chunk at a position."""
    head = _read(file, position, 8)
    if len(head) < 8 or head[:3] in (b"TAG", b"ID3") or head == b"APETAGEX" or head[:4] == b"LIST":
        return True
    (num_bytes,) = struct.unpack(">I" if magic == b"RIFX" else "<I", head[4:])
    is_chunk = magic.startswith(b"RIF") and all(32 <= byte < 127 for byte in head[:4])
    return is_chunk and position + 8 + num_bytes <= size + 1


def _ogg_streams(data: bytes) -> Streams:
    """Return the streams of a chained Ogg file: pages that begin streams, after pages that do not."""
    starts, is_beginning = [0], True
    for page in re.finditer(rb"OggS\x00([\x00-\x07])", data):
        if not page[1][0] & 2:
            is_beginning = False
        elif not is_beginning:
            starts.append(page.start())
            is_beginning = True
    if len(starts) == 1:
        return Streams()
    ends = [*starts[1:], len(data)]
    return Streams([[part] for part in zip(starts, ends, strict=True)])


# kbit/s by index 1 to 14, of MPEG 1 and of MPEG 2, each for layers I, II and III.
_BIT_RATES = {
    (1, 1): range(32, 449, 32),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_SYNC = re.compile(rb"\xff(?=[\xe0-\xff])")


class _Kind(NamedTuple):
    """What is the same in all frames of an MP3."""

    version: int  # 1, 2, or 3 for MPEG 2.5
    layer: int
    rate: int
    is_mono: bool


class _Frame(NamedTuple):
    """Header of an MP3 frame."""

    kind: _Kind
    num_bytes: int
    num_samples: int

    @property
    def info_offset(self) -> int:
        """Position of "Xing" or "Info" in a frame that has the length of the file."""
        return 4 + ((9 if self.kind.is_mono else 17) if self.kind.version > 1 else (17 if self.kind.is_mono else 32))


def _parse_frame(data: bytes | bytearray, position: int) -> _Frame | None:
    """Return the frame whose header is at a position; None if that is none."""
    if position + 4 > len(data) or data[position] != 0xFF or data[position + 1] < 0xE0:
        return None
    second, third, fourth = data[position + 1 : position + 4]
    version, layer = (3, 0, 2, 1)[second >> 3 & 3], 4 - (second >> 1 & 3)
    rate_index, bit_rate_index = third >> 2 & 3, third >> 4
    if not version or layer == 4 or rate_index == 3 or bit_rate_index in (0, 15):
        return None
    rate = (44_100, 48_000, 32_000)[rate_index] >> (version - 1)
    bit_rate = 1000 * _BIT_RATES[min(version, 2), layer][bit_rate_index - 1]
    padding = third >> 1 & 1
    if layer == 1:
        num_samples, num_bytes = 384, (12 * bit_rate // rate + padding) * 4
    else:
        num_samples = 576 if layer == 3 and version > 1 else 1152
        num_bytes = num_samples // 8 * bit_rate // rate + padding
    return _Frame(_Kind(version, layer, rate, fourth >> 6 == 3), num_bytes, num_samples)


def _parse_info(data: bytes, position: int, frame: _Frame) -> tuple[int, int] | None:
    """Return the numbers of frames and bytes (0: unknown) that an Info frame states; None if it is no such frame."""
    info = data[position + frame.info_offset :][:16]
    if frame.kind.layer != 3 or info[:4] not in (b"Xing", b"Info") or len(info) < 16:
        return None
    flags, first, second = struct.unpack(">III", info[4:])
    return (first if flags & 1 else 0), (second if flags & 3 == 3 else 0)


def _skip_tag(data: bytes, position: int = 0) -> int:
    """Return the end of the ID3v2 tag at a position; the position if there is none."""
    if data[position : position + 3] != b"ID3" or len(data) < position + 10:
        return position
    num_bytes = 0
    for byte in data[position + 6 : position + 10]:
        num_bytes = num_bytes << 7 | byte & 127
    return position + 10 + num_bytes


def _end_of_frames(file: IO[bytes], size: int) -> int:
    """Return where the tags at the end of an MP3 begin."""
    if _read(file, max(0, size - 128), 3) == b"TAG":
        size -= 128
    tail = _read(file, max(0, size - 32), 32)
    if tail[:8] == b"APETAGEX":
        size -= struct.unpack("<I", tail[12:16])[0] + (32 if tail[23] & 128 else 0)
    return max(0, size)


def _agrees(head: bytes, info: _Frame, stated: tuple[int, int], num_bytes: int) -> bool:
    """Return whether numbers of frames and bytes, stated in front of an MP3, agree with its size and bit rate."""
    longest = 1442  # bytes of a frame
    if not all(stated) or abs(num_bytes - stated[1]) > longest or stated[1] > (stated[0] + 1) * longest:
        return False
    frame = _parse_frame(head, info.num_bytes)
    is_constant = head[info.info_offset : info.info_offset + 4] == b"Info"
    # With padding, a frame may have a byte more.
    return not is_constant or (frame is not None and abs(stated[1] / stated[0] - frame.num_bytes) <= 2)


def _mp3_streams(file: IO[bytes], start: int, size: int) -> Streams:
    end = _end_of_frames(file, size)
    head = _read(file, start, 2048)
    first = _parse_frame(head, 0)
    stated = _parse_info(head, 0, first) if first is not None else None
    if first is not None and stated is not None and _agrees(head, first, stated, end - start):
        return Streams()
    frames = _Mp3Frames(_read(file, 0, end), start)
    if frames.kind is None:
        return Streams()
    num_stated = frames.infos[0][1] if frames.infos else 0
    if len(frames.infos) == 1 and frames.num <= num_stated <= 100 * end:
        # If frames are missing, libsndfile finds that the file is truncated.
        info_frame = frames.infos[0][0]
        is_whole = len(frames.spans) == 1 and info_frame[0] == start
        return Streams([[info_frame, *frames.spans]] if frames.num == num_stated and not is_whole else [], frames.note)
    info = [_make_info(frames)] if frames.kind.layer == 3 else []
    return Streams([[*info, *frames.spans]], frames.note)


class _Mp3Frames:
    """All frames of an MP3; what is between them is left out."""

    def __init__(self, data: bytes, start: int) -> None:
        self.data, self.num = data, 0
        self.kind: _Kind | None = None
        self.spans: list[tuple[int, int]] = []  # parts with frames
        self.infos: list[tuple[tuple[int, int], int]] = []  # frames with the length of the file, and the number there
        self.first_frame = b""
        self.note = ""
        num_lost, previous, position = 0, start, start
        while position < len(data):
            frame = _parse_frame(data, position)
            is_other = frame is not None and self.kind not in (None, frame.kind)
            if is_other and self._resynchronize(position) != position:
                frame = None  # by chance
            if frame is None or position + frame.num_bytes > len(data):
                if (after := _skip_tag(data, position)) > position:
                    position = previous = after
                    continue
                # If bytes are missing, the next frame begins inside of the previous one.
                found = self._resynchronize(previous + 1 if previous < position else position)
                if found < position and self.spans:
                    self.spans[-1] = (self.spans[-1][0], previous)
                    self.num -= 1
                    position = previous
                if self.num and found < len(data):
                    num_lost += found - position
                position = previous = found
                continue
            stop = position + frame.num_bytes
            if (info := _parse_info(data, position, frame)) is not None:
                self.infos.append(((position, stop), info[0]))
            else:
                self._add(position, stop, frame)
            previous, position = position, stop
        if num_lost:
            self.note = f"{num_lost:,} bytes between its frames are damaged or no audio, and are left out"

    def _resynchronize(self, position: int) -> int:
        """Return the next place from a position on where three frames follow one another, or the end of the data."""
        for sync in _SYNC.finditer(self.data, position):
            place = sync.start()
            kinds: set[_Kind] = set()
            for _ in range(3):
                if (frame := _parse_frame(self.data, place)) is None or kinds - {frame.kind}:
                    break
                kinds.add(frame.kind)
                place += frame.num_bytes
                if place == len(self.data):
                    return sync.start()
            else:
                return sync.start()
        return len(self.data)

    def _add(self, start: int, stop: int, frame: _Frame) -> None:
        if self.kind is None:
            self.kind, self.first_frame = frame.kind, self.data[start : start + 4]
        elif self.kind != frame.kind:
            raise StreamError("its parts have different sampling rates, numbers of channels or layers")
        self.num += 1
        if self.spans and self.spans[-1][1] == start:
            self.spans[-1] = (self.spans[-1][0], stop)
        else:
            self.spans.append((start, stop))


def _make_info(frames: _Mp3Frames) -> bytes:
    """Return a frame without audio that states the number of frames, as encoders write it in front of an MP3."""
    headers = [bytearray(frames.first_frame) for _ in range(14)]
    for index, header in enumerate(headers, 1):
        header[1] |= 1  # no checksum
        header[2] = header[2] & 0b1101 | index << 4  # bit rate, no padding
    candidates = ((header, _parse_frame(header, 0)) for header in headers)
    header, frame = next((h, f) for h, f in candidates if f is not None and f.num_bytes >= f.info_offset + 16)
    num_bytes = frame.num_bytes + sum(map(_length, frames.spans))
    content = bytes(header).ljust(frame.info_offset, b"\0") + struct.pack(">4sIII", b"Xing", 3, frames.num, num_bytes)
    return content.ljust(frame.num_bytes, b"\0")
