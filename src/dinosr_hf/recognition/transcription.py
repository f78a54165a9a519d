"""
Recordings of any length to text: windows with context, batches of similar length, one decoding of the whole.

`S` samples at 16 kHz, `T` frames, `V` labels.

How recordings are cut into windows and joined again is in `recordings`; what is joined here are emissions (T, V).

A recogniser that has learnt from single sentences says nothing between two of them, not even that a word has ended. So
where no label is best for long, a delimiter is put in, as if the recording had been cut there by hand.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from ..data import SAMPLING_RATE, SpeechSource
from ..inference.windowed import DTYPES, WindowedInference, pad_batch
from ..model.modeling_dinosr import DinoSRForCTC
from .decoding import BeamSearchDecoder, CTCDecoder, DecodingOptions, GreedyDecoder, Hypothesis, TimedWord
from .text import load_processor

logger = logging.getLogger(__name__)

# A log probability that no path takes while there is another, and that is a number.
_IMPOSSIBLE = -1e4

DECODING_FILE = "decoding.json"


class Transcript(NamedTuple):
    """
    What was said in a recording.

    Attributes:
        id: Of the recording.
        text: Words, joined by one space.
        words: The words with their times.
        seconds: Length of the recording.
        score: Of the decoder, see `Hypothesis`.
    """

    id: str
    text: str
    words: list[TimedWord]
    seconds: float
    score: float


def cut_at_pauses(is_pause: np.ndarray, max_frames: int) -> list[tuple[int, int]]:
    """
    Cut a recording into pieces where nothing is said.

    Each piece ends in the middle of the longest pause in its second half; if there is none, of the last one in its
    first half; else where it is full, whatever is said there.

    Args:
        is_pause: bool (T,), frames between words.
        max_frames: Of a piece, at least 2.

    Returns:
        First frame of each piece, and the one behind its last, in order.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_pause, [False]]).astype(np.int8)))
    begins, ends = edges[::2], edges[1::2]
    pieces, start = [], 0
    while len(is_pause) - start > max_frames:
        stop = start + max_frames
        for low in (start + max_frames // 2, start + 1):
            left, right = np.maximum(begins, low), np.minimum(ends, stop)
            lengths = right - left
            if len(lengths) and lengths.max() > 0:
                longest = lengths.argmax() if low > start + 1 else np.flatnonzero(lengths > 0)[-1]
                stop = int(left[longest] + right[longest] + 1) // 2
                break
        pieces.append((start, stop))
        start = stop
    return [*pieces, (start, len(is_pause))]


def split_words_at_pauses(log_probs: np.ndarray, decoder: CTCDecoder, pause_frames: int) -> np.ndarray:
    """
    Put a delimiter into the middle of each long run of blanks between two labels.

    Args:
        log_probs: Emissions float32 (T, V).
        decoder: Of the model; without a delimiter nothing is done.
        pause_frames: Of a run, from which on it is long.

    Returns:
        Emissions (T, V), a copy: in such a frame the delimiter is certain.
    """
    changed = log_probs.copy()
    delimiter = decoder.word_delimiter_id
    if delimiter is None:
        return changed
    spoken = np.flatnonzero(log_probs.argmax(axis=1) != decoder.blank_id)
    for left, right in pairwise(spoken.tolist()):
        if right - left > pause_frames:
            changed[(left + right) // 2] = _IMPOSSIBLE
            changed[(left + right) // 2, delimiter] = 0.0
    return changed


def pauses(log_probs: np.ndarray, decoder: CTCDecoder) -> np.ndarray:
    """bool (T,) of emissions (T, V): frames in runs of blanks and delimiters that have a delimiter in them."""
    best = log_probs.argmax(axis=1)
    is_delimiter = best == decoder.word_delimiter_id
    if decoder.word_delimiter_id is None:  # each label is a word, and words are apart everywhere
        return best == decoder.blank_id
    is_silent = is_delimiter | (best == decoder.blank_id)
    run = np.cumsum(np.diff(is_silent, prepend=is_silent[:1]))  # number of the run that a frame is in
    return is_silent & np.isin(run, run[is_delimiter])


def decode_in_pieces(decoder: CTCDecoder, log_probs: np.ndarray, max_frames: int) -> Hypothesis:
    """
    Read emissions of any length, cut at pauses: a beam search remembers every frame of each hypothesis.

    Args:
        decoder: Of the model.
        log_probs: float32 (T, V).
        max_frames: Of a piece.

    Returns:
        All pieces' words, and the sum of their scores. The language model begins anew with each piece.
    """
    words: list[TimedWord] = []
    score = 0.0
    for start, stop in cut_at_pauses(pauses(log_probs, decoder), max_frames):
        found = decoder.decode(log_probs[start:stop])[0]
        offset = start * decoder.frame_seconds
        words += [TimedWord(word, begin + offset, end + offset) for word, begin, end in found.words]
        score += found.score
    return Hypothesis(" ".join(word.word for word in words), score, words)


class Transcriber:
    """
    A recogniser with all that it needs from a file to text.

    Args:
        model: In any precision, on any device; put into evaluation mode.
        processor: Of the model.
        decoder: Reads emissions; None: greedily.
        window_seconds: Audio that the model sees at once, at most, context included.
        context_seconds: Audio on each side of a part of a recording that is longer than a window.
        batch_seconds: Audio of a batch, padding included; a longer window is a batch of its own.
        search_seconds: Beam search reads longer recordings piece by piece, see `decode_in_pieces`.
        pause_seconds: Without a label for so long, a word has ended, see `split_words_at_pauses`.

    Raises:
        ValueError: If a number of seconds cannot be.
    """

    def __init__(
        self,
        model: DinoSRForCTC,
        processor: Any,
        decoder: CTCDecoder | None = None,
        *,
        window_seconds: float = 30.0,
        context_seconds: float = 5.0,
        batch_seconds: float = 120.0,
        search_seconds: float = 60.0,
        pause_seconds: float = 0.3,
    ) -> None:
        self.model = model.eval()
        self.decoder = decoder or GreedyDecoder.from_tokenizer(processor.tokenizer, model.config)
        self._runner = WindowedInference(
            model.config,
            normalizes=bool(processor.feature_extractor.do_normalize),
            window_seconds=window_seconds,
            context_seconds=context_seconds,
            batch_seconds=batch_seconds,
        )
        hop = model.config.inputs_to_logits_ratio
        self._search_frames = int(search_seconds * SAMPLING_RATE / hop)
        self._pause_frames = round(pause_seconds * SAMPLING_RATE / hop)
        sizes = {"search_seconds": search_seconds, "pause_seconds": pause_seconds}
        for name, seconds in sizes.items():
            if seconds * SAMPLING_RATE < 2 * hop:
                raise ValueError(f"{name}={seconds} must be at least {2 * hop / SAMPLING_RATE}, two frames.")

    @property
    def unreadable(self) -> dict[str, str]:
        """Id -> message of recordings that could not be read, filled by `transcribe`."""
        return self._runner.unreadable

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: str = "float32",
        decoding: str | Path | None = None,
        greedy: bool = False,
        **seconds: float,
    ) -> Self:
        """
        Load what fine-tuning leaves.

        Args:
            folder: Of a recogniser, or its name on the Hub.
            device: Where the model runs.
            dtype: "float32", "bfloat16" or "float16".
            decoding: File that `DecodingOptions.save` wrote; None: `decoding.json` in the folder, if it is there, else
                greedy search.
            greedy: Greedy search in any case.
            seconds: Further arguments of the class.

        Raises:
            ValueError: If the folder is of no recogniser, or an argument cannot be.
            ImportError: For beam search without flashlight-text.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown. Choose one of {', '.join(DTYPES)}.")
        if greedy and decoding is not None:
            raise ValueError(f"decoding={decoding} is for beam search, and greedy search was asked for. Drop one.")
        processor, _ = load_processor(folder)
        model: Any = DinoSRForCTC.from_pretrained(folder, dtype=DTYPES[dtype])
        model.to(device)
        options = Path(folder, DECODING_FILE) if decoding is None else Path(decoding)
        decoder: CTCDecoder | None = None
        if not greedy and (decoding is not None or options.is_file()):
            decoder = BeamSearchDecoder.from_tokenizer(
                processor.tokenizer, model.config, options=DecodingOptions.load(options)
            )
        return cls(model, processor, decoder, **seconds)

    def transcribe(
        self, source: SpeechSource, *, on_progress: Callable[[float], Any] | None = None
    ) -> Iterator[Transcript]:
        """
        Read all recordings of a source, the longest first.

        Those that cannot be read are left out, with a warning, and stand in `unreadable`.

        Args:
            source: Recordings, as `open_source` or `open_recordings` opens them.
            on_progress: Called after each batch with the seconds of audio, without context, that it was.

        Returns:
            Transcripts, each as soon as it is there; batches are in order of length, not of the source.
        """
        for index, emissions in self._runner.run(source, self._emissions, on_progress=on_progress):
            utterance = source.utterances[index]
            yield self._transcript(utterance.id, utterance.num_samples / SAMPLING_RATE, emissions)

    @torch.inference_mode()
    def _emissions(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log probabilities float32 (T, V) of each wave (S,)."""
        values, mask = pad_batch(waves)
        model = self.model
        logits = model(values.to(model.device, model.dtype), mask.to(model.device)).logits
        log_probs = logits.float().log_softmax(dim=-1).cpu().numpy()
        num_frames = model.config.num_frames(mask.sum(dim=1)).tolist()
        return [rows[:length] for rows, length in zip(log_probs, num_frames, strict=True)]

    def _transcript(self, name: str, seconds: float, emissions: np.ndarray | None) -> Transcript:
        if emissions is None:  # too short for a frame
            return Transcript(name, "", [], seconds, 0.0)
        emissions = split_words_at_pauses(emissions, self.decoder, self._pause_frames)
        if isinstance(self.decoder, GreedyDecoder):
            found = self.decoder.decode(emissions)[0]
        else:
            found = decode_in_pieces(self.decoder, emissions, self._search_frames)
        return Transcript(name, found.text, found.words, seconds, found.score)
