"""
Reading speech: decode with soundfile, mix down to mono, resample with soxr; a part of a file costs only that part.

`S` samples at the target rate (16 kHz). Files keep their own rate; a *frame* of a file is one sample of each channel.
"""

from __future__ import annotations

import io
import math
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ..utils.extras import import_extra

SAMPLING_RATE = 16_000

AudioInput = str | Path | bytes | IO[bytes]
"""Where audio is read from: a path, a file's bytes, or a seekable binary file object."""

# Both decoders give wrong samples after a seek, until they have decoded some more (measured: up to 0.5 s of MP3 at
# 8 kbit/s, whose frames borrow bits from earlier ones; 1 s of Vorbis near the end of the file; 3 s of Opus). So a part
# is decoded from that much earlier on. MP3 gets more than it needs: an utterance of usual length is then decoded from
# its beginning, and libmpg123, which reports each frame that it cannot decode after a seek to stderr, stays silent.
_PREROLL_SECONDS = {"MP3": 30, "OGG": 10}

# Half the length of soxr's filter in samples of the lower of both rates: 80 at quality HQ leave 2e-5, 160 leave 5e-7.
_RESAMPLER_MARGIN = 200


# soundfile opens one file at a time, under a lock of its own. A worker that is forked while another thread (one that
# reads a stream ahead) has that lock would wait for it without end. So forking waits till no file is being opened.
_OPENING = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_OPENING.acquire, after_in_parent=_OPENING.release, after_in_child=_OPENING.release)


class AudioFileError(ValueError):
    """
    An audio file that cannot be used; the message has the path, what is wrong and what to do.

    Attributes:
        reason: In a few words, to count by: "missing", "unreadable", "empty", "truncated", "not finite", "no length".
    """

    def __init__(self, message: str, reason: str = "unreadable") -> None:
        super().__init__(message)
        self.reason = reason


class AudioInfo(NamedTuple):
    """What the header of an audio file says: samples at 16 kHz as `load_audio` delivers, own rate, channels."""

    num_samples: int
    sampling_rate: int
    num_channels: int


def require(module: str) -> Any:
    """Import an optional package of the extra `train`. Raises `ImportError` that says how to install it."""
    return import_extra(module, "train", "Reading audio")


def resampled_length(num_frames: int, sampling_rate: int, target_rate: int = SAMPLING_RATE) -> int:
    """Samples that `num_frames` at `sampling_rate` have at `target_rate`: rounded, a half up, as soxr does."""
    return (2 * num_frames * target_rate + sampling_rate) // (2 * sampling_rate)


def _describe(source: AudioInput) -> str:
    if isinstance(source, (str, Path)):
        return str(source)
    return f"The recording ({len(source):,} bytes)" if isinstance(source, bytes) else "The recording"


def _open(source: AudioInput) -> Any:
    """A `soundfile.SoundFile`; the caller closes it."""
    soundfile = require("soundfile")
    file: str | bytes | IO[bytes]
    if isinstance(source, (str, Path)):
        # soundfile itself cannot encode a name that is not UTF-8.
        file = os.fspath(source) if os.name == "nt" else os.fsencode(source)
    else:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        file.seek(0)  # libsndfile takes the place where it finds the file for its beginning
    try:
        with _OPENING:
            return soundfile.SoundFile(file)
    except (soundfile.SoundFileError, OSError) as error:
        name = _describe(source)
        if isinstance(source, (str, Path)) and not os.path.isfile(source):
            raise AudioFileError(f"{name} is not a file. Check the path.", "missing") from error
        is_empty = isinstance(source, (str, Path)) and os.path.getsize(source) == 0
        if is_empty or source == b"":
            raise AudioFileError(f"{name} is empty (0 bytes). Leave it out or fetch it again.", "empty") from error
        cause = str(getattr(error, "error_string", error)).rstrip(".")
        raise AudioFileError(
            f"{name} cannot be read as audio: {cause}. Readable are wav, flac, ogg, opus and mp3. Convert the file, or"
            " leave it out."
        ) from error


# MPEG audio layer III headers: kbit/s by index (1 to 14) for version 1 and for versions 2 and 2.5; rates by version.
_MP3_KBITS = (
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
_MP3_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


def _mp3_frame(data: bytes, position: int) -> tuple[int, int] | None:
    """Bytes and samples of the layer III frame whose header stands at `position`; None if there is none."""
    if position + 4 > len(data) or data[position] != 0xFF or data[position + 1] & 0xE6 != 0xE2:
        return None
    version, third = data[position + 1] >> 3 & 3, data[position + 2]
    if version not in _MP3_RATES or not 0 < third >> 4 < 15 or third >> 2 & 3 == 3:
        return None
    kbits = _MP3_KBITS[version != 3][third >> 4]
    rate, padding = _MP3_RATES[version][third >> 2 & 3], third >> 1 & 1
    samples = 1152 if version == 3 else 576
    return samples // 8 * 1000 * kbits // rate + padding, samples


def _count_mp3_samples(source: AudioInput) -> int | None:
    """Samples of an MP3 without a header of its length (Xing, Info, VBRI), frame by frame; None if it has one."""
    with ExitStack() as stack:
        if isinstance(source, bytes):
            file: IO[bytes] = io.BytesIO(source)
        elif isinstance(source, (str, Path)):
            file = stack.enter_context(open(source, "rb"))
        else:
            file = source
            stack.callback(file.seek, file.tell())  # libsndfile reads on from where it was
        file.seek(0)
        tag = file.read(10)
        id3_bytes = 0
        if tag[:3] == b"ID3" and len(tag) == 10:
            id3_bytes = 10 + sum(byte << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
        file.seek(id3_bytes)
        head = file.read(4096)
        if any(marker in head for marker in (b"Xing", b"Info", b"VBRI")):
            return None
        data = head + file.read()
    # Two headers in a row: one alone may be a pattern in something else.
    starts = (at for at in range(len(data)) if (frame := _mp3_frame(data, at)) and _mp3_frame(data, at + frame[0]))
    position = next(starts, None)
    if position is None:
        return None
    num_samples = 0
    while frame := _mp3_frame(data, position):
        position += frame[0]
        num_samples += frame[1]
    return num_samples


def _num_frames(sound: Any, source: AudioInput) -> int:
    """
    Frames that can be read. libsndfile's number is right for all but MP3s without a header of their length.

    There it extrapolates from the bit rate of the first frame and reads no further than that.
    """
    num_frames = int(sound.frames)
    counted = _count_mp3_samples(source) if sound.format == "MP3" else None
    if counted is None:
        return num_frames
    if counted > num_frames + 2 * 1152:
        raise AudioFileError(
            f"{_describe(source)} is an MP3 of varying bit rate without a header of its length: the decoder would stop"
            f" after {num_frames:,} of {counted:,} frames. Write one with `ffmpeg -i OLD.mp3 -c copy NEW.mp3`, or"
            " leave it out.",
            "no length",
        )
    return min(num_frames, counted)


def audio_info(source: AudioInput) -> AudioInfo:
    """
    Length, rate and channels of an audio file from its header; nothing is decoded.

    A header may promise more than a truncated FLAC or MP3 holds; `load_audio` finds that out.

    Args:
        source: Path, bytes of a file, or a seekable binary file object.

    Raises:
        AudioFileError: If the file is missing, no audio, or holds no samples.
        ImportError: Without soundfile.
    """
    with _open(source) as sound:
        info = AudioInfo(
            resampled_length(_num_frames(sound, source), sound.samplerate), sound.samplerate, sound.channels
        )
    if info.num_samples == 0:
        raise AudioFileError(f"{_describe(source)} has no samples. Leave it out or fetch it again.", "empty")
    return info


def _read_frames(sound: Any, name: str, first: int, count: int) -> np.ndarray:
    """`count` frames from `first` on, mixed down to mono, float32 (count,)."""
    soundfile = require("soundfile")
    preroll = min(first, _PREROLL_SECONDS.get(sound.format, 0) * sound.samplerate)
    num_read = 0
    try:
        if first > preroll:
            sound.seek(first - preroll)
        # One read: soundfile seeks after each, which would undo the preroll.
        samples = sound.read(preroll + count, dtype="float32", always_2d=True)[preroll:]
        num_read = len(samples)
        cause = f"{num_read:,} of {count:,} frames from frame {first:,} on could be read"
    except soundfile.SoundFileError as error:
        cause = str(error).strip() or "the decoder gave up"
    if num_read != count:
        raise AudioFileError(
            f"{name} is truncated or damaged: {cause}, of {sound.frames:,} that its header promises. Fetch it again,"
            " or leave it out.",
            "truncated",
        )
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)


def read_resampled(
    read: Callable[[int, int], np.ndarray],
    num_frames: int,
    frame_rate: int,
    *,
    start: int = 0,
    num_samples: int | None = None,
    sampling_rate: int = SAMPLING_RATE,
    name: str = "audio",
) -> np.ndarray:
    """
    A part of a recording at another rate than its own, reading just that part and the resampler's margin.

    Equal to slicing the whole recording after resampling: exactly where no resampling is needed, else to 1e-6 of full
    scale (measured: 8e-7 at the worst of 13 rates).

    Args:
        read: `read(first, count)` gives `count` mono frames at `frame_rate` from `first` on, float (count,).
        num_frames: Frames of the recording at `frame_rate`.
        frame_rate: Rate of the recording, Hz.
        start: First sample wanted, at `sampling_rate`.
        num_samples: Samples wanted, at `sampling_rate`; None for all from `start` on.
        sampling_rate: Rate wanted, Hz.
        name: What messages call the recording.

    Returns:
        float32 (num_samples,).

    Raises:
        AudioFileError: If the recording is shorter than the part wanted, or has values that are not finite.
        ValueError: If `start` or `num_samples` can be of no recording.
    """
    if start < 0 or (num_samples is not None and num_samples < 1):
        raise ValueError(f"start={start} and num_samples={num_samples} must be at least 0 and at least 1.")
    total = resampled_length(num_frames, frame_rate, sampling_rate)
    if total == 0:
        raise AudioFileError(f"{name} has no samples. Leave it out or fetch it again.", "empty")
    stop = total if num_samples is None else start + num_samples
    if stop > total or start >= total:
        raise AudioFileError(
            f"{name} has {total:,} samples at {sampling_rate:,} Hz, but the part from {start:,} to {stop:,} was asked"
            " for. It has changed since it was listed, or its manifest is wrong: list the files again.",
            "truncated",
        )
    if frame_rate == sampling_rate:
        samples = np.asarray(read(start, stop - start), dtype=np.float32)
    else:
        # The part begins where a frame and a sample fall together, so that soxr's grid is that of the whole recording.
        common = math.gcd(frame_rate, sampling_rate)
        period = frame_rate // common
        margin = math.ceil(_RESAMPLER_MARGIN * frame_rate / min(frame_rate, sampling_rate))
        first = max(0, start * frame_rate // sampling_rate - margin) // period * period
        last = min(num_frames, math.ceil(stop * frame_rate / sampling_rate) + margin)
        part = np.ascontiguousarray(read(first, last - first), dtype=np.float32)
        resampled = require("soxr").resample(part, frame_rate, sampling_rate, quality="HQ")
        offset = start - first // period * (sampling_rate // common)
        samples = resampled[offset : offset + stop - start]
        assert len(samples) == stop - start, (len(samples), start, stop, total)
    if not np.isfinite(samples).all():
        raise AudioFileError(f"{name} has samples that are NaN or infinite. Repair it or leave it out.", "not finite")
    return np.ascontiguousarray(samples)


def load_audio(
    source: AudioInput, *, start: int = 0, num_samples: int | None = None, sampling_rate: int = SAMPLING_RATE
) -> np.ndarray:
    """
    Decode an audio file, or a part of it, to mono (mean of the channels) at `sampling_rate`.

    Only the part is decoded: besides it, the resampler's margin (see `read_resampled`), and for MP3 and Ogg up to 30
    and 10 seconds before it, without which their decoders would give other samples than in the whole file.

    Args:
        source: Path, bytes of a file, or a seekable binary file object (wav, flac, ogg, opus, mp3).
        start: First sample, at `sampling_rate`.
        num_samples: Number of samples, at `sampling_rate`; None for all from `start` on.
        sampling_rate: Hz.

    Returns:
        float32 (num_samples,); lossy formats may exceed 1.0 slightly.

    Raises:
        AudioFileError: If the file is missing, no audio, empty, truncated, shorter than the part, or not finite.
        ValueError: If `start` or `num_samples` can be of no recording.
        ImportError: Without soundfile, or soxr where it is needed.
    """
    name = _describe(source)
    with _open(source) as sound:
        return read_resampled(
            lambda first, count: _read_frames(sound, name, first, count),
            _num_frames(sound, source) if num_samples is None else int(sound.frames),
            sound.samplerate,
            start=start,
            num_samples=num_samples,
            sampling_rate=sampling_rate,
            name=name,
        )


def normalize_waveform(waveform: np.ndarray) -> np.ndarray:
    """
    Zero mean and unit (biased) variance over the utterance, eps 1e-5: the paper's `normalize: true`.

    Args:
        waveform: float (S,).

    Returns:
        float32 (S,); silence stays silence.
    """
    mean = waveform.mean(dtype=np.float64)
    variance = waveform.var(dtype=np.float64)
    return ((waveform - mean) / np.sqrt(variance + 1e-5)).astype(np.float32)
