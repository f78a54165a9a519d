"""
Find the streams of a file whose header cannot be believed: joined files, lengths that were never written, damage.

libsndfile reads the first stream of a file for as long as its header says. `find_streams` compares that with the bytes
that are there, without decoding them, and says of which parts of the file to make files that libsndfile reads whole.
"""

import io
import math
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import IO, NamedTuple, cast

# Bytes, or the part of a file from the first to the second position.
Piece = bytes | tuple[int, int]

# A part of a file on the disk: path, first byte, number of bytes, and time of the file's last change.
Place = tuple[str, int, int, int]


class StreamError(ValueError):
    """A file that has several streams which cannot be read as one."""


class Streams(NamedTuple):
    """Streams of a file, each a file of pieces; none if it is to be read as it is. `note` is to be told the user."""

    pieces: Sequence[Sequence[Piece]] = ()
    note: str = ""


class PiecedFile:
    """
    A binary file for reading, put together of bytes and of parts of another file.

    `place` is where it is on the disk, if it is one part of a file there.
    """

    def __init__(self, file: IO[bytes], pieces: Sequence[Piece], place: Place | None = None) -> None:
        self._file, self._pieces, self._position, self.place = file, pieces, 0, place
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

    WAV, RF64, AIFF, CAF and AU: files joined to one, and numbers of bytes of samples other than those that are there.
    Ogg: chained streams. MP3: files joined to one, a missing or wrong number of frames, and bytes between the frames
    that are none. Tags in front are left out. The note tells of files that end too early. Raises `StreamError` if MP3
    frames differ in sampling rate or number of channels, or an Ogg file has its pages out of order.
    """
    start = 0
    while (after := start + _skip_tag(_read(file, start, 10))) > start:
        start = after
    head = _read(file, start, 1024)
    for pattern, find_samples in _SIZED.items():
        if re.match(pattern, head, re.DOTALL):
            return _sized_streams(file, start, size, find_samples)
    if head[:4] == b"OggS":
        return _ogg_streams(file, start, size)
    is_padding = size > 12 and not any(head[:12])
    if is_padding or (start and head[:4] != b"fLaC") or _parse_frame(head, 0) is not None:
        return _mp3_streams(file, start, size)
    return Streams(note=_note_on_end(_stated_size(head), size))


def _read(file: IO[bytes], position: int, count: int) -> bytes:
    file.seek(min(position, 1 << 40))  # headers may state positions that no file has
    return file.read(count)


def _stated_size(head: bytes) -> int:
    """Return the size of a W64 or NIST SPHERE file as its first bytes state it; 0 if they do not."""
    if head[:4] == b"riff":
        return int.from_bytes(head[16:24], "little")
    fields = dict(re.findall(rb"^(sample_count|sample_n_bytes|channel_count) -i (\d{1,18})\s", head, re.MULTILINE))
    is_sphere = head[:8] == b"NIST_1A\n" and len(fields) == 3
    return int(head[8:15]) + math.prod(map(int, fields.values())) if is_sphere and head[8:15].strip().isdigit() else 0


def _note_on_end(stated: int, actual: int) -> str:
    """Return the note on a file, or samples, with fewer bytes than stated; none if they are few or none is meant."""
    is_unknown = any(abs(stated - (1 << bits)) <= 1 << 16 for bits in (31, 32, 63, 64))
    if stated - actual <= 64 or is_unknown:
        return ""
    return f"its header promises {stated:,} bytes, but {actual:,} are there and read. Is it truncated?"


class _SizedData(NamedTuple):
    """Samples in a file: their first byte, their number of bytes as stated, and where and how that is stated."""

    start: int
    num_bytes: int
    size_position: int
    size_format: str
    is_mp3: bool = False


_MAX_CHUNKS = 10_000  # in front of the samples; more are zeros, or noise


def _find_in_chunks(first: int, head: str, name: bytes, file: IO[bytes], start: int) -> _SizedData | None:
    """Find the chunk of samples in a file that begins at `start`; `head`: `struct` of a chunk's name and size."""
    position, length, is_mp3 = start + first, struct.calcsize(head), False
    for _ in range(_MAX_CHUNKS):
        if len(data := _read(file, position, length)) < length:
            break
        found, num_bytes = struct.unpack(head, data)
        if found == name:
            return _SizedData(position + length, num_bytes, position + 4, head[0] + head[-1], is_mp3)
        if found == b"fmt ":
            is_mp3 = _read(file, position + length, 2) == b"\x55\0"
        position += length + max(0, num_bytes) + (num_bytes % 2 if first == 12 else 0)
    return None


def _find_in_rf64(file: IO[bytes], start: int) -> _SizedData | None:
    data = _find_in_chunks(12, "<4sI", b"data", file, start)
    num_bytes = int.from_bytes(_read(file, start + 28, 8), "little")  # in the chunk of numbers of 64 bits
    return data and data._replace(num_bytes=num_bytes, size_position=start + 28, size_format="<Q")


def _find_in_au(head: str, file: IO[bytes], start: int) -> _SizedData | None:
    data = _read(file, start + 4, 8)
    offset, num_bytes = struct.unpack(head, data) if len(data) == 8 else (0, 0)
    # An offset within the header is wrong.
    return _SizedData(start + offset, num_bytes, start + 8, head[0] + head[-1]) if offset >= 24 else None


_Finder = Callable[[IO[bytes], int], _SizedData | None]

# By regular expressions for the beginnings of files.
_SIZED: dict[bytes, _Finder] = {
    rb"RIFF....WAVE": partial(_find_in_chunks, 12, "<4sI", b"data"),
    rb"RIFX....WAVE": partial(_find_in_chunks, 12, ">4sI", b"data"),
    rb"RF64....WAVEds64": _find_in_rf64,
    rb"FORM....AIF[FC]": partial(_find_in_chunks, 12, ">4sI", b"SSND"),
    rb"caff": partial(_find_in_chunks, 8, ">4sq", b"data"),
    rb"\.snd": partial(_find_in_au, ">II"),
    rb"dns\.": partial(_find_in_au, "<II"),
}


def _sized_streams(file: IO[bytes], start: int, size: int, find_samples: _Finder) -> Streams:
    """Return the streams of a file whose samples' number of bytes is stated in front of them."""
    streams: list[list[Piece]] = []
    has_tag, note = start > 0, ""
    while (data := find_samples(file, start)) is not None:
        end = data.start + data.num_bytes
        if data.is_mp3:  # of which libsndfile estimates the length
            end = min(end, size) if data.num_bytes else size
            mp3 = _mp3_streams(file, data.start, end)
            return mp3 if mp3.pieces else Streams([[(data.start, end)]], mp3.note)
        following, magic = end + data.num_bytes % 2, _read(file, start, 4)
        joined = next((place for place in (following, end) if _read(file, place, 4) == magic), None)
        if data.num_bytes >= 0 and joined is not None:
            streams.append([(start, joined)])
            start = joined
            continue
        is_known = data.num_bytes >= 0 and end <= size
        if is_known and (
            any(_is_metadata(file, place, size, data.size_format) for place in (following, end))
            or (data.num_bytes and not any(_read(file, end, 1 << 20)))  # padding
        ):
            break
        there = size - data.start
        note = _note_on_end(data.num_bytes, there)
        if is_known:
            note = f"its header promises {data.num_bytes:,} bytes of samples, but {there:,} are there and read."
            note += " Was its recorder killed?"
        # A number of 32 bits is set to the one for an unknown length, which libsndfile knows.
        new = b"\xff" * 4 if data.size_format[1] == "I" else struct.pack(data.size_format, there)
        if _read(file, data.size_position, len(new)) != new:
            streams.append([(start, data.size_position), new, (data.size_position + len(new), size)])
            return Streams(streams, note)
        break
    if streams:
        note = f"it is {len(streams) + 1} files joined to one, all of which are read"
    if streams or has_tag:
        streams.append([(start, size)])
    return Streams(streams, note)


def _is_metadata(file: IO[bytes], position: int, size: int, size_format: str) -> bool:
    """Return whether there is the end of the file, a tag or another chunk at a position."""
    length = 4 + struct.calcsize(size_format)
    head = _read(file, position, length)
    if len(head) < length or head[:3] in (b"TAG", b"ID3") or head[:8] == b"APETAGEX" or head[:4] == b"LIST":
        return True
    (num_bytes,) = struct.unpack(size_format, head[4:])
    return all(32 <= byte < 127 for byte in head[:4]) and position + length + num_bytes <= size + 1


class _Page(NamedTuple):
    """A page of one of the streams of an Ogg file; `time` is in samples, negative if it has none."""

    start: int
    end: int
    flags: int
    time: int
    stream: int
    is_audio: bool  # if it is the first of its stream


def _ogg_pages(file: IO[bytes], start: int, size: int) -> Iterator[_Page]:
    longest_head = 512
    while len(block := _read(file, start, 1 << 20)) > 27:
        is_last = start + len(block) >= size
        for found in re.finditer(rb"OggS\0[\0-\x07]", block):
            place = found.start()
            if place + 27 > len(block) or (place >= len(block) - longest_head and not is_last):
                break
            flags, time, stream = struct.unpack("<BqI", block[place + 5 : place + 18])
            body = place + 27 + block[place + 26]
            is_audio = block[body:].startswith((b"\x01vorbis", b"OpusHead", b"\x7fFLAC", b"Speex"))
            end = body + sum(block[place + 27 : body])
            yield _Page(start + place, start + end, flags, time, stream, is_audio)
        start += len(block) if is_last else len(block) - longest_head


def _ogg_streams(file: IO[bytes], start: int, size: int) -> Streams:
    """Return the streams of a chained Ogg file: pages that begin streams, after pages that do not."""
    links: list[tuple[int, dict[int, _Page]]] = []  # first byte, and the last page of each stream of audio
    is_beginning = False
    for page in _ogg_pages(file, start, size):
        if page.flags & 2 and not is_beginning:
            links.append((page.start if links else start, {}))
        is_beginning = bool(page.flags & 2)
        pages = links[-1][1] if links else {}
        if is_beginning and page.is_audio:
            pages[page.stream] = page
        elif page.stream in pages:
            latest = pages[page.stream].time
            if 0 <= page.time < latest:
                raise StreamError("its pages are not in the order of time")
            pages[page.stream] = page._replace(time=max(page.time, latest))
    starts, note = [place for place, _ in links], ""
    ends = [*starts, size][1:]
    for (_, pages), end in zip(links, ends, strict=True):
        if len(pages) > 1:
            note = f"it has {len(pages)} recordings at the same time, of which the first is read"
        elif any(page.end > end or not page.flags & 4 for page in pages.values()):
            note = "its stream, or one of them, has no last page. The pages that exist are read. Is it truncated?"
    is_native = starts in ([], [0])
    return Streams([] if is_native else [[part] for part in zip(starts, ends, strict=True)], note)


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
    start = position + frame.info_offset
    info = data[start : start + 16]
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
    frame = _parse_frame(head, info.num_bytes)
    is_constant = head[info.info_offset : info.info_offset + 4] == b"Info"  # else the frames are to be counted
    if frame is None or not is_constant or not all(stated) or abs(num_bytes - stated[1]) > longest:
        return False
    # With padding, a frame may have a byte more.
    return abs(stated[1] / stated[0] - frame.num_bytes) <= 2


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
    if frames.kind.layer == 3:
        return Streams([[_make_info(frames), *frames.spans]], frames.note)
    longest = cast(_Frame, _parse_frame(frames.first_frame, 0)).num_bytes - 4  # without padding
    if frames.num * longest > sum(map(_length, frames.spans)):
        raise StreamError("its bit rate falls, and libsndfile takes its length from the first frame")
    return Streams([frames.spans], frames.note)


class _Mp3Frames:
    """All frames of an MP3; what is between them is left out."""

    def __init__(self, data: bytes, start: int) -> None:
        self.data, self.num = data, 0
        self.kind: _Kind | None = None
        self.spans: list[tuple[int, int]] = []  # parts with frames
        self.infos: list[tuple[tuple[int, int], int]] = []  # frames with the length of the file, and the number there
        self.first_frame = b""
        self.note = ""
        num_lost, previous, position, is_cut = 0, start, start, False
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
                is_cut = frame is not None and found == len(data)
                position = previous = found
                continue
            stop = position + frame.num_bytes
            if (info := _parse_info(data, position, frame)) is not None:
                self.infos.append(((position, stop), info[0]))
            else:
                self._add(position, stop, frame)
            previous, position = position, stop
        if is_cut:
            self.note = "its last frame is not complete, and is left out. Is it truncated?"
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
