"""
Moments of recordings as short sounds and small pictures that a page can carry.

`S` samples at 16 kHz.
"""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...data import AudioFileError, SpeechSource
from ...utils.extras import import_extra
from ..alignment import SAMPLING_RATE
from .codewords import CodewordSummary, Moment

logger = logging.getLogger(__name__)

# Name of a format -> type that browsers know, soundfile's names of the container and what is in it.
AUDIO_FORMATS = {"flac": ("audio/flac", "FLAC", "PCM_16"), "ogg": ("audio/ogg", "OGG", "VORBIS")}

# What is heard of a long moment, such as a pause.
_MAX_MOMENT_SECONDS = 1.0
_NUM_BARS = 60


class Clip(NamedTuple):
    """
    A moment that can be heard.

    Attributes:
        moment: The run that it is.
        start: Second of the recording at which the run begins.
        end: Second at which it ends.
        source: The sound as a data: URI.
        first: Where the run begins in the clip, as a share of its length.
        last: Where it ends, at most 1.
        bars: Height of the waveform at equal steps of the clip, from 0 to 1.
    """

    moment: Moment
    start: float
    end: float
    source: str
    first: float
    last: float
    bars: Sequence[float]


def data_uri(content: bytes, kind: str) -> str:
    """Bytes of a media type, such as "image/png", as a URI that carries them."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def encode_audio(samples: NDArray[np.float32], form: str) -> str:
    """
    A sound as a data: URI.

    Args:
        samples: float32 (S,) in [-1, 1]; what is louder is cut.
        form: One of `AUDIO_FORMATS`.
    """
    kind, container, subtype = AUDIO_FORMATS[form]
    stream = io.BytesIO()
    import_extra("soundfile", "analysis").write(
        stream, np.clip(samples, -1, 1), SAMPLING_RATE, format=container, subtype=subtype
    )
    return data_uri(stream.getvalue(), kind)


def _bars(samples: NDArray[np.float32]) -> list[float]:
    parts = np.array_split(np.abs(samples), min(_NUM_BARS, len(samples)))
    peaks = np.array([part.max() for part in parts])
    return (peaks / max(float(peaks.max()), 1e-9)).tolist()


class ClipMaker:
    """
    Cuts moments out of recordings.

    Args:
        recordings: In which the moments are.
        stride: Samples from one frame to the next.
        field: Samples that a frame sees.
        audio: One of `AUDIO_FORMATS`.
        context_seconds: What is heard before and behind a moment.

    Raises:
        ValueError: For another format, or a negative context.
    """

    def __init__(
        self, recordings: SpeechSource, *, stride: int, field: int, audio: str, context_seconds: float
    ) -> None:
        if audio not in AUDIO_FORMATS:
            raise ValueError(f"audio={audio!r} is unknown. Choose one of {', '.join(AUDIO_FORMATS)}.")
        if not 0 <= context_seconds <= 10:
            raise ValueError(f"context_seconds={context_seconds} is out of range: it must be from 0 to 10.")
        self._recordings, self._audio = recordings, audio
        self._stride, self._offset = stride, (field - stride) // 2
        self._context = round(context_seconds * SAMPLING_RATE)
        self._index = {utterance.id: index for index, utterance in enumerate(recordings.utterances)}

    def make(self, moment: Moment) -> Clip | None:
        """The clip of a moment; None, with a warning, where the recording cannot be read any more."""
        index = self._index[moment.recording]
        # A frame reaches half a stride to both sides of its centre.
        begin = max(self._offset + self._stride * moment.first, 0)
        end = begin + self._stride * moment.num_frames
        heard = min(end, begin + round(_MAX_MOMENT_SECONDS * SAMPLING_RATE))
        start = max(begin - self._context, 0)
        stop = min(heard + self._context, self._recordings.utterances[index].num_samples)
        try:
            samples = self._recordings.load(index, start, stop - start)
        except AudioFileError as error:
            logger.warning("No moment of %s can be heard: %s", moment.recording, error)
            return None
        return Clip(
            moment=moment,
            start=begin / SAMPLING_RATE,
            end=end / SAMPLING_RATE,
            source=encode_audio(samples, self._audio),
            first=(begin - start) / len(samples),
            last=min((heard - start) / len(samples), 1.0),
            bars=_bars(samples),
        )

    def make_all(self, codewords: Sequence[CodewordSummary], max_bytes: float) -> tuple[dict[int, list[Clip]], int]:
        """
        Clips of codewords, as many as fit: the best moment of each, frequent codewords first, then the second best.

        Args:
            codewords: With moments.
            max_bytes: Of all clips together, as they stand in the page.

        Returns:
            Clips by code, and how many moments had no room.
        """
        clips: dict[int, list[Clip]] = {codeword.code: [] for codeword in codewords}
        moments = list(_in_turn(codewords))
        used = 0
        for place, (code, moment) in enumerate(moments):
            clip = self.make(moment)
            if clip is None:
                continue
            used += len(clip.source)
            if used > max_bytes:
                return clips, len(moments) - place
            clips[code].append(clip)
        return clips, 0


def _in_turn(codewords: Sequence[CodewordSummary]) -> Iterator[tuple[int, Moment]]:
    ordered = sorted(codewords, key=lambda codeword: -codeword.num_frames)
    for rank in range(max((len(codeword.moments) for codeword in codewords), default=0)):
        for codeword in ordered:
            if rank < len(codeword.moments):
                yield codeword.code, codeword.moments[rank]
