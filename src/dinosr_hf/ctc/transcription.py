"""
Recordings of any length to text: windows with context, batches of similar length, one decoding of the whole.

`S` samples at 16 kHz, `T` frames, `V` labels.

A recording that fits into a window goes through the model as it is. A longer one is cut into parts, and each part goes
through the model with context on both sides; of what comes out, the part's own frames are kept, and joined to the
emissions (T, V) of the whole. So words have no seams. Windows begin on the grid of frames, and all of a recording are
normalised by mean and variance of the whole, for which it is read twice. The transformer sees a window only, so that
emissions near its edges are not those of the whole in one pass: that is what the context is for.

A recogniser that has learnt from single sentences says nothing between two of them, not even that a word has ended. So
where no label is best for long, a delimiter is put in, as if the recording had been cut there by hand.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from ..data import SAMPLING_RATE, AudioFileError, SpeechSource, normalize_waveform
from ..modeling_dinosr import DinoSRForCTC
from .decoding import BeamSearchDecoder, CTCDecoder, DecodingOptions, GreedyDecoder, Hypothesis, TimedWord
from .text import load_processor

logger = logging.getLogger(__name__)

# A log probability that no path takes while there is another, and that is a number.
_IMPOSSIBLE = -1e4

DECODING_FILE = "decoding.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


class Window(NamedTuple):
    """Frames `first` to `last` of a recording, computed from frames `begin` to `end`; each without the last."""

    first: int
    last: int
    begin: int
    end: int


def plan_windows(num_frames: int, window_frames: int, context_frames: int) -> list[Window]:
    """
    Cut a recording into parts of equal length.

    Args:
        num_frames: Of the recording.
        window_frames: Of a window at most, its context included.
        context_frames: On each side of a part, where there is as much.

    Returns:
        Windows in order, whose parts are the recording.
    """
    if num_frames <= window_frames:
        return [Window(0, num_frames, 0, num_frames)]
    num_parts = -(-num_frames // (window_frames - 2 * context_frames))
    edges = [num_frames * part // num_parts for part in range(num_parts + 1)]
    return [
        Window(first, last, max(0, first - context_frames), min(num_frames, last + context_frames))
        for first, last in pairwise(edges)
    ]


def mean_and_variance(parts: Iterable[np.ndarray]) -> tuple[float, float]:
    """Of all samples of parts (S,), which are not kept; computed in float64."""
    count, mean, squares = 0, 0.0, 0.0
    for part in parts:
        difference, total = part.mean(dtype=np.float64) - mean, count + len(part)
        squares += part.var(dtype=np.float64) * len(part) + difference**2 * count * len(part) / total
        mean += difference * len(part) / total
        count = total
    return mean, squares / count


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


def part_words_at_pauses(log_probs: np.ndarray, decoder: CTCDecoder, pause_frames: int) -> np.ndarray:
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


class _Recording:
    """A recording on its way: emissions so far, and how its samples are normalised."""

    def __init__(self, index: int, num_samples: int, num_frames: int, num_windows: int) -> None:
        self.index, self.num_samples, self.num_frames = index, num_samples, num_frames
        self.num_missing = num_windows
        self.is_unreadable = False
        self.emissions: np.ndarray | None = None
        self.mean_and_variance: tuple[float, float] | None = None


class _Task(NamedTuple):
    recording: _Recording
    window: Window
    start: int
    num_samples: int


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
        pause_seconds: Without a label for so long, a word has ended, see `part_words_at_pauses`.

    Attributes:
        unreadable: Id -> message of recordings that could not be read, filled by `transcribe`.

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
        self._normalizes = bool(processor.feature_extractor.do_normalize)
        config = model.config
        hop, self._field = config.inputs_to_logits_ratio, config.receptive_field
        self._window_frames = int(config.num_frames(int(window_seconds * SAMPLING_RATE)))
        self._context_frames = round(context_seconds * SAMPLING_RATE / hop)
        self._batch_samples = batch_seconds * SAMPLING_RATE
        self._search_frames = int(search_seconds * SAMPLING_RATE / hop)
        self._pause_frames = round(pause_seconds * SAMPLING_RATE / hop)
        self.unreadable: dict[str, str] = {}
        if context_seconds < 0 or self._window_frames <= 2 * self._context_frames:
            raise ValueError(
                f"context_seconds={context_seconds} on both sides leaves nothing of window_seconds={window_seconds}."
                " Make the window more than twice as long as the context, which must not be negative."
            )
        sizes = {"batch_seconds": batch_seconds, "search_seconds": search_seconds, "pause_seconds": pause_seconds}
        for name, seconds in sizes.items():
            if seconds * SAMPLING_RATE < 2 * hop:
                raise ValueError(f"{name}={seconds} must be at least {2 * hop / SAMPLING_RATE}, two frames.")

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
        self.unreadable = {}
        for batch in self._batches(source):
            readable = [(task, wave) for task in batch if (wave := self._read(source, task)) is not None]
            if readable:
                emissions = self._emissions([wave for _, wave in readable])
                for (task, _), rows in zip(readable, emissions, strict=True):
                    self._keep(task, rows)
            for task in batch:
                recording = task.recording
                recording.num_missing -= 1
                if recording.num_missing == 0 and not recording.is_unreadable:
                    yield self._transcript(source.utterances[recording.index].id, recording)
                    recording.emissions = None
            if on_progress is not None:
                on_progress(sum(self._own_seconds(task) for task in batch))

    def _own_seconds(self, task: _Task) -> float:
        share = (task.window.last - task.window.first) / max(1, task.recording.num_frames)
        return (share if task.recording.num_frames else 1.0) * task.recording.num_samples / SAMPLING_RATE

    def _tasks(self, source: SpeechSource) -> Iterator[_Task]:
        config = self.model.config
        hop = config.inputs_to_logits_ratio
        lengths = [utterance.num_samples for utterance in source.utterances]
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            num_frames = int(config.num_frames(lengths[index]))
            windows = plan_windows(num_frames, self._window_frames, self._context_frames)
            recording = _Recording(index, lengths[index], num_frames, len(windows))
            for window in windows:
                start = window.begin * hop
                stop = lengths[index] if window.end == num_frames else (window.end - 1) * hop + self._field
                yield _Task(recording, window, start, stop - start)

    def _batches(self, source: SpeechSource) -> Iterator[list[_Task]]:
        batch: list[_Task] = []
        longest = 0
        for task in self._tasks(source):
            longest = max(longest, task.num_samples)
            if batch and longest * (len(batch) + 1) > self._batch_samples:
                yield batch
                batch, longest = [], task.num_samples
            batch.append(task)
        if batch:
            yield batch

    def _read(self, source: SpeechSource, task: _Task) -> np.ndarray | None:
        """Normalised samples (S,) of a window; None where there is no frame, or the recording cannot be read."""
        recording = task.recording
        if recording.is_unreadable or recording.num_frames == 0:
            return None
        try:
            is_whole = task.num_samples == recording.num_samples
            if self._normalizes and not is_whole and recording.mean_and_variance is None:
                recording.mean_and_variance = self._mean_and_variance(source, recording)
            wave = source.load(recording.index, task.start, task.num_samples)
        except AudioFileError as error:
            name = source.utterances[recording.index].id
            logger.warning("%s is left out: %s", name, error)
            self.unreadable[name] = str(error)
            recording.is_unreadable, recording.emissions = True, None
            return None
        if not self._normalizes:
            return wave
        if recording.mean_and_variance is None:
            return normalize_waveform(wave)
        mean, variance = recording.mean_and_variance
        return ((wave - mean) / np.sqrt(variance + 1e-5)).astype(np.float32)  # as `normalize_waveform`

    def _mean_and_variance(self, source: SpeechSource, recording: _Recording) -> tuple[float, float]:
        size = max(self._field, int(self._batch_samples))  # as much as is in memory anyway
        starts = range(0, recording.num_samples, size)
        return mean_and_variance(
            source.load(recording.index, start, min(size, recording.num_samples - start)) for start in starts
        )

    @torch.inference_mode()
    def _emissions(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log probabilities float32 (T, V) of each wave (S,)."""
        lengths = torch.tensor([len(wave) for wave in waves])
        values = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(wave) for wave in waves], batch_first=True)
        mask = (torch.arange(values.shape[1]) < lengths[:, None]).long()
        model = self.model
        logits = model(values.to(model.device, model.dtype), mask.to(model.device)).logits
        log_probs = logits.float().log_softmax(dim=-1).cpu().numpy()
        num_frames = model.config.num_frames(lengths).tolist()
        return [rows[:length] for rows, length in zip(log_probs, num_frames, strict=True)]

    def _keep(self, task: _Task, rows: np.ndarray) -> None:
        recording, window = task.recording, task.window
        if recording.emissions is None:
            recording.emissions = np.empty((recording.num_frames, rows.shape[1]), dtype=np.float32)
        recording.emissions[window.first : window.last] = rows[
            window.first - window.begin : window.last - window.begin
        ]

    def _transcript(self, name: str, recording: _Recording) -> Transcript:
        seconds = recording.num_samples / SAMPLING_RATE
        if recording.emissions is None:  # too short for a frame
            return Transcript(name, "", [], seconds, 0.0)
        emissions = part_words_at_pauses(recording.emissions, self.decoder, self._pause_frames)
        if isinstance(self.decoder, GreedyDecoder):
            found = self.decoder.decode(emissions)[0]
        else:
            found = decode_in_pieces(self.decoder, emissions, self._search_frames)
        return Transcript(name, found.text, found.words, seconds, found.score)
