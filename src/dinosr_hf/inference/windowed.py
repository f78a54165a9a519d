"""
Recordings of any length through a model: windows with context, batches of similar length, one result of the whole.

`S` samples at 16 kHz, `T` frames.

A recording that fits into a window goes through the model as it is. A longer one is cut into parts, and each part goes
through the model with context on both sides; of what comes out, the part's own frames are kept, and joined to the rows
(T, ...) of the whole. So they have no seams. Windows begin on the grid of frames, and all of a recording are
normalised by mean and variance of the whole, for which it is read twice. The transformer sees a window only, so that
rows near its edges are not those of the whole in one pass: that is what the context is for.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..data import SAMPLING_RATE, AudioFileError, SpeechSource, normalize_waveform
from ..data.sources import AUDIO_SUFFIXES
from ..model.configuration_dinosr import DinoSRConfig

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Rows of a recording that need more wait in a temporary file: an hour of a base model's layer has 0.5 GB.
_MAX_BYTES_IN_MEMORY = 2**30

Compute = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]
"""From normalised samples, float32 (S,) each, to rows (T, ...) of each."""


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


def mean_and_variance(parts: Iterable[np.ndarray]) -> tuple[Any, Any]:
    """Over the first axis of parts (S, ...), which are not kept; float64 (...) each."""
    count, mean, squares = 0, 0.0, 0.0
    for part in parts:
        difference, total = part.mean(axis=0, dtype=np.float64) - mean, count + len(part)
        squares += part.var(axis=0, dtype=np.float64) * len(part) + difference**2 * count * len(part) / total
        mean += difference * len(part) / total
        count = total
    return mean, squares / count


def output_path(folder: str | Path, recording: str, suffix: str) -> Path:
    """
    The file for what is made of a recording, in a folder and the recording's own folders below it.

    Args:
        folder: Where such files go.
        recording: Id of the recording; the suffix of an audio file is left out.
        suffix: Of the file.

    Raises:
        ValueError: If the id leads out of the folder.
    """
    path = Path(folder, recording)
    if Path(recording).is_absolute() or ".." in Path(recording).parts or not Path(recording).name:
        raise ValueError(f"The recording {recording!r} leads out of {folder}. Give recordings other ids.")
    stem = path.stem if path.suffix.lower() in AUDIO_SUFFIXES else path.name
    return path.with_name(f"{stem}.{suffix}")


def pad_batch(waves: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples float32 (S,) of each recording to input_values and attention_mask, each (B, S)."""
    lengths = torch.tensor([len(wave) for wave in waves])
    values = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(wave) for wave in waves], batch_first=True)
    return values, (torch.arange(values.shape[1]) < lengths[:, None]).long()


class _Recording:
    """A recording on its way: rows so far, and how its samples are normalised."""

    def __init__(self, index: int, num_samples: int, num_frames: int, num_windows: int) -> None:
        self.index, self.num_samples, self.num_frames = index, num_samples, num_frames
        self.num_missing = num_windows
        self.is_unreadable = False
        self.rows: np.ndarray | None = None
        self.mean_and_variance: tuple[float, float] | None = None


class _Task(NamedTuple):
    recording: _Recording
    window: Window
    start: int
    num_samples: int


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if math.prod(shape) * dtype.itemsize <= _MAX_BYTES_IN_MEMORY:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile() as file:  # it has no name, and goes with the array
        return np.memmap(file, dtype, "w+", shape=shape)


class WindowedInference:
    """
    Recordings through a model, in windows and batches; the next batch is read meanwhile.

    Args:
        config: Of the model.
        normalizes: Whether samples are normalised to zero mean and unit variance of the recording.
        window_seconds: Audio that the model sees at once, at most, context included.
        context_seconds: Audio on each side of a part of a recording that is longer than a window.
        batch_seconds: Audio of a batch, padding included; a longer window is a batch of its own.

    Attributes:
        unreadable: Id -> message of recordings that could not be read, filled by `run`.

    Raises:
        ValueError: If a number of seconds cannot be.
    """

    def __init__(
        self,
        config: DinoSRConfig,
        *,
        normalizes: bool = True,
        window_seconds: float = 30.0,
        context_seconds: float = 5.0,
        batch_seconds: float = 120.0,
    ) -> None:
        self._config = config
        self._normalizes = normalizes
        hop = config.inputs_to_logits_ratio
        self._window_frames = int(config.num_frames(int(window_seconds * SAMPLING_RATE)))
        self._context_frames = round(context_seconds * SAMPLING_RATE / hop)
        self._batch_samples = batch_seconds * SAMPLING_RATE
        self.unreadable: dict[str, str] = {}
        if context_seconds < 0 or self._window_frames <= 2 * self._context_frames:
            raise ValueError(
                f"context_seconds={context_seconds} on both sides leaves nothing of window_seconds={window_seconds}."
                " Make the window more than twice as long as the context, which must not be negative."
            )
        if self._batch_samples < 2 * hop:
            raise ValueError(f"batch_seconds={batch_seconds} must be at least {2 * hop / SAMPLING_RATE}, two frames.")

    def run(
        self,
        source: SpeechSource,
        compute: Compute,
        *,
        indices: Sequence[int] | None = None,
        on_progress: Callable[[float], Any] | None = None,
    ) -> Iterator[tuple[int, np.ndarray | None]]:
        """
        Compute the rows of recordings, the longest first.

        Those that cannot be read are left out, with a warning, and stand in `unreadable`.

        Args:
            source: Recordings.
            compute: What the model makes of a batch of windows.
            indices: Of the recordings to take; None: all.
            on_progress: Called after each batch with the seconds of audio, without context, that it was.

        Yields:
            Index of a recording and its rows (T, ...), as soon as all are there; None if it is shorter than a frame.
            Batches are in order of length, not of the source.
        """
        self.unreadable = {}
        # Ahead of the model by one batch, in a thread of its own: decoders work without Python's lock.
        with ThreadPoolExecutor(max_workers=1) as reader:
            waiting: tuple[list[_Task], Future] | None = None
            for batch in chain(self._batches(source, indices), [None]):
                following = None if batch is None else (batch, reader.submit(self._read_all, source, batch))
                if waiting is not None:
                    tasks, reading = waiting
                    yield from self._finish(tasks, reading.result(), compute)
                    if on_progress is not None:
                        on_progress(sum(self._own_seconds(task) for task in tasks))
                waiting = following

    def _finish(
        self, tasks: list[_Task], waves: list[np.ndarray | None], compute: Compute
    ) -> Iterator[tuple[int, np.ndarray | None]]:
        readable = [(task, wave) for task, wave in zip(tasks, waves, strict=True) if wave is not None]
        if readable:
            rows = compute([wave for _, wave in readable])
            for (task, _), found in zip(readable, rows, strict=True):
                self._keep(task, found)
        for task in tasks:
            recording = task.recording
            recording.num_missing -= 1
            if recording.num_missing == 0 and not recording.is_unreadable:
                yield recording.index, recording.rows
                recording.rows = None

    def _own_seconds(self, task: _Task) -> float:
        share = (task.window.last - task.window.first) / max(1, task.recording.num_frames)
        return (share if task.recording.num_frames else 1.0) * task.recording.num_samples / SAMPLING_RATE

    def _tasks(self, source: SpeechSource, indices: Sequence[int] | None) -> Iterator[_Task]:
        config = self._config
        hop = config.inputs_to_logits_ratio
        lengths = [utterance.num_samples for utterance in source.utterances]
        chosen = range(len(lengths)) if indices is None else indices
        for index in sorted(chosen, key=lambda index: -lengths[index]):
            num_frames = int(config.num_frames(lengths[index]))
            windows = plan_windows(num_frames, self._window_frames, self._context_frames)
            recording = _Recording(index, lengths[index], num_frames, len(windows))
            for window in windows:
                start = window.begin * hop
                is_last = window.end == num_frames
                stop = lengths[index] if is_last else (window.end - 1) * hop + config.receptive_field
                yield _Task(recording, window, start, stop - start)

    def _batches(self, source: SpeechSource, indices: Sequence[int] | None) -> Iterator[list[_Task]]:
        batch: list[_Task] = []
        longest = 0
        for task in self._tasks(source, indices):
            longest = max(longest, task.num_samples)
            if batch and longest * (len(batch) + 1) > self._batch_samples:
                yield batch
                batch, longest = [], task.num_samples
            batch.append(task)
        if batch:
            yield batch

    def _read_all(self, source: SpeechSource, tasks: list[_Task]) -> list[np.ndarray | None]:
        return [self._read(source, task) for task in tasks]

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
            recording.is_unreadable = True
            return None
        if not self._normalizes:
            return wave
        if recording.mean_and_variance is None:
            return normalize_waveform(wave)
        mean, variance = recording.mean_and_variance
        return ((wave - mean) / np.sqrt(variance + 1e-5)).astype(np.float32)  # as `normalize_waveform`

    def _mean_and_variance(self, source: SpeechSource, recording: _Recording) -> tuple[float, float]:
        # As much as is in memory anyway.
        size = max(self._config.receptive_field, int(self._batch_samples))
        starts = range(0, recording.num_samples, size)
        return mean_and_variance(
            source.load(recording.index, start, min(size, recording.num_samples - start)) for start in starts
        )

    def _keep(self, task: _Task, rows: np.ndarray) -> None:
        recording, window = task.recording, task.window
        if recording.is_unreadable:
            return
        if recording.rows is None:
            recording.rows = _empty((recording.num_frames, *rows.shape[1:]), rows.dtype)
        recording.rows[window.first : window.last] = rows[window.first - window.begin : window.last - window.begin]
