"""
Transcription of recordings of any length: windows with context, joined emissions (T, V), one decoding at the end.

`S` samples at 16 kHz, `T` frames, `V` labels.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from ..data import SAMPLING_RATE, SpeechSource
from ..inference.windowed import WindowedInference, model_batch, without_padding
from ..model.modeling_dinosr import DinoSRForCTC
from ..utils.command_line import MAX_NUMBER
from ..utils.digests import model_digest
from ..utils.model_folder import open_weights, torch_dtype
from .decoding import (
    BeamSearchDecoder,
    CTCDecoder,
    DecodingOptions,
    GreedyDecoder,
    Hypothesis,
    TimedWord,
    find_decoding,
)
from .text import load_processor

_GREEDY_FRAMES = 30_000  # of a piece for greedy search: ten minutes


class Transcript(NamedTuple):
    """Transcript of a recording of `seconds`: `text` is its words joined by one space, `score` the decoder's."""

    id: str
    text: str
    words: list[TimedWord]
    seconds: float
    score: float


def cut_at_pauses(is_pause: np.ndarray, max_frames: int) -> list[tuple[int, int]]:
    """
    Cut a recording into pieces of at most `max_frames` (2 or more) frames; return the first frame and the end of each.

    Each piece ends in the middle of the longest pause (`is_pause`, bool (T,)) in its second half; if there is none, of
    the last pause in its first half; if there is none either, after `max_frames`.
    """
    begins, ends = np.flatnonzero(np.diff(is_pause, prepend=False, append=False)).reshape(-1, 2).T

    def pauses_between(first: int, end: int) -> np.ndarray:
        parts = np.stack([np.maximum(begins, first), np.minimum(ends, end)], axis=1)
        return parts[parts[:, 0] < parts[:, 1]]

    pieces, start = [], 0
    while len(is_pause) - start > max_frames:
        stop = start + max_frames
        pauses = pauses_between(start + max_frames // 2, stop)
        if len(pauses):
            chosen = pauses[(pauses[:, 1] - pauses[:, 0]).argmax()]
            stop = int(chosen.sum() + 1) // 2
        elif len(pauses := pauses_between(start + 1, stop)):
            stop = int(pauses[-1].sum() + 1) // 2
        pieces.append((start, stop))
        start = stop
    return [*pieces, (start, len(is_pause))]


def split_words_at_pauses(log_probs: np.ndarray, decoder: CTCDecoder, pause_frames: int) -> np.ndarray:
    """
    Put a delimiter into the middle of each gap of over `pause_frames` between labels of emissions (T, V), in place.

    A recogniser that was trained on single sentences emits nothing between two of them, not even a delimiter. With it,
    words end as if the recording had been cut there by hand. If the decoder has no word delimiter, nothing changes.
    Returns the emissions, which may be a memory-mapped file.
    """
    if decoder.word_delimiter_id is None:
        return log_probs
    spoken = np.flatnonzero(log_probs.argmax(axis=1) != decoder.blank_id)
    for left, right in pairwise(spoken.tolist()):
        if right - left > pause_frames:
            middle = log_probs[(left + right) // 2]
            middle[:] = -1e4  # log probability
            middle[decoder.word_delimiter_id] = 0.0
    return log_probs


def pauses(log_probs: np.ndarray, decoder: CTCDecoder) -> np.ndarray:
    """Return the frames of emissions (T, V) that are in runs of blanks with a delimiter among them, bool (T,)."""
    best, delimiter = log_probs.argmax(axis=1), decoder.word_delimiter_id
    if delimiter is None:  # each label is a word, so any blank is between words
        return best == decoder.blank_id
    is_silent = np.isin(best, [delimiter, decoder.blank_id])
    run = np.cumsum(np.diff(is_silent, prepend=is_silent[:1]))  # index of the run that a frame is in
    return is_silent & np.isin(run, run[best == delimiter])


def decode_in_pieces(decoder: CTCDecoder, log_probs: np.ndarray, max_frames: int) -> Hypothesis:
    """
    Decode emissions (T, V) in pieces of at most `max_frames`: each frame takes memory, above all in beam search.

    The score is the sum over the pieces. The language model restarts with each piece.
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
    Transcribes recordings by a model with its processor and decoder; `ValueError` if seconds are out of range.

    Args:
        model: In any precision, on any device; it is put into evaluation mode.
        processor: The model's processor.
        decoder: Decoder of emissions; None: greedy search.
        search_seconds: Maximum audio of one beam search, see `decode_in_pieces`.
        pause_seconds: Time without a label after which a word has ended, see `split_words_at_pauses`.
        windows: `window_seconds`, `context_seconds` and `batch_seconds` of `WindowedInference`.

    Attributes:
        search_frames: `search_seconds` in frames.
    """

    def __init__(
        self,
        model: DinoSRForCTC,
        processor: Any,
        decoder: CTCDecoder | None = None,
        *,
        search_seconds: float = 60.0,
        pause_seconds: float = 0.3,
        **windows: float,
    ) -> None:
        self.model = model.eval()
        self.decoder = decoder or GreedyDecoder.from_tokenizer(processor.tokenizer, model.config)
        normalizes = bool(processor.feature_extractor.do_normalize)
        self._runner = WindowedInference(model.config, normalizes=normalizes, **windows)
        self._seconds = {"search_seconds": search_seconds, "pause_seconds": pause_seconds}
        hop = model.config.inputs_to_logits_ratio
        for name, seconds in self._seconds.items():
            if not 2 * hop <= seconds * SAMPLING_RATE <= MAX_NUMBER:
                raise ValueError(f"{name}={seconds} must be at least {2 * hop / SAMPLING_RATE}, two frames.")
        self.search_frames = int(search_seconds * SAMPLING_RATE / hop)
        self._pause_frames = round(pause_seconds * SAMPLING_RATE / hop)

    @property
    def settings(self) -> dict[str, Any]:
        """What transcripts depend on, as JSON can express it; the model by its digest, so it can be moved."""
        about = {"dtype": str(self.model.dtype).removeprefix("torch."), "model_sha256": model_digest(self.model)}
        return {**about, **self._runner.settings, **self._seconds, **self.decoder.settings}

    @property
    def unreadable(self) -> dict[str, str]:
        """Id -> error message of the recordings that the last `transcribe` could not read."""
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
        Load a recogniser that fine-tuning wrote, from its folder or by its name on the Hub.

        `dtype` is "float32", "bfloat16" or "float16"; `seconds` are further arguments of the class. The decoder is
        beam search with the `DecodingOptions` in the file `decoding`, by default the model's `decoding.json` if it
        exists; else, or if `greedy` is set, greedy search. Raises `ValueError` if the folder is not a recogniser's or
        an argument is invalid, `ImportError` for beam search without flashlight-text.
        """
        if greedy and decoding is not None:
            raise ValueError(f"decoding={decoding} is for beam search, but greedy is set. Leave out one of them.")
        options: dict[str, Any] = {"device": device, "dtype": torch_dtype(dtype)}
        processor, _ = load_processor(folder)
        model = open_weights(DinoSRForCTC, folder, advice="Give a fine-tuned recogniser.", **options)
        decoder = found = None
        if not greedy:
            found = find_decoding(folder) if decoding is None else DecodingOptions.load(decoding)
        if found is not None:
            decoder = BeamSearchDecoder.from_tokenizer(processor.tokenizer, model.config, options=found)
        return cls(model, processor, decoder, **seconds)

    def transcribe(
        self,
        source: SpeechSource,
        *,
        indices: Sequence[int] | None = None,
        on_progress: Callable[[float], Any] | None = None,
    ) -> Iterator[Transcript]:
        """
        Transcribe recordings of a source, the longest first; each transcript comes as soon as it is complete.

        `indices` are those of the recordings; None: all. Those that cannot be read are skipped with a warning and
        listed in `unreadable`. `on_progress` is called after each batch with its seconds of audio, without context.
        """
        for index, emissions in self.emissions(source, indices=indices, on_progress=on_progress):
            name, num_samples = source.utterances[index]
            found = self._decode(emissions) if len(emissions) else Hypothesis("", 0.0, [])
            yield Transcript(name, found.text, found.words, num_samples / SAMPLING_RATE, found.score)

    def emissions(
        self,
        source: SpeechSource,
        *,
        indices: Sequence[int] | None = None,
        on_progress: Callable[[float], Any] | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """
        Yield the index of each recording and what its transcript is decoded from, log probabilities float32 (T, V).

        Words are split at pauses, see `split_words_at_pauses`. `T` is 0 if the recording is shorter than a frame.
        Arguments and order are those of `transcribe`.
        """
        none = np.zeros((0, self.model.config.vocab_size), np.float32)
        for index, rows in self._runner.run(source, self._compute, indices=indices, on_progress=on_progress):
            yield index, none if rows is None else split_words_at_pauses(rows, self.decoder, self._pause_frames)

    @torch.inference_mode()
    def _compute(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Compute log probabilities float32 (T, V) of each wave (S,)."""
        values, mask, num_frames = model_batch(self.model, waves)
        return without_padding(self.model(values, mask).logits.float().log_softmax(dim=-1), num_frames)

    def _decode(self, emissions: np.ndarray) -> Hypothesis:
        is_greedy = isinstance(self.decoder, GreedyDecoder)
        return decode_in_pieces(self.decoder, emissions, _GREEDY_FRAMES if is_greedy else self.search_frames)
