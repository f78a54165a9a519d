"""
Read audio files: decode with soundfile, mix down to mono, resample with soxr. Reading a part decodes only that part.

Files keep their own rate; a *frame* of a file is one sample per channel.
"""

import io
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ..model.configuration_dinosr import SAMPLING_RATE as SAMPLING_RATE  # for all of `data`
from ..utils.extras import import_extra


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

# soundfile opens one file at a time, holding a lock of its own. A worker that is forked while another thread (one that
# reads a stream ahead) holds that lock would deadlock, so forking waits until no file is being opened.
_OPENING = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_OPENING.acquire, after_in_parent=_OPENING.release, after_in_child=_OPENING.release)


class AudioFileError(ValueError):
    """An audio file that cannot be used; `reason` is "missing", "unreadable", "empty", "truncated" or "not finite"."""

    def __init__(self, message: str, reason: str = "unreadable") -> None:
        super().__init__(message)
        self.reason = reason


class AudioInfo(NamedTuple):
    """Number of samples at 16 kHz, as `load_audio` returns them, and the file's own sampling rate and channels."""

    num_samples: int
    sampling_rate: int
    num_channels: int


def require(module: str) -> Any:
    """Import an optional package of the extra `train`. Raises `ImportError` that says how to install it."""
    return import_extra(module, "train", "Reading audio")


def resampled_length(num_frames: int, sampling_rate: int, target_rate: int = SAMPLING_RATE) -> int:
    """Return the length at `target_rate` of `num_frames` at `sampling_rate`, rounded half up as soxr does."""
    return (2 * num_frames * target_rate + sampling_rate) // (2 * sampling_rate)


class OpenAudio(NamedTuple):
    """An audio file being read, and its name in messages."""

    name: str
    sound: Any  # soundfile.SoundFile
    has_length: bool  # whether `sound.frames` is the length of the file, which is shorter if not

    def count_frames(self) -> int:
        """Return the number of frames; decodes the file block by block if it does not have its length."""
        if self.has_length:
            return int(self.sound.frames)
        num_frames = 0
        while num_read := len(self.read(num_frames, BLOCK_FRAMES)):
            num_frames += num_read
        self.sound.seek(0)
        return num_frames

    def read(self, first: int, count: int) -> np.ndarray:
        """Decode frames from `first` on, mono float32 (count,); fewer at an end that the header does not tell."""
        soundfile, sound = require("soundfile"), self.sound
        start = first
        try:
            if first != sound.tell():
                start = max(0, first - _PREROLL_SECONDS.get(sound.format, 0) * sound.samplerate)
                sound.seek(start)
            samples = sound.read(first - start + count, dtype="float32", always_2d=True)[first - start :]
            if len(samples) == count or not self.has_length:
                return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
            problem = f"{len(samples):,} of {count:,} frames from frame {first:,} on could be read"
        except soundfile.SoundFileError as error:
            problem = str(error).strip() or "the decoder gave up"
        promised = f", of {sound.frames:,} that its header promises" if self.has_length else ""
        message = f"{self.name} is truncated or damaged: {problem}{promised}. Download it again, or leave it out."
        raise AudioFileError(message, "truncated")


class _LongerFile:
    """A binary file that claims more bytes than it has; reading stops at its real end, before an ID3v1 tag there."""

    def __init__(self, file: IO[bytes], num_extra_bytes: int) -> None:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - 128))
        self._file, self._position = file, 0
        self._end = size - 128 if file.read(3) == b"TAG" else size
        self._claimed_size = size + num_extra_bytes

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._claimed_size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, count: int) -> bytes:
        if self._position + count == self._claimed_size:  # libmpg123 fails if there are no bytes where a tag may be
            data = bytes(count)
        else:
            self._file.seek(self._position)
            data = self._file.read(max(0, min(count, self._end - self._position)))
        self._position += len(data)
        return data


def _open_sound(file: Any) -> Any:
    with _OPENING:
        sound = require("soundfile").SoundFile(file)
    # soundfile seeks after each read of a seekable file, after which MP3 and Ogg are decoded wrongly for a while.
    sound.seekable = lambda: False
    return sound


@contextmanager
def open_audio(source: AudioInput) -> Iterator[OpenAudio]:
    """
    Open an audio file for reading.

    libsndfile estimates the length of an MP3 without a length in its header (Xing or Info) from the bit rate of its
    first frame and the size of the file, and reads no further. Such a file is recognized by trying another size; it
    is then opened with a claimed size so large that the estimate does not end it early.

    Raises `AudioFileError` if the file is missing, empty or not audio, and `ImportError` without soundfile.
    """
    soundfile = require("soundfile")
    path = source if isinstance(source, (str, Path)) else None
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    name = "The recording" if path is None else str(path)
    with ExitStack() as stack:
        try:
            if path is None:
                file.seek(0)  # libsndfile takes the current position for the beginning of the file
            else:
                # soundfile itself cannot encode a name that is not UTF-8.
                file = os.fspath(path) if os.name == "nt" else os.fsencode(path)
            sound = stack.enter_context(_open_sound(file))
        except (soundfile.SoundFileError, OSError) as error:
            raise _explain_unreadable(source, name, error) from error
        has_length = True
        if sound.format == "MP3":
            if path is not None:
                file = stack.enter_context(open(path, "rb"))
            position = file.tell()
            with _open_sound(_LongerFile(file, 8)) as longer:
                has_length = longer.frames == sound.frames
            if not has_length:
                # Long enough for any file: the highest bit rate of MP3 is 20 times the lowest.
                sound = stack.enter_context(_open_sound(_LongerFile(file, 31 * file.seek(0, io.SEEK_END))))
            elif path is None:
                file.seek(position)  # where `sound` reads on
        yield OpenAudio(name, sound, has_length)


def _explain_unreadable(source: AudioInput, name: str, error: Exception) -> AudioFileError:
    if isinstance(source, (str, Path)) and not os.path.isfile(source):
        return AudioFileError(f"{name} is not a file. Check the path.", "missing")
    if source == b"" or (isinstance(source, (str, Path)) and os.path.getsize(source) == 0):
        return AudioFileError(f"{name} is empty (0 bytes). Leave it out or download it again.", "empty")
    cause = str(getattr(error, "error_string", error)).rstrip(".")
    advice = "Supported formats are wav, flac, ogg, opus and mp3. Convert the file, or leave it out."
    return AudioFileError(f"{name} cannot be read as audio: {cause}. {advice}")


def _length(name: str, num_frames: int, frame_rate: int, sampling_rate: int = SAMPLING_RATE) -> int:
    length = resampled_length(num_frames, frame_rate, sampling_rate)
    if length == 0:
        raise AudioFileError(f"{name} has no samples. Leave it out or download it again.", "empty")
    return length


def audio_info(source: AudioInput) -> AudioInfo:
    """
    Return length, sampling rate and number of channels of a recording, from its header.

    Only MP3s without a length in their header are decoded (about 1 s per hour of audio). A header may promise more
    than a truncated FLAC or MP3 holds, which only `load_audio` finds out. Raises `AudioFileError` if the file is
    missing, is not audio, or has no samples, and `ImportError` if soundfile is not installed.
    """
    if isinstance(source, Samples):
        return AudioInfo(_length("The recording", len(source.frames), source.rate), source.rate, 1)
    with open_audio(source) as audio:
        rate = audio.sound.samplerate
        return AudioInfo(_length(audio.name, audio.count_frames(), rate), rate, audio.sound.channels)


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
        source: Path, bytes of a file, or a seekable binary file object (wav, flac, ogg, opus, mp3); or `Samples`.
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

        def read(first: int, count: int) -> np.ndarray:
            return frames[first : first + count]

        return _load_part("The recording", read, len(frames), rate, part)
    with open_audio(source) as audio:
        # The frames of a part need not be counted, only found to be there.
        num_frames = audio.count_frames() if num_samples is None else int(audio.sound.frames)
        return _load_part(audio.name, audio.read, num_frames, audio.sound.samplerate, part)


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


def normalize_waveform(waveform: np.ndarray) -> np.ndarray:
    """
    Normalize a waveform, float (S,), to zero mean and unit (biased) variance, eps 1e-5: the paper's `normalize: true`.

    Returns float32 (S,); silence stays silence.
    """
    mean = waveform.mean(dtype=np.float64)
    variance = waveform.var(dtype=np.float64)
    return ((waveform - mean) / np.sqrt(variance + 1e-5)).astype(np.float32)
