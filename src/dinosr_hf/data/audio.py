"""
Read audio files: decode with soundfile, mix down to mono, resample with soxr. Reading a part decodes only that part.

Files keep their own rate; a *frame* of a file is one sample per channel.
"""

import io
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ..model.configuration_dinosr import SAMPLING_RATE as SAMPLING_RATE  # for all of `data`
from ..utils.damaged_files import explain_stand_in
from ..utils.extras import import_extra
from ..utils.names import printable_name
from ..utils.visible_text import path_on_disk
from .containers import PiecedFile, StreamError, Streams, find_streams
from .finding import how_to_convert, unsupported_kind

logger = logging.getLogger(__name__)


class Samples(NamedTuple):
    """A recording in memory: mono samples, float (frames,), and their rate in Hz."""

    frames: np.ndarray
    rate: int


# A path, the bytes of a file, a seekable binary file object, or samples.
AudioInput = str | Path | bytes | IO[bytes] | Samples

# Both decoders give wrong samples after a seek, until they have decoded some more (measured: up to 0.5 s of MP3 at
# 8 kbit/s, whose frames borrow bits from earlier ones; 1 s of Vorbis near the end of the file; 3 s of Opus). So a part
# is decoded from that much earlier on. MP3 gets more than it needs: an utterance of usual length is then decoded from
# its beginning, and libmpg123, which reports each frame that it cannot decode after a seek to stderr, stays silent.
_PREROLL_SECONDS = {"MP3": 30, "OGG": 10}

# Half the length of soxr's filter in samples of the lower of both rates: 80 at quality HQ leave 2e-5, 160 leave 5e-7.
_RESAMPLER_MARGIN = 200

# Number of frames to decode at a time where a whole file is gone through.
BLOCK_FRAMES = 1 << 20

# Sampling rates of recordings, Hz: others are damaged headers, which would be resampled to terabytes or to nothing.
MIN_RATE, MAX_RATE = 1_000, 768_000

# Speech has some frames a byte, Opus at its lowest rate 64, silence in FLAC 340. A header that promises more than this
# is not believed: its frames are counted.
_MAX_FRAMES_PER_BYTE = 100

_UNKNOWN_LENGTH = 2**63 - 1  # of a stream, in libsndfile

# Formats of whose files `find_streams` knows all bytes.
_EXAMINED = ("WAV", "WAVEX", "RF64", "AIFF", "AU", "OGG")

# A file with more bytes has samples.
_LONGEST_HEADER = 1 << 12

_CONVERT = "Convert it, for example with ffmpeg -i FILE NEW.flac, or leave it out."

# soundfile opens one file at a time, holding a lock of its own. A worker that is forked while another thread (one that
# reads a stream ahead) holds that lock would deadlock, so forking waits until no file is being opened.
_OPENING = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_OPENING.acquire, after_in_parent=_OPENING.release, after_in_child=_OPENING.release)


class AudioFileError(ValueError):
    """
    An audio file that cannot be used.

    `reason` is "missing", "unreadable", "unsupported .m4a" (or another suffix), "empty", "truncated", "not finite",
    "silent", "hidden", or of a folder "not listed".
    """

    def __init__(self, message: str, reason: str = "unreadable") -> None:
        super().__init__(printable_name(message))  # it has the file's name
        self.reason = reason


class AudioInfo(NamedTuple):
    """Number of samples at 16 kHz, as `load_audio` returns them, and the file's own sampling rate and channels."""

    num_samples: int
    sampling_rate: int
    num_channels: int


# What warnings about a recording without a path call it.
_SUBJECT = ContextVar("subject", default="The recording")


@contextmanager
def about(subject: str) -> Iterator[None]:
    """Name what is read within the block: in warnings, unless it has a path, and in front of `AudioFileError`."""
    token = _SUBJECT.set(subject)
    try:
        yield
    except AudioFileError as error:
        raise AudioFileError(f"{subject}: {error}", error.reason) from error
    finally:
        _SUBJECT.reset(token)


def require(module: str) -> Any:
    """Import an optional package of the extra `train`. Raises `ImportError` that says how to install it."""
    return import_extra(module, "train", "Reading audio")


def resampled_length(num_frames: int, sampling_rate: int, target_rate: int = SAMPLING_RATE) -> int:
    """Return the length at `target_rate` of `num_frames` at `sampling_rate`, rounded half up as soxr does."""
    return (2 * num_frames * target_rate + sampling_rate) // (2 * sampling_rate)


class _Stream:
    """A stream of an audio file, decoded from its beginning on, or from where it is to be read if it can seek."""

    def __init__(self, name: str, file: Any, size: int) -> None:
        self.name, self._file, self._size = name, file, size
        self._open()
        claimed = int(self.sound.frames)
        is_estimate = self.sound.subtype in ("MPEG_LAYER_I", "MPEG_LAYER_II")
        self.is_counted = 0 <= claimed <= _MAX_FRAMES_PER_BYTE * size and not is_estimate
        self.num_frames = claimed  # at most, if they are not counted

    def _open(self) -> None:
        if isinstance(self._file, int):
            os.lseek(self._file, 0, os.SEEK_SET)
        else:
            self._file.seek(0)  # libsndfile takes the current position for the beginning of the file
        with _OPENING:
            self.sound = require("soundfile").SoundFile(self._file, closefd=False)
        self._can_seek = self.sound.seekable()
        # soundfile seeks after each read of a seekable file, after which MP3 and Ogg are decoded wrongly for a while.
        self.sound.seekable = lambda: False
        self._position = 0

    def close(self) -> None:
        """Close the decoder, not the file."""
        self.sound.close()

    def count_frames(self) -> int:
        """Return the number of frames; decode all of them once if the header's number is not credible."""
        if not self.is_counted:
            found = 0
            while num_read := len(self.read(found, BLOCK_FRAMES)):
                found += num_read
            if found < self.num_frames < _UNKNOWN_LENGTH:
                problem = f"its header promises {self.num_frames:,} frames, but {found:,} are there and read"
                _warn(self.name, problem)
            self.num_frames, self.is_counted = found, True
        return self.num_frames

    def read(self, first: int, count: int) -> np.ndarray:
        """Decode frames from `first` on, mono float32 (count,); fewer at an end that the header does not tell."""
        soundfile = require("soundfile")
        try:
            if first != self._position:
                self._go_to(first)
            samples = self._decode(count)
            if len(samples) == count or not self.is_counted:
                return samples
            problem = f"{len(samples):,} of {count:,} frames from frame {first:,} on could be read"
        except soundfile.SoundFileError as error:
            problem = str(error).strip().rstrip(".") or "the decoder gave up"
        promised = f", of {self.num_frames:,} that its header promises" if self.is_counted else ""
        message = f"{self.name} is truncated or damaged: {problem}{promised}. Download it again, or leave it out."
        raise AudioFileError(message, "truncated")

    def _go_to(self, frame: int) -> None:
        """Go to a frame, decoding those before it that the decoder needs."""
        if self._can_seek:
            preroll = _PREROLL_SECONDS.get(self.sound.format, 0) * self.sound.samplerate
            self._position = max(0, frame - preroll)
            self.sound.seek(self._position)
        elif frame < self._position:
            self.sound.close()
            self._open()
        while (missing := frame - self._position) and len(self._decode(min(missing, BLOCK_FRAMES))):
            pass

    def _decode(self, count: int) -> np.ndarray:
        """Decode the next frames, mono float32 (count,); a block at a time, since there may be far fewer."""
        blocks = [np.empty(0, np.float32)]
        while count:
            size = min(count, BLOCK_FRAMES)
            block = self.sound.read(size, dtype="float32", always_2d=True)
            self._position += len(block)
            blocks.append(
                block[:, 0] if block.shape[1] == 1 else sum(block.T) / block.shape[1]
            )  # mean(axis=1) is slower
            count -= len(block)
            if len(block) < size:
                break
        self._check_rest()
        return np.concatenate(blocks) if len(blocks) != 2 else blocks[1]

    def _check_rest(self) -> None:
        """Warn if much of the file is left at the end that the header tells; `find_streams` looks at other formats."""
        if not self.is_counted or self._position < self.num_frames or self.sound.format in _EXAMINED:
            return
        where = os.lseek(self._file, 0, os.SEEK_CUR) if isinstance(self._file, int) else self._file.tell()
        rest = self._size - where
        if rest > max(4096, 0 if self.sound.format == "FLAC" else self._size // 10):
            problem = f"{rest:,} of {self._size:,} bytes come after the {self.num_frames:,} frames that its header"
            _warn(self.name, f"{problem} promises, and are not read. {_CONVERT}")


class OpenAudio:
    """An audio file being read, and its name in messages: a stream, or several of the same rate, one after another."""

    def __init__(self, name: str, streams: list[_Stream]) -> None:
        self.name, self._streams = name, streams
        sound = streams[0].sound
        self.rate, self.num_channels = int(sound.samplerate), int(sound.channels)
        self.subtype: str = sound.subtype
        self.kind = f"{sound.format} {sound.subtype}"

    @property
    def max_frames(self) -> int:
        """Largest number of frames that there may be, without decoding the last stream."""
        return sum(stream.count_frames() for stream in self._streams[:-1]) + self._streams[-1].num_frames

    def count_frames(self) -> int:
        """Return the number of frames; decodes the file block by block if it does not have its length."""
        return sum(stream.count_frames() for stream in self._streams)

    def read(self, first: int, count: int) -> np.ndarray:
        """Decode frames from `first` on, mono float32 (count,); fewer at an end that the header does not tell."""
        if len(self._streams) == 1:
            return self._streams[0].read(first, count)
        parts = [np.empty(0, np.float32)]
        for stream in self._streams:
            num_frames = stream.count_frames()
            if count and first < num_frames:
                parts.append(stream.read(first, min(count, num_frames - first)))
                count -= len(parts[-1])
            first = max(0, first - num_frames)
        return np.concatenate(parts)


def _warn(name: str, problem: str) -> None:
    """Warn about a file that is read nevertheless, once."""
    _warn_once(_SUBJECT.get() if name == "The recording" else name, problem)


@lru_cache(maxsize=1 << 16)
def _warn_once(name: str, problem: str) -> None:
    logger.warning("%s: %s%s", printable_name(name), problem, "" if problem.endswith(("?", ".")) else ".")


@lru_cache(maxsize=1024)
def _find_streams_at(path: str | Path, first: int, size: int, modified: int) -> Streams:
    """Find the streams of a file, or of a part of an archive, once: windows of them are read one by one."""
    with open(path, "rb") as file:
        return find_streams(PiecedFile(file, [(first, first + size)]) if first else file, size)  # type: ignore[arg-type]


@contextmanager
def open_audio(source: AudioInput) -> Iterator[OpenAudio]:
    """
    Open an audio file for reading.

    All of it is read, whatever its header says: see `containers.find_streams`. A number of frames that so many bytes
    hardly hold, or that is unknown, is not believed but counted.

    Raises `AudioFileError` if the file is missing, empty, not audio, needs more memory than there is, has a sampling
    rate out of range or streams that do not fit together, and `ImportError` without soundfile.
    """
    soundfile = require("soundfile")
    path = path_on_disk(source) if isinstance(source, (str, Path)) else None
    source = source if path is None else path
    name = "The recording" if path is None else str(path)
    with ExitStack() as stack:
        try:
            if path is None:
                file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
                size = file.seek(0, io.SEEK_END)
                place = getattr(file, "place", None)
                found = find_streams(file, size) if place is None else _find_streams_at(*place)
            else:
                if not os.path.isfile(path):  # opening a pipe would wait for someone to write to it
                    raise FileNotFoundError(path)
                file = stack.enter_context(open(path, "rb", buffering=0))
                status = os.fstat(file.fileno())
                size = status.st_size
                found = _find_streams_at(path, 0, size, status.st_mtime_ns)
            if found.note:
                _warn(name, found.note)
            if found.pieces:
                files = [PiecedFile(file, pieces) for pieces in found.pieces]
                streams = [_Stream(name, part, part.size) for part in files]
            else:
                is_descriptor = path is not None and os.name != "nt"
                streams = [_Stream(name, file.fileno() if is_descriptor else file, size)]
            for stream in streams:
                stack.callback(stream.close)
        except StreamError as error:
            raise AudioFileError(f"{name} cannot be read: {error}. {_CONVERT}") from error
        except (soundfile.SoundFileError, OSError, MemoryError) as error:
            raise _explain_unreadable(source, name, error) from error
        rates = sorted({int(stream.sound.samplerate) for stream in streams})
        for rate in rates:
            check_rate(name, rate)
        if len(rates) > 1:
            joined = f"{len(streams)} files joined to one, with rates of {', '.join(f'{rate:,}' for rate in rates)} Hz"
            raise AudioFileError(f"{name} cannot be read: it is {joined}. {_CONVERT}")
        if streams[0].num_frames == 0 and size > _LONGEST_HEADER:
            problem = f"its header promises no samples, but it has {size:,} bytes"
            raise AudioFileError(f"{name} cannot be read: {problem}. {_CONVERT}")
        try:
            yield OpenAudio(name, streams)
        except MemoryError as error:
            raise AudioFileError(f"{name} cannot be read: it needs more memory than there is. Cut it.") from error


def check_rate(name: str, rate: int) -> None:
    """Raise `AudioFileError` if a sampling rate is none that recordings have."""
    if not MIN_RATE <= rate <= MAX_RATE:
        problem = f"cannot be read: its sampling rate is {rate:,} Hz, which must be from {MIN_RATE:,} to {MAX_RATE:,}"
        raise AudioFileError(f"{name} {problem}. Correct its header, or leave it out.")


def _head(source: AudioInput) -> bytes:
    """Return the first bytes of a recording, which tell its kind."""
    if isinstance(source, bytes):
        return source[:1024]
    if isinstance(source, (str, Path)):
        with open(source, "rb") as file:
            return file.read(1024)
    assert not isinstance(source, Samples)
    source.seek(0)
    return source.read(1024)


def _explain_unreadable(source: AudioInput, name: str, error: Exception) -> AudioFileError:
    if isinstance(source, (str, Path)) and os.path.isdir(source):
        try:
            os.scandir(source).close()
        except OSError as problem:
            return AudioFileError(f"{name} cannot be listed: {problem.strerror}. Check its permissions.", "not listed")
    if isinstance(source, (str, Path)) and not os.path.isfile(source):
        return AudioFileError(f"{name} is not a file. Check the path.", "missing")
    if source == b"" or (isinstance(source, (str, Path)) and os.path.getsize(source) == 0):
        return AudioFileError(f"{name} is empty (0 bytes). Leave it out or download it again.", "empty")
    path = source if isinstance(source, (str, Path)) else ""
    try:
        head = _head(source)
    except OSError as problem:  # no permission, or a disk that fails
        return AudioFileError(f"{name} cannot be read: {problem.strerror or problem}. Check its permissions and disk.")
    if (stand_in := explain_stand_in(head, os.path.getsize(path) if path else None)) is not None:
        return AudioFileError(f"{name} {stand_in}")
    if (kind := unsupported_kind(path, head)) is not None:
        return AudioFileError(f"{name} cannot be read: {how_to_convert(path, kind)}", f"unsupported {kind}")
    cause = str(getattr(error, "error_string", error)).rstrip(".") or "not enough memory"
    advice = "Convert the file, for example to flac, or leave it out."
    return AudioFileError(f"{name} cannot be read as audio: {cause}. {advice}")


def _length(name: str, num_frames: int, frame_rate: int, sampling_rate: int = SAMPLING_RATE) -> int:
    length = resampled_length(num_frames, frame_rate, sampling_rate)
    if length == 0:
        raise AudioFileError(f"{name} has no samples. Leave it out or download it again.", "empty")
    return length


def audio_info(source: AudioInput) -> AudioInfo:
    """
    Return length, sampling rate and number of channels of a recording, from its header.

    Only files that state no length, or one that so many bytes hardly hold, are decoded. A header may promise more than
    a truncated FLAC or MP3 holds, which only `load_audio` finds out. Raises `AudioFileError` if the file is
    missing, is not audio, or has no samples, and `ImportError` if soundfile is not installed.
    """
    if isinstance(source, Samples):
        check_rate("The recording", source.rate)
        return AudioInfo(_length("The recording", len(source.frames), source.rate), source.rate, 1)
    with open_audio(source) as audio:
        return AudioInfo(_length(audio.name, audio.count_frames(), audio.rate), audio.rate, audio.num_channels)


def load_audio(
    source: AudioInput, *, start: int = 0, num_samples: int | None = None, sampling_rate: int = SAMPLING_RATE
) -> np.ndarray:
    """
    Read a recording, or a part of it, as mono (the mean of its channels) at `sampling_rate`.

    Of a file, only the part and the resampler's margin are decoded, and for MP3 and Ogg up to 30 and 10 seconds before
    it, without which their decoders would return other samples than for the whole file. A part equals the slice of the
    whole recording: exactly if no resampling is needed, else to 1e-6 of full scale (measured: at most 8e-7, over 13
    rates).

    Args:
        source: Path, bytes of a file, or a seekable binary file object; or `Samples`.
        start: First sample, at `sampling_rate` (Hz).
        num_samples: Number of samples, at `sampling_rate`; None for all from `start` on.

    Returns:
        float32 (num_samples,); lossy formats may exceed 1.0 slightly.

    Raises:
        AudioFileError: If the file is missing, not audio, empty, truncated, shorter than the part, or not finite.
        ValueError: If `start` or `num_samples` is out of range.
        ImportError: If soundfile is not installed, or soxr where it is needed.
    """
    if start < 0 or (num_samples is not None and num_samples < 1):
        raise ValueError(f"start={start} and num_samples={num_samples} must be at least 0 and at least 1.")
    part = (start, num_samples, sampling_rate)
    if isinstance(source, Samples):
        frames, rate = source
        check_rate("The recording", rate)

        def read(first: int, count: int) -> np.ndarray:
            return frames[first : first + count]

        return _load_part("The recording", read, len(frames), rate, part)
    with open_audio(source) as audio:
        # The frames of a part need not be counted, only found to be there.
        num_frames = audio.count_frames() if num_samples is None else audio.max_frames
        return _load_part(audio.name, audio.read, num_frames, audio.rate, part)


def _load_part(
    name: str,
    read: Callable[[int, int], np.ndarray],
    num_frames: int,
    frame_rate: int,
    part: tuple[int, int | None, int],
) -> np.ndarray:
    """Load a part of a recording, of which `read(first, count)` returns mono frames, float (count,)."""
    start, num_samples, sampling_rate = part
    total = _length(name, num_frames, frame_rate, sampling_rate)
    stop = total if num_samples is None else start + num_samples
    samples = np.empty(0, np.float32)
    if start < total and stop <= total:
        if frame_rate == sampling_rate:
            samples = np.ascontiguousarray(read(start, stop - start), dtype=np.float32)
        else:
            # Begin where a frame and a sample coincide, so that soxr's grid is that of the whole recording.
            common = math.gcd(frame_rate, sampling_rate)
            period = frame_rate // common
            margin = math.ceil(_RESAMPLER_MARGIN * frame_rate / min(frame_rate, sampling_rate))
            first = max(0, start * frame_rate // sampling_rate - margin) // period * period
            last = min(num_frames, math.ceil(stop * frame_rate / sampling_rate) + margin)
            frames = np.ascontiguousarray(read(first, last - first), dtype=np.float32)
            resampled = require("soxr").resample(frames, frame_rate, sampling_rate, quality="HQ")
            offset = start - first // period * (sampling_rate // common)
            samples = resampled[offset : offset + stop - start]
        if len(samples) < stop - start:  # `num_frames` is only a limit
            total = start + len(samples)
    if stop > total or start >= total:
        found = f"{name} has {total:,} samples at {sampling_rate:,} Hz, but the part from {start:,} to {stop:,} was"
        advice = "It has changed since it was listed, or its manifest is wrong: list the files again."
        raise AudioFileError(f"{found} requested. {advice}", "truncated")
    if not np.isfinite(samples).all():
        raise AudioFileError(f"{name} has samples that are NaN or infinite. Repair it or leave it out.", "not finite")
    return np.ascontiguousarray(samples)


def change_speed(waveform: np.ndarray, speed: float) -> np.ndarray:
    """
    Resample a waveform, float32 (S,), so that frequencies are multiplied by `speed`, and durations divided by it.

    Ko et al. 2015, "Audio augmentation for speech recognition", Interspeech.
    """
    return require("soxr").resample(waveform, speed, 1.0, quality="HQ")


def normalize_waveform(waveform: np.ndarray) -> np.ndarray:
    """
    Normalize a waveform, float (S,), to zero mean and unit (biased) variance, eps 1e-5: the paper's `normalize: true`.

    Returns float32 (S,); silence stays silence.
    """
    mean = waveform.mean(dtype=np.float64)
    variance = waveform.var(dtype=np.float64)
    return ((waveform - mean) / np.sqrt(variance + 1e-5)).astype(np.float32)
