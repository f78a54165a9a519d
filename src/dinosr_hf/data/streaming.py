"""
Streams: a `datasets.IterableDataset`, window by window. A window is in memory and is used as any other source is.

`S` samples at 16 kHz.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from .audio import SAMPLING_RATE, AudioFileError, audio_info, load_audio, read_resampled, require, resampled_length
from .sources import SpeechSource, _audio_kind, _number_repeats, _stored_file

logger = logging.getLogger(__name__)

# Rows whose headers are read, and whose files are fetched where the stream only names them, at the same time.
_ROWS_AHEAD = 32
_THREADS = 16

# Seconds between attempts. A file that cannot be fetched now may be there later, and one that is left out would make
# the windows of processes differ.
_FETCH_WAITS_SECONDS = (1, 4, 16, 64)


class _Samples(NamedTuple):
    """A recording that is stored as samples: float32 (frames,), and their rate in Hz."""

    frames: np.ndarray
    rate: int


class _Row(NamedTuple):
    """A row of the stream: id, samples at 16 kHz or why there are none, and the audio: bytes, path or samples."""

    id: str
    num_samples: int | AudioFileError
    audio: bytes | str | _Samples | None


class WindowSource(SpeechSource):
    """
    Rows of a stream, in memory as they were stored (compressed, where they are files).

    Args:
        rows: The rows; those without samples are left out and counted.
        name: What warnings call the window.

    Raises:
        ValueError: If no row has samples.
    """

    def __init__(self, rows: Sequence[_Row], name: str) -> None:
        ids = _number_repeats(row.id for row in rows)
        kept = self._keep(zip(ids, (row.num_samples for row in rows), strict=True), name)
        self._audio = [rows[position].audio for position in kept]

    def load(self, index: int, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        """See `SpeechSource.load`."""
        name, audio = self.utterances[index].id, self._audio[index]
        assert audio is not None
        try:
            if isinstance(audio, (str, bytes)):
                return load_audio(audio, start=start, num_samples=num_samples)
            return read_resampled(
                lambda first, count: audio.frames[first : first + count],
                len(audio.frames),
                audio.rate,
                start=start,
                num_samples=num_samples,
            )
        except AudioFileError as error:
            raise AudioFileError(f"Utterance {name}: {error}", error.reason) from error


class StreamWindow(NamedTuple):
    """
    A part of a streamed epoch.

    Attributes:
        source: Its utterances, in memory. Picklable, for workers.
        index: Number of the window in its epoch, from 0.
        state: From which `SpeechStream.windows` begins with exactly this window again; JSON keeps it. Its "digest"
            is of all that is in the window, so that processes can compare what they read.
    """

    source: SpeechSource
    index: int  # type: ignore[assignment]  # hides tuple.index, which has no use here
    state: dict[str, Any]


class StreamChangedError(ValueError):
    """A stream that is not the one that a state was taken from: the message says where, and what may have changed."""


class _Position(NamedTuple):
    """Between two rows of a streamed epoch: rows before it, and the stream's own state there (None: the beginning)."""

    row: int
    state: dict[str, Any] | None


class SpeechStream:
    """
    A stream of recordings (`datasets` with `streaming=True`) whose lengths nobody knows beforehand.

    An epoch is a row of windows of about `window_seconds`, each of which is planned, shuffled and read like any other
    source. The window after the one in use is read ahead by a thread. A window takes up its audio as it is stored (an
    hour of 16 kHz FLAC is about 60 MB, an hour of float32 samples 230 MB); up to 2.5 windows are held at a time, and
    once more in each worker that does not share memory with its parent.

    **Every process reads the same windows**, and takes its share of each step from them, so that steps do not depend
    on the number of processes, as with any other source. It costs that each process downloads the whole stream. Do
    not split the dataset among processes (`split_dataset_by_node`, or Accelerate's `prepare`): that is refused. Where
    the network is too slow for it, download the dataset and open the copy.

    **Order.** Windows follow the order of the stream; within a window the plan shuffles. With `shuffle_seed` the order
    of the dataset's shards (files) is shuffled by (seed, epoch), and `num_open_shards` of them are read in turn, so
    that a window mixes them. Shuffle in this way rather than by `dataset.shuffle`, whose buffer's content is not part
    of its state. Where such a buffer, or anything else in the stream, keeps it from going on where it was, that is
    noticed after a resume: the window's content is compared with what it was. Then the epoch is read again from its
    beginning, which gives the same windows too, but takes as long as reading them took.

    Args:
        dataset: A `datasets.IterableDataset`, of the Hub or of local files.
        audio_column: Its column with audio; the same kinds as for `DatasetSource`. Nothing is decoded but by
            `load_audio`, in workers. Files that the stream only names are fetched if their name is a URL.
        window_seconds: Audio of a window, at least; the last one of an epoch has from half to one and a half times as
            much, or all there is. Steps do not go over its end, so make it many times as long as a step.
        shuffle_seed: Shuffles the order of shards; None leaves it as `datasets` gives it (as stored in epoch 0, and
            shuffled by the epoch's number alone in later ones).
        num_open_shards: Shards that are read in turn. Each holds a row group (of parquet) in memory. Without
            `shuffle_seed` it is one after the other.
        sampling_rate: Of lists of floats, Hz; the other kinds know their own.

    An utterance's id is the row's `id` or `__key__` (of a WebDataset) if there is one, else the row's number in its
    epoch.

    Raises:
        ValueError: If the dataset is of another kind, is split among processes, lacks the column or has something
            else in it, or a number is out of range.
        ImportError: Without `datasets`.
    """

    def __init__(
        self,
        dataset: Any,
        audio_column: str = "audio",
        *,
        window_seconds: float,
        shuffle_seed: int | None = None,
        num_open_shards: int = 4,
        sampling_rate: int | None = None,
    ) -> None:
        datasets = require("datasets")
        if not isinstance(dataset, datasets.IterableDataset):
            choice = f": choose one of its splits, {', '.join(dataset)}" if isinstance(dataset, dict) else ""
            raise ValueError(f"A datasets.IterableDataset is needed, not {type(dataset).__name__}{choice}.")
        if getattr(dataset, "_distributed", None) is not None:
            raise ValueError(
                "The dataset is split among processes (split_dataset_by_node), but every process must read the same"
                " windows, of which it takes its share. Give the dataset as it was before."
            )
        if not window_seconds > 0 or num_open_shards < 1:
            raise ValueError(
                f"window_seconds={window_seconds} must be greater than 0, and num_open_shards={num_open_shards} at"
                " least 1."
            )
        self.audio_column = audio_column
        self._window_samples = int(window_seconds * SAMPLING_RATE)
        self._sampling_rate = sampling_rate
        columns = dataset.column_names
        if columns is not None:  # else they are seen with the first row
            self._check_column(columns)
            dataset = dataset.decode(False)
            dataset = dataset.select_columns([c for c in (audio_column, "id", "__key__") if c in columns])
            self._kind_of(dataset.features.arrow_schema.field(audio_column).type)
        if shuffle_seed is not None:
            # A buffer of one row is none; what is left is the shuffling and interleaving of shards.
            dataset = dataset.shuffle(seed=shuffle_seed, buffer_size=1, max_buffer_input_shards=num_open_shards)
        self._dataset = dataset
        self._current: weakref.ref[Generator[StreamWindow, None, None]] | None = None

    def windows(
        self, epoch: int, first_window: int = 0, state: dict[str, Any] | None = None
    ) -> Generator[StreamWindow, None, None]:
        """
        Read an epoch, window by window, the next one ahead of time.

        A stream is read by one such iterator at a time: a second call ends the first one.

        Args:
            epoch: From 0; shuffled streams have another order in each.
            first_window: Where to begin.
            state: That of the window to begin with (`StreamWindow.state`), which is then found at once. Without it,
                the windows before `first_window` are read and dropped.

        Returns:
            The windows, the same ones in every process and after every restart. Close it if it is left early, so that
            its thread ends at once.

        Raises:
            ValueError: At once, if the state is of another window, epoch or window length. While reading, if the
                stream has no utterances or lacks the column.
            StreamChangedError: While reading the first window, if the stream is not the one that the state is from.
            OSError: While reading, if a file that the stream names cannot be fetched in spite of several attempts.
        """
        if state is not None:
            self._check_state(state, epoch, first_window)
        earlier = self._current() if self._current is not None else None
        if earlier is not None:
            # Both would count on in the same state, inside the dataset.
            earlier.close()
        stop = threading.Event()
        windows = _read_ahead(self._from_window(epoch, first_window, state, stop), stop)
        # Weak, so that an iterator that nobody has any more ends, and its thread with it.
        self._current = weakref.ref(windows)
        return windows

    def _check_column(self, columns: Sequence[str]) -> None:
        if self.audio_column not in columns:
            raise ValueError(
                f"audio_column={self.audio_column!r} is not a column of the stream, which has {', '.join(columns)}."
                " Name the one that has the audio."
            )

    def _kind_of(self, arrow_type: Any) -> str:
        kind = _audio_kind(arrow_type, self.audio_column)
        if (kind == "samples") != (self._sampling_rate is not None):
            raise ValueError(
                f"sampling_rate={self._sampling_rate}, but the column {self.audio_column!r} has {kind}: sampling_rate"
                " is for columns of plain lists of floats, and they need it."
            )
        return kind

    def _check_state(self, state: dict[str, Any], epoch: int, first_window: int) -> None:
        wanted = {"epoch": epoch, "window": first_window, "window_samples": self._window_samples}
        for name, value in wanted.items():
            if state.get(name) != value:
                raise ValueError(
                    f"The stream's state has {name}={state.get(name)}, but {name}={value} is asked for. Resume with"
                    " the window_seconds of the run that was interrupted, at the window that the state is of."
                )

    def _from_window(
        self, epoch: int, first_window: int, state: dict[str, Any] | None, stop: threading.Event
    ) -> Generator[StreamWindow, None, None]:
        if state is None:
            yield from islice(self._cut(epoch, 0, _Position(0, None), stop), first_window, None)
            return
        windows = self._cut(epoch, first_window, _Position(state["row"], state["dataset"]), stop)
        try:
            first = next(windows, None)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            logger.warning("The stream cannot take its state (%s: %s).", type(error).__name__, error)
            first = None
        if not stop.is_set() and (first is None or first.state["digest"] != state["digest"]):
            logger.warning(
                "The stream does not go on from its state with the rows that it had (a shuffle buffer does not). It"
                " is read again from the epoch's beginning, %s rows.",
                f"{state['row']:,}",
            )
            windows.close()
            windows = self._cut(epoch, first_window, _Position(state["row"], None), stop)
            first = next(windows, None)
            if not stop.is_set() and (first is None or first.state["digest"] != state["digest"]):
                windows.close()  # its threads must not live as long as the error does
                raise StreamChangedError(
                    f"The stream has other rows than before from row {state['row']:,} of epoch {epoch} on, so that"
                    " the run cannot go on where it was. Have its files, their revision, shuffle_seed, num_open_shards"
                    " or the version of datasets changed? Go back to what they were, or begin this epoch anew (no"
                    " state)."
                )
        if first is not None:
            # The first time this is written, it is the state that was given, whichever way led there.
            yield first._replace(state=state)
            yield from windows

    def _cut(
        self, epoch: int, first_window: int, begin: _Position, stop: threading.Event
    ) -> Generator[StreamWindow, None, None]:
        """The windows of an epoch from a position on."""
        rows: list[_Row] = []
        start, end = begin, None  # of the window; its end is known before what follows it is known to be long enough
        num_rows = num_samples = index = 0

        def window(count: int) -> StreamWindow:
            name = f"Window {first_window + index} of epoch {epoch} of the stream"
            own = rows[:count]
            state = {
                "epoch": epoch,
                "window": first_window + index,
                "window_samples": self._window_samples,
                "row": start.row,
                "dataset": start.state,
                "digest": _digest(own),
            }
            return StreamWindow(WindowSource(own, name), first_window + index, state)

        for row, position in self._rows(epoch, begin, stop):
            rows.append(row)
            num_samples += row.num_samples if isinstance(row.num_samples, int) else 0
            if end is not None and num_samples * 2 >= self._window_samples:
                yield window(num_rows)
                rows, start, end, index = rows[num_rows:], end, None, index + 1
            if end is None and num_samples >= self._window_samples:
                num_rows, num_samples, end = len(rows), 0, position
        if stop.is_set():
            return
        if not rows and index == 0:
            raise ValueError(f"The stream has no rows from row {begin.row:,} of epoch {epoch} on.")
        yield window(len(rows))

    def _rows(self, epoch: int, begin: _Position, stop: threading.Event) -> Iterator[tuple[_Row, _Position]]:
        """The rows from a position on, each with the position after it."""
        # A new object on the same stream, which has no state of an earlier pass.
        dataset = self._dataset.with_format("arrow")
        dataset.set_epoch(epoch)
        first = 0
        if begin.state is not None:
            dataset.load_state_dict(begin.state)
            first = begin.row
        tables = enumerate(dataset, first)
        pool = ThreadPoolExecutor(_THREADS, "stream")
        ahead: deque[tuple[Future[_Row], _Position]] = deque()
        try:
            for number, table in tables:
                if stop.is_set():
                    return
                if number < begin.row:
                    continue
                position = _Position(number + 1, dataset.state_dict())
                ahead.append((pool.submit(self._examine, number, table), position))
                if len(ahead) == _ROWS_AHEAD:
                    yield _result(ahead.popleft())
            while ahead and not stop.is_set():
                yield _result(ahead.popleft())
        except ImportError as error:
            if "torchcodec" not in str(error):
                raise
            raise ValueError(
                "datasets itself handles the audio of this stream on its way, and wants torchcodec for it, because"
                " something is done to the stream (map, filter, rename_column, ...). Give it as load_dataset returns"
                " it, with audio_column for the column's name; or install torchcodec."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _examine(self, number: int, table: Any) -> _Row:
        """Take a row (a table of one) out of Arrow; fetch its file, if it is elsewhere, and read its header."""
        self._check_column(table.column_names)
        names = [table[column][0].as_py() for column in ("id", "__key__") if column in table.column_names]
        name = str(names[0]) if names and names[0] is not None else str(number)
        try:
            return self._take(name, table[self.audio_column][0])
        except AudioFileError as error:
            return _Row(name, error, None)

    def _take(self, name: str, value: Any) -> _Row:
        if require("pyarrow").types.is_null(value.type):
            raise AudioFileError("The row has no audio.", "missing")
        kind = self._kind_of(value.type)
        if kind == "files":
            stored = _stored_file(value)
            audio = _fetch(stored) if isinstance(stored, str) else stored.to_pybytes()
            return _Row(name, audio_info(audio).num_samples, audio)
        rate = self._sampling_rate
        if kind == "arrays" and value.is_valid:
            value, rate = value["array"], value["sampling_rate"].as_py()
        num_samples = resampled_length(len(value.values), int(rate)) if value.is_valid and rate else 0
        if num_samples == 0:
            raise AudioFileError("The row has no samples.", "empty")
        assert rate is not None
        # A copy, which does not keep the shard's other rows in memory.
        frames = np.array(value.values.to_numpy(zero_copy_only=False), dtype=np.float32)
        return _Row(name, num_samples, _Samples(frames, int(rate)))


def _result(pending: tuple[Future[_Row], _Position]) -> tuple[_Row, _Position]:
    future, position = pending
    return future.result(), position


def _fetch(path: str) -> bytes | str:
    """The bytes of a file elsewhere (a URL, also one into an archive); a path of this machine is returned as it is."""
    if "://" not in path:
        return path
    fsspec = require("fsspec")
    for wait in (*_FETCH_WAITS_SECONDS, None):
        try:
            with fsspec.open(path, "rb") as file:
                return file.read()
        except FileNotFoundError as error:
            raise AudioFileError(f"{path} is not there.", "missing") from error
        except OSError as error:
            if wait is None:
                raise OSError(f"{path} could not be fetched: {error}") from error
            logger.warning("%s could not be fetched (%s); trying again in %d s.", path, error, wait)
            time.sleep(wait)
    raise AssertionError


def _digest(rows: Sequence[_Row]) -> str:
    """Hash of all that is in the rows."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        audio = row.audio.frames.tobytes() if isinstance(row.audio, _Samples) else row.audio or b""
        data = audio.encode("utf-8", "surrogateescape") if isinstance(audio, str) else audio
        length = row.num_samples.reason if isinstance(row.num_samples, AudioFileError) else row.num_samples
        rate = row.audio.rate if isinstance(row.audio, _Samples) else None
        digest.update(f"{row.id}\x1f{length}\x1f{rate}\x1f{len(data)}\x1f".encode("utf-8", "surrogateescape"))
        digest.update(data)
    return digest.hexdigest()


def _read_ahead(
    windows: Generator[StreamWindow, None, None], stop: threading.Event
) -> Generator[StreamWindow, None, None]:
    """The same windows; while one is used, a thread reads the next."""
    with ThreadPoolExecutor(1, "stream-ahead") as pool:
        try:
            ahead = pool.submit(next, windows, None)
            while (window := ahead.result()) is not None:
                ahead = pool.submit(next, windows, None)
                yield window
                del window  # it must not be held while the one after the next is waited for
        finally:
            # What runs ends at the next row, and is waited for: the dataset is then free for another pass.
            stop.set()
            pool.submit(windows.close)
