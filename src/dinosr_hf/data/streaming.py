"""Read a `datasets.IterableDataset` window by window. A window is in memory and is used like any other source."""

import hashlib
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from .audio import SAMPLING_RATE, AudioFileError, Samples, about, audio_info, require
from .finding import is_hidden
from .sources import (
    SpeechSource,
    StoredSource,
    check_column,
    check_dataset,
    dataset_errors,
    kind_of_audio,
    row_id,
    stored_audio,
)

logger = logging.getLogger(__name__)

# Number of rows whose headers are read, and whose files are downloaded if the stream only names them, at a time.
_ROWS_AHEAD = 32
_THREADS = 16

# Seconds between attempts. A file that cannot be downloaded now may be there later, and leaving it out would make the
# windows of processes differ.
_RETRY_SECONDS = (1, 4, 16, 64)


class _Row(NamedTuple):
    """A row of the stream: id, length at 16 kHz or why it is skipped, and the audio."""

    id: str
    num_samples: int | AudioFileError
    audio: bytes | str | Samples = b""


class WindowSource(StoredSource):
    """
    Rows of a stream, in memory as they were stored (compressed, if they are files).

    Rows without samples are left out and counted; `ValueError` if no row has samples. `name` is for warnings.
    """

    def __init__(self, rows: Sequence[_Row], name: str) -> None:
        self._audio = [row.audio for row in rows]
        self._set_utterances((row.id for row in rows), (row.num_samples for row in rows), name)

    def _stored(self, row: int) -> bytes | str | Samples:
        return self._audio[row]


class StreamWindow(NamedTuple):
    """
    A part of a streamed epoch: its utterances, in memory and picklable, and its number in the epoch, from 0.

    `state`, JSON-serializable, is for `SpeechStream.windows`, to begin with exactly this window again. Its "digest" is
    a hash of the window's content, so that processes can compare what they read.
    """

    source: SpeechSource
    index: int  # type: ignore[assignment]  # hides tuple.index, which has no use here
    state: dict[str, Any]


Windows = Generator[StreamWindow, None, None]


class StreamChangedError(ValueError):
    """The stream differs from the one that a state was taken from; the message says where, and possible causes."""


class _Position(NamedTuple):
    """A position in a streamed epoch: number of rows before it, and the dataset's state (None: the beginning)."""

    row: int
    state: dict[str, Any] | None


class SpeechStream:
    """
    A stream of recordings (`datasets` with `streaming=True`) whose lengths are not known in advance.

    An epoch is a sequence of windows of about `window_seconds`, each of which is planned, shuffled and read like any
    other source, while a thread reads the next one. A window holds its audio as it is stored (an hour of 16 kHz FLAC
    is about 60 MB, an hour of float32 samples 230 MB); up to 2.5 windows are held at a time, and once more in each
    worker that does not share memory with its parent.

    **Every process reads the same windows**, and takes its share of each step from them, so steps do not depend on the
    number of processes. The cost is that each process downloads the whole stream. A dataset that is split among
    processes (`split_dataset_by_node`, or Accelerate's `prepare`) is refused. If the network is too slow, download the
    dataset and open the copy.

    **Order.** Windows follow the order of the stream; within a window the plan shuffles. With `shuffle_seed` the order
    of the dataset's shards (files) is shuffled by (seed, epoch), and `num_open_shards` of them are read in turn, so
    that a window mixes them. Do not use `dataset.shuffle`, whose buffer is not part of its state. If such a buffer, or
    anything else, keeps the stream from resuming where it was, the window's digest shows it: the epoch is then read
    again from its beginning, which gives the same windows, but takes as long.

    An utterance's id is the row's `id` or `__key__` (of a WebDataset), else the row's number in its epoch.

    Args:
        dataset: A `datasets.IterableDataset`, on the Hub or of local files.
        audio_column: Column with audio, of the same kinds as for `DatasetSource`. Audio is decoded by `load_audio`, in
            workers. Files that the stream only names are downloaded if their name is a URL.
        window_seconds: Audio of a window, at least; the last one of an epoch has from half to one and a half times as
            much, or all there is. Steps do not cross windows, so choose many times the audio of a step.
        shuffle_seed: Seed for the order of shards; None leaves it as `datasets` gives it (as stored in epoch 0, and
            shuffled by the epoch's number alone in later ones).
        num_open_shards: Number of shards to read in turn, if they are shuffled. Each holds a row group of parquet in
            memory.
        name: Name of the dataset in messages.

    Raises `ValueError` if the dataset is of another kind, is split among processes, lacks the column or has something
    else in it, or a number is out of range, and `ImportError` if `datasets` is not installed.
    """

    def __init__(
        self,
        dataset: Any,
        audio_column: str = "audio",
        *,
        window_seconds: float,
        shuffle_seed: int | None = None,
        num_open_shards: int = 4,
        name: str = "The stream",
    ) -> None:
        check_dataset(dataset, "IterableDataset")
        if getattr(dataset, "_distributed", None) is not None:
            raise ValueError(
                "The dataset is split among processes (split_dataset_by_node), but every process must read the same"
                " windows, of which it takes its share. Give the dataset as it was before."
            )
        if not window_seconds > 0:
            raise ValueError(f"window_seconds={window_seconds} must be greater than 0.")
        if num_open_shards < 1:
            raise ValueError(f"num_open_shards={num_open_shards} must be at least 1.")
        self.audio_column = audio_column
        self._window_samples = int(window_seconds * SAMPLING_RATE)
        self._name = name
        columns = dataset.column_names
        if columns is not None:  # else they are known with the first row
            check_column(audio_column, columns)
            dataset = dataset.decode(False)
            dataset = dataset.select_columns([c for c in (audio_column, "id", "__key__") if c in columns])
            kind_of_audio(dataset.features.arrow_schema.field(audio_column).type, audio_column)
        if shuffle_seed is not None:
            # With a buffer of one row, only shards are shuffled and interleaved.
            dataset = dataset.shuffle(seed=shuffle_seed, buffer_size=1, max_buffer_input_shards=num_open_shards)
        self._dataset = dataset
        self._current: Callable[[], Windows | None] = lambda: None

    def windows(self, epoch: int, first_window: int = 0, state: dict[str, Any] | None = None) -> Windows:
        """
        Read an epoch, from 0, window by window, the next one ahead of time; the same in every process.

        A stream is read by one such iterator at a time: a second call closes the first one. Close it when leaving it
        early, so that its thread ends at once.

        Args:
            epoch: Shuffled streams have another order in each.
            first_window: Index of the window to begin with.
            state: State of that window (`StreamWindow.state`), to find it at once. Without it, the windows before
                `first_window` are read and dropped.

        Raises:
            ValueError: If the state is of another window, epoch or window length; while reading, if `datasets` cannot
                read the stream, it has no utterances or lacks the column, or is not the one that the state is from
                (`StreamChangedError`).
            OSError: While reading, if a file of the stream is damaged, or one that it names cannot be downloaded,
                after several attempts.
        """
        wanted = {"epoch": epoch, "window": first_window, "window_samples": self._window_samples}
        for name, value in wanted.items():
            if state is not None and state.get(name) != value:
                problem = f"The stream's state has {name}={state.get(name)}, but {name}={value} is requested"
                advice = "Resume with the window_seconds of the interrupted run, at the state's own window."
                raise ValueError(f"{problem}. {advice}")
        if (earlier := self._current()) is not None:
            earlier.close()  # both would advance the same state, inside the dataset
        stop = threading.Event()
        windows = _read_ahead(self._from_window(epoch, first_window, state, stop), stop)
        # Weak, so that an iterator that nobody refers to any more ends, and its thread with it.
        self._current = weakref.ref(windows)
        return windows

    def _from_window(
        self, epoch: int, first_window: int, state: dict[str, Any] | None, stop: threading.Event
    ) -> Windows:
        if state is None:
            yield from islice(self._cut(epoch, 0, _Position(0, None), stop), first_window, None)
            return
        saved, beginning = _Position(state["row"], state["dataset"]), _Position(state["row"], None)
        for position in (saved, beginning):
            windows, first = self._cut(epoch, first_window, position, stop), None
            try:
                first = next(windows, None)
            except (KeyError, IndexError, TypeError, ValueError) as error:
                if position is beginning:
                    raise
                logger.warning("The stream cannot load its state (%s: %s).", type(error).__name__, error)
            if stop.is_set() or (first is not None and first.state["digest"] == state["digest"]):
                break
            windows.close()  # its threads must not live as long as an error
            if position is saved:
                logger.warning(
                    "The stream does not resume from its state with the same rows (a shuffle buffer does not). It is"
                    " read again from the epoch's beginning, %s rows.",
                    f"{state['row']:,}",
                )
        else:
            raise StreamChangedError(
                f"The stream has other rows than before from row {state['row']:,} of epoch {epoch} on, so the run"
                " cannot resume where it was. Its files, their revision, shuffle_seed, num_open_shards or the"
                " version of datasets may have changed. Restore them, or begin this epoch anew (no state)."
            )
        if first is not None:
            # Keep the given state for the first window, whichever way led there.
            yield first._replace(state=state)
            yield from windows

    def _cut(self, epoch: int, first_window: int, begin: _Position, stop: threading.Event) -> Windows:
        """Yield the windows of an epoch from a position on."""
        rows: list[_Row] = []
        start, end = begin, None  # of the window; after its end, rows are read until the next window is long enough
        num_rows = num_samples = index = 0

        def window(count: int) -> StreamWindow:
            name = f"Window {first_window + index} of epoch {epoch} of the stream"
            own = rows[:count]
            where = {"epoch": epoch, "window": first_window + index, "window_samples": self._window_samples}
            state = {**where, "row": start.row, "dataset": start.state, "digest": _digest(own)}
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
            if begin.row:  # the stream has shrunk, as `_from_window` says
                return
            raise ValueError(f"{self._name} has no rows from row {begin.row:,} of epoch {epoch} on.")
        yield window(len(rows))

    def _tables(self, dataset: Any) -> Iterator[Any]:
        """Yield the rows of a dataset; errors of `datasets` get the stream's name."""
        with dataset_errors(self._name):
            yield from dataset

    def _rows(self, epoch: int, begin: _Position, stop: threading.Event) -> Iterator[tuple[_Row, _Position]]:
        """Yield the rows from a position on, each with the position after it."""
        # A new object on the same stream, without the state of an earlier pass.
        dataset = self._dataset.with_format("arrow")
        dataset.set_epoch(epoch)
        if begin.state is not None:
            dataset.load_state_dict(begin.state)
        tables = enumerate(self._tables(dataset), 0 if begin.state is None else begin.row)
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
                    row, position = ahead.popleft()
                    yield row.result(), position
            while ahead and not stop.is_set():
                row, position = ahead.popleft()
                yield row.result(), position
        except ImportError as error:
            if "torchcodec" not in str(error):
                raise
            raise ValueError(
                "datasets needs torchcodec to decode the audio of this stream, because the stream is transformed (map,"
                " filter, rename_column, ...). Give it as load_dataset returns it, with audio_column for the column's"
                " name; or install torchcodec."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _examine(self, number: int, table: Any) -> _Row:
        """Convert a row (an Arrow table of one); download its file if it is a URL, and read its header."""
        check_column(self.audio_column, table.column_names)
        names = [table[column][0].as_py() for column in ("id", "__key__") if column in table.column_names]
        name = row_id(names[0] if names else None, number, "The stream")
        value = table[self.audio_column][0]
        try:
            if "__key__" in table.column_names and is_hidden(str(table["__key__"][0])):
                raise AudioFileError("Its name, or that of a folder, begins with a dot.", "hidden")
            if require("pyarrow").types.is_null(value.type):
                raise AudioFileError("The row has no audio.", "missing")
            audio = stored_audio(value, kind_of_audio(value.type, self.audio_column))
            if isinstance(audio, Samples):  # copied, so as not to keep the shard's other rows in memory
                audio = Samples(np.array(audio.frames, dtype=np.float32), audio.rate)
            else:
                audio = _download(audio) if isinstance(audio, str) else audio.read()
            with about(f"Utterance {name}"):
                return _Row(name, audio_info(audio).num_samples, audio)
        except AudioFileError as error:
            return _Row(name, error)


def _download(path: str) -> bytes | str:
    """Return the bytes of a file at a URL, which may be inside an archive; return a local path as it is."""
    if "://" not in path:
        return path
    fsspec = require("fsspec")
    for wait in (*_RETRY_SECONDS, None):
        try:
            with fsspec.open(path, "rb") as file:
                return file.read()
        except (ImportError, ValueError):  # of a kind of URL that is not known here
            raise
        except Exception as error:  # those of HTTP clients are no OSError
            # Over HTTP, fsspec calls any failure "not found", and has the reason as its cause.
            reason = error.__cause__ or error
            is_missing = reason is error or getattr(reason, "status", None) in (404, 410)
            if isinstance(error, FileNotFoundError) and is_missing:
                raise AudioFileError(f"{path} does not exist.", "missing") from error
            if wait is None:
                raise OSError(f"{path} could not be downloaded: {reason}") from error
            logger.warning("%s could not be downloaded (%s); trying again in %d s.", path, reason, wait)
            time.sleep(wait)
    raise AssertionError


def _digest(rows: Sequence[_Row]) -> str:
    """Return a hash of the content of the rows."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        audio, rate = row.audio if isinstance(row.audio, Samples) else (row.audio, None)
        data = audio.encode("utf-8", "surrogateescape") if isinstance(audio, str) else bytes(audio)
        length = row.num_samples.reason if isinstance(row.num_samples, AudioFileError) else row.num_samples
        digest.update(f"{row.id}\x1f{length}\x1f{rate}\x1f{len(data)}\x1f".encode("utf-8", "surrogateescape"))
        digest.update(data)
    return digest.hexdigest()


def _read_ahead(windows: Windows, stop: threading.Event) -> Windows:
    """Yield the same windows; while one is used, a thread reads the next."""
    with ThreadPoolExecutor(1, "stream-ahead") as pool:
        try:
            ahead = pool.submit(next, windows, None)
            while (window := ahead.result()) is not None:
                ahead = pool.submit(next, windows, None)
                yield window
                del window  # do not hold it while waiting for the one after the next
        finally:
            # Reading stops at the next row; wait for it, so that the dataset is free for another pass.
            stop.set()
            pool.submit(windows.close)
