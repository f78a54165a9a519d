"""
Run recordings of any length through a model: in windows with context, batches of similar length, joined again.

A recording that fits a window goes through the model whole. A longer one is cut into parts, and each part goes through
the model with context on both sides; only the part's own frames of the output are kept, and joined to rows (T, ...) of
the whole recording, without seams. Windows begin on the grid of frames, and all windows of a recording are normalised
by mean and variance of the whole, for which it is read twice; log-mel frames are normalised over their window. The
transformer sees only a window, so rows near its edges differ from those of the whole recording in one pass: the
context is there to keep them away from the result.
"""

import contextlib
import errno
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, pairwise
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ..data import SAMPLING_RATE, AudioFileError, SpeechSource, normalize_waveform
from ..data.collator import pad_batch
from ..data.packing import equal_parts, pack
from ..model.configuration_dinosr import DinoSRConfig
from ..model.modeling_dinosr import without_tf32
from ..utils.command_line import MAX_NUMBER, check_ranges

logger = logging.getLogger(__name__)

# Larger rows of a recording are kept in a temporary file: an hour of a base model's layer has 0.5 GB.
_MAX_BYTES_IN_MEMORY = 2**30
_PART_SAMPLES = 60 * SAMPLING_RATE  # that are read at a time for mean and variance of a long recording

# Computes rows (T, ...) of each window from its normalised samples, float32 (S,).
Compute = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]


class Window(NamedTuple):
    """Frames `first` to `last` of a recording, computed from frames `begin` to `end`; both ends exclusive."""

    first: int
    last: int
    begin: int
    end: int


def plan_windows(num_frames: int, window_frames: int, context_frames: int) -> list[Window]:
    """Cut a recording into equal parts, windows of at most `window_frames` with what there is of context around."""
    if num_frames <= window_frames:
        return [Window(0, num_frames, 0, num_frames)]
    num_parts = -(-num_frames // (window_frames - 2 * context_frames))
    return [
        Window(first, last, max(0, first - context_frames), min(num_frames, last + context_frames))
        for first, last in equal_parts(num_frames, num_parts)
    ]


class RunningMoments:
    """Mean and variance over the first axis of parts (R, ...), in float64; without parts, those given."""

    def __init__(self, mean: float = 0.0, variance: float = 0.0, parts: Iterable[np.ndarray] = ()) -> None:
        self.count = 0
        self.mean: Any = mean
        self._squares: Any = variance  # sum of the squared differences from the mean
        for part in parts:
            self.add(part)

    @property
    def variance(self) -> Any:
        """Variance of the rows so far, float64 (...)."""
        return self._squares / max(1, self.count)

    def add(self, rows: np.ndarray) -> None:
        """Update mean and variance with rows (R, ...)."""
        if not len(rows):
            return
        difference, total = rows.mean(axis=0, dtype=np.float64) - self.mean, self.count + len(rows)
        squares = rows.var(axis=0, dtype=np.float64) * len(rows)
        self._squares = self._squares + (squares + difference**2 * self.count * len(rows) / total)
        self.mean = self.mean + difference * len(rows) / total
        self.count = total

    def normalize(self, rows: np.ndarray) -> NDArray[np.float32]:
        """Subtract the mean from rows (R, ...) and divide them by the standard deviation, as `normalize_waveform`."""
        return ((rows - self.mean) / np.sqrt(self.variance + 1e-5)).astype(np.float32)


def model_batch(model: PreTrainedModel, waves: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Return `input_values` and `attention_mask` (B, S) of waves (S,) on the model's device, and numbers of frames."""
    values, mask = pad_batch(waves)
    return values.to(model.device), mask.to(model.device), model.config.num_frames(mask.sum(dim=1)).tolist()


def without_padding(rows: torch.Tensor, num_frames: Sequence[int]) -> list[np.ndarray]:
    """Cut rows (B, T, ...) of a batch to the frames of each recording."""
    return [row[:length] for row, length in zip(rows.cpu().numpy(), num_frames, strict=True)]


@dataclass
class _Recording:
    """A recording in progress: its rows so far, and how its samples are normalised."""

    index: int
    num_samples: int
    num_frames: int
    num_missing: int  # windows
    is_unreadable: bool = False
    rows: np.ndarray | None = None
    moments: RunningMoments | None = None


class _Task(NamedTuple):
    """A window of a recording, and the samples to read for it."""

    recording: _Recording
    window: Window
    start: int
    num_samples: int
    own_seconds: float  # without context


def _allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes <= _MAX_BYTES_IN_MEMORY:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile() as file:  # it has no name, and is removed with the array
        with contextlib.suppress(AttributeError):  # where the system has no such call
            try:  # take the space now: a disk that is full later would end the process without a message
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    problem = f"{tempfile.gettempdir()} has no space for a temporary file of {num_bytes / 1e9:.1f} GB"
                    raise OSError(error.errno, f"{problem}. Set TMPDIR to a folder that has") from error
        return np.memmap(file, dtype, "w+", shape=shape)


class WindowedInference:
    """
    Run recordings through a model, in windows and batches; the next batch is read during the current one.

    Args:
        config: Configuration of the model.
        normalizes: Whether to normalise samples to zero mean and unit variance of the recording.
        window_seconds: Audio that the model sees at once, at most, context included.
        context_seconds: Audio on each side of a part of a recording that is longer than a window.
        batch_seconds: Audio of a batch, padding included; a longer window is a batch of its own.

    Attributes:
        settings: The arguments that the rows depend on.
        unreadable: Messages by id of recordings that could not be read, filled by `run`.
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
        given = {"window_seconds": window_seconds, "context_seconds": context_seconds, "batch_seconds": batch_seconds}
        check_ranges((abs(value) <= MAX_NUMBER, name, value, "a finite number") for name, value in given.items())
        self.settings = {
            "normalizes": normalizes,
            "window_seconds": window_seconds,
            "context_seconds": context_seconds,
        }
        self._config, self._normalizes, hop = config, normalizes, config.inputs_to_logits_ratio
        self._window_frames = config.num_frames(int(window_seconds * SAMPLING_RATE))
        self._context_frames = round(context_seconds * SAMPLING_RATE / hop)
        self._batch_samples = batch_seconds * SAMPLING_RATE
        self.unreadable: dict[str, str] = {}
        if context_seconds < 0:
            raise ValueError(f"{context_seconds=} must not be negative.")
        if self._window_frames <= 2 * self._context_frames:
            raise ValueError(f"{window_seconds=} must be more than twice {context_seconds=}.")
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
        Yield the index of each recording (`indices`; None: all), the longest first, and its rows (T, ...).

        The rows are None if it is shorter than a frame. Recordings that cannot be read are left out with a warning,
        and listed in `unreadable`. `on_progress` is called after each batch with its seconds of audio without context.
        """
        self.unreadable = {}
        batches = pack(self._tasks(source, indices), attrgetter("num_samples"), self._batch_samples)
        # A thread reads one batch ahead of the model: decoders release Python's lock.
        with ThreadPoolExecutor(max_workers=1) as reader:
            started = ((tasks, reader.submit(self._read_all, source, tasks)) for tasks in batches)
            for current, _ in pairwise(chain(started, [None])):
                assert current is not None
                tasks, reading = current
                yield from self._finish(tasks, reading.result(), compute)
                if on_progress is not None:
                    on_progress(sum(task.own_seconds for task in tasks))

    def _tasks(self, source: SpeechSource, indices: Sequence[int] | None) -> Iterator[_Task]:
        hop = self._config.inputs_to_logits_ratio
        lengths = [utterance.num_samples for utterance in source.utterances]
        chosen = range(len(lengths)) if indices is None else indices
        for index in sorted(chosen, key=lambda index: -lengths[index]):
            num_frames = self._config.num_frames(lengths[index])
            windows = plan_windows(num_frames, self._window_frames, self._context_frames)
            recording = _Recording(index, lengths[index], num_frames, len(windows))
            seconds = lengths[index] / SAMPLING_RATE / max(1, num_frames)  # of a frame
            for window in windows:
                start = window.begin * hop
                is_last = window.end == num_frames
                stop = lengths[index] if is_last else (window.end - 1) * hop + self._config.receptive_field
                own_seconds = seconds * max(1, window.last - window.first)
                yield _Task(recording, window, start, stop - start, own_seconds)

    def _read_all(self, source: SpeechSource, tasks: list[_Task]) -> list[np.ndarray | None]:
        return [self._read(source, task) for task in tasks]

    def _read(self, source: SpeechSource, task: _Task) -> np.ndarray | None:
        """Read the normalised samples (S,) of a window; None if it has no frame, or the recording is unreadable."""
        recording = task.recording
        if recording.is_unreadable or recording.num_frames == 0:
            return None
        try:
            is_whole = task.num_samples == recording.num_samples
            if self._normalizes and not is_whole and recording.moments is None:
                starts = range(0, recording.num_samples, _PART_SAMPLES)
                sizes = (min(_PART_SAMPLES, recording.num_samples - start) for start in starts)
                recording.moments = RunningMoments(
                    parts=(source.load(recording.index, *part) for part in zip(starts, sizes, strict=True))
                )
            wave = source.load(recording.index, task.start, task.num_samples)
        except AudioFileError as error:
            name = source.utterances[recording.index].id
            logger.warning("%s is left out: %s", name, error)
            self.unreadable[name] = str(error)
            recording.is_unreadable = True
            return None
        if not self._normalizes:
            return wave
        return normalize_waveform(wave) if recording.moments is None else recording.moments.normalize(wave)

    def _finish(
        self, tasks: list[_Task], waves: list[np.ndarray | None], compute: Compute
    ) -> Iterator[tuple[int, np.ndarray | None]]:
        """Compute the rows of a batch of windows, and yield the recordings that are complete with them."""
        readable = [task for task, wave in zip(tasks, waves, strict=True) if wave is not None]
        if readable:
            with without_tf32():
                computed = compute([wave for wave in waves if wave is not None])
            for (recording, window, *_), rows in zip(readable, computed, strict=True):
                if recording.is_unreadable:
                    continue
                if recording.rows is None:
                    recording.rows = _allocate((recording.num_frames, *rows.shape[1:]), rows.dtype)
                own = slice(window.first - window.begin, window.last - window.begin)
                recording.rows[window.first : window.last] = rows[own]
        for recording, *_ in tasks:
            recording.num_missing -= 1
            if recording.num_missing == 0 and not recording.is_unreadable:
                yield recording.index, recording.rows
                recording.rows = None
