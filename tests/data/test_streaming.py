"""Streams: the same windows in every process and after every restart, for any kind of dataset."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import pickle
import tarfile
import threading
from itertools import pairwise

import numpy as np
import pytest

from audio_files import KINDS, PART_ATOL, dataset_of, datasets, flac, noise, pa, sf
from dinosr_hf.data import AudioFileError, DatasetSource, SpeechStream, StreamWindow, streaming

split_dataset_by_node = pytest.importorskip("datasets.distributed").split_dataset_by_node

pytestmark = pytest.mark.usefixtures("no_pauses")

WINDOW_SECONDS = 1.0
NUM_ROWS = 61


def recording(number: int) -> np.ndarray:
    """Return noise of 0.1 to 0.3 seconds."""
    return noise(1_600 + number * 733 % 3_200, seed=number)


def encoded(number: int, format: str = "FLAC") -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, recording(number), 16_000, format=format)
    return buffer.getvalue()


def from_arrays(folder):
    rows = [{"id": f"row-{k}", "audio": {"array": recording(k), "sampling_rate": 16_000}} for k in range(NUM_ROWS)]
    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=5)


def from_parquet(folder):
    column = pa.array([{"bytes": encoded(k), "path": f"{k}.flac"} for k in range(NUM_ROWS)])
    table = pa.table({"audio": column, "text": ["x"] * NUM_ROWS, "id": [f"row-{k}" for k in range(NUM_ROWS)]})
    dataset = datasets.Dataset(table).cast_column("audio", datasets.Audio())
    for part in range(4):
        rows = range(part * NUM_ROWS // 4, (part + 1) * NUM_ROWS // 4)
        dataset.select(rows).to_parquet(folder / f"{part}.parquet", batch_size=6)
    return datasets.load_dataset("parquet", data_files=str(folder / "*.parquet"), split="train", streaming=True)


def from_webdataset(folder):
    for part in range(3):
        with tarfile.open(folder / f"{part}.tar", "w") as archive:
            for k in range(part * NUM_ROWS // 3, (part + 1) * NUM_ROWS // 3):
                info, data = tarfile.TarInfo(f"row-{k}.flac"), encoded(k)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return datasets.load_dataset("webdataset", data_files=str(folder / "*.tar"), split="train", streaming=True)


def from_json(folder):
    for k in range(NUM_ROWS):
        (folder / f"{k}.flac").write_bytes(encoded(k))
    lines = [json.dumps({"id": f"row-{k}", "audio": str(folder / f"{k}.flac")}) for k in range(NUM_ROWS)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", streaming=True)


def from_generator(folder):
    def rows(parts):
        for part in parts:
            for k in range(part * NUM_ROWS // 3, (part + 1) * NUM_ROWS // 3):
                yield {"id": f"row-{k}", "audio": {"array": recording(k), "sampling_rate": 16_000}}

    return datasets.IterableDataset.from_generator(rows, gen_kwargs={"parts": [0, 1, 2]})


def with_buffer(folder):
    return from_arrays(folder).shuffle(seed=5, buffer_size=20)


def with_batched_map(folder):
    return from_arrays(folder).map(lambda batch: batch, batched=True, batch_size=7)


STREAMS = [from_arrays, from_parquet, from_webdataset, from_json, from_generator, with_buffer, with_batched_map]


def stream(dataset, **options) -> SpeechStream:
    column = (
        "flac" if isinstance(dataset, datasets.IterableDataset) and "flac" in (dataset.features or ()) else "audio"
    )
    return SpeechStream(dataset, **{"audio_column": column, "window_seconds": WINDOW_SECONDS, **options})


def content(windows: list[StreamWindow]) -> list[tuple]:
    """Return everything that training sees of windows."""
    return [
        (window.index, window.source.utterances, [window.source.load(k).tobytes() for k in range(len(window.source))])
        for window in windows
    ]


def through_json(state: dict) -> dict:
    return json.loads(json.dumps(state))


@pytest.mark.parametrize("make", STREAMS)
def test_stream_has_every_row_once(make, tmp_path):
    windows = list(stream(make(tmp_path), shuffle_seed=1).windows(2))
    assert [window.index for window in windows] == list(range(len(windows)))
    names = [name for window in windows for name, _ in window.source.utterances]
    assert sorted(names) == sorted(f"row-{k}" for k in range(NUM_ROWS))
    for window in windows:
        for index, (name, num_samples) in enumerate(window.source.utterances):
            expected = recording(int(name.removeprefix("row-")))
            assert num_samples == len(expected)
            np.testing.assert_allclose(window.source.load(index), expected, rtol=0, atol=2**-15)
            np.testing.assert_array_equal(window.source.load(index, 100, 900), window.source.load(index)[100:1_000])


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("make", STREAMS)
def test_stream_resumes_from_any_window(make, seed, tmp_path):
    dataset = make(tmp_path)
    windows = list(stream(dataset, shuffle_seed=seed).windows(1))
    assert len(windows) > 5
    for first in (0, 1, len(windows) // 2, len(windows) - 1):
        again = list(stream(dataset, shuffle_seed=seed).windows(1, first, through_json(windows[first].state)))
        assert content(again) == content(windows[first:])
        assert again[0].state == windows[first].state
        # Resume once more from there: states of a resumed run work as well.
        for later in again[1:3]:
            last = stream(dataset, shuffle_seed=seed).windows(1, later.index, through_json(later.state))
            assert content([next(last)]) == content([later])
            last.close()


def test_resume_does_not_read_earlier_rows():
    read = []

    def rows(parts):
        for part in parts:
            for k in range(20):
                read.append((part, k))
                yield {"audio": {"array": recording(k), "sampling_rate": 16_000}}

    dataset = datasets.IterableDataset.from_generator(rows, gen_kwargs={"parts": list(range(6))})
    windows = list(stream(dataset).windows(0))
    late = next(window for window in windows if window.state["row"] > 85)
    read.clear()
    assert content(list(stream(dataset).windows(0, late.index, late.state))) == content(windows[late.index :])
    assert min(read) == (4, 0)  # the shard that the window begins in, from its beginning


def test_stream_that_cannot_resume_is_read_again(tmp_path, caplog):
    windows = list(stream(with_buffer(tmp_path)).windows(0))
    state = windows[-2].state
    with caplog.at_level(logging.WARNING, "dinosr_hf"):
        again = list(stream(with_buffer(tmp_path)).windows(0, windows[-2].index, state))
    assert content(again) == content(windows[-2:])
    assert f"It is read again from the epoch's beginning, {state['row']} rows" in caplog.text


@pytest.mark.parametrize("break_state", [{"shard_idx": 99}, "nothing", {}], ids=["shard", "text", "empty"])
def test_stream_whose_state_is_damaged_is_read_again(break_state, tmp_path, caplog):
    windows = list(stream(from_arrays(tmp_path)).windows(0))
    state = windows[2].state | {"dataset": {"examples_iterable": break_state, "epoch": 0}}
    with caplog.at_level(logging.WARNING, "dinosr_hf"):
        assert content(list(stream(from_arrays(tmp_path)).windows(0, 2, state))) == content(windows[2:])
    assert "It is read again from the epoch's beginning" in caplog.text


def test_stream_that_changed_is_refused(tmp_path):
    windows = list(stream(from_arrays(tmp_path)).windows(0))
    changed = from_arrays(tmp_path).map(lambda row: row | {"id": row["id"] + "x"})
    with pytest.raises(
        streaming.StreamChangedError, match=r"other rows than before from row .* of epoch 0 on"
    ) as caught:
        list(stream(changed).windows(0, 3, windows[3].state))
    assert caught.value.__traceback__ is not None  # kept, but the threads have ended
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stream")]


def test_stream_that_has_shrunk_is_refused(tmp_path):
    windows = list(stream(from_arrays(tmp_path)).windows(0))
    late = windows[-1]
    changed = from_arrays(tmp_path).take(late.state["row"])
    with pytest.raises(streaming.StreamChangedError, match=r"other rows than before from row .* of epoch 0 on"):
        list(stream(changed).windows(0, late.index, late.state))


@pytest.mark.parametrize(
    ("epoch", "first_window", "seconds", "message"),
    [(1, 2, 1.0, "epoch=0, but epoch=1"), (0, 1, 1.0, "window=2, but window=1"), (0, 2, 2.0, "window_samples=16000")],
    ids=["epoch", "window", "seconds"],
)
def test_state_of_another_position_is_refused(epoch, first_window, seconds, message, tmp_path):
    dataset = from_arrays(tmp_path)
    state = list(stream(dataset).windows(0))[2].state
    with pytest.raises(ValueError, match=rf"The stream's state has {message}"):
        stream(dataset, window_seconds=seconds).windows(epoch, first_window, state)


def test_windows_before_the_first_are_dropped_without_a_state(tmp_path):
    dataset = from_arrays(tmp_path)
    windows = list(stream(dataset).windows(0))
    assert content(list(stream(dataset).windows(0, 4))) == content(windows[4:])
    assert content(windows[4:]) != content(windows[3:])


def test_order_follows_seed_and_epoch(tmp_path):
    def names(seed, epoch):
        windows = stream(from_arrays(tmp_path), shuffle_seed=seed).windows(epoch)
        return [name for window in windows for name, _ in window.source.utterances]

    orders = {(seed, epoch): tuple(names(seed, epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}
    assert len(set(orders.values())) == 6
    assert tuple(names(1, 2)) == orders[1, 2]
    assert names(None, 0) == [f"row-{k}" for k in range(NUM_ROWS)]


def test_shards_are_mixed_within_a_window(tmp_path):
    mixed, plain = (
        next(stream(from_arrays(tmp_path), shuffle_seed=1, num_open_shards=number).windows(0)) for number in (5, 1)
    )
    ends = np.cumsum([13, 12, 12, 12, 12])
    shards = [
        {int(np.searchsorted(ends, int(name.removeprefix("row-")), "right")) for name, _ in window.source.utterances}
        for window in (mixed, plain)
    ]
    assert shards[0] == {0, 1, 2, 3, 4}
    assert len(shards[1]) == 1


def test_windows_have_their_length(tmp_path):
    windows = list(stream(from_arrays(tmp_path)).windows(0))
    lengths = [sum(length for _, length in window.source.utterances) for window in windows]
    assert all(16_000 <= length < 16_000 + 4_800 for length in lengths[:-1])
    assert 8_000 <= lengths[-1] < 16_000 * 1.5 + 4_800
    everything = list(stream(from_arrays(tmp_path), window_seconds=1e6).windows(0))
    assert [len(window.source) for window in everything] == [NUM_ROWS]


@pytest.mark.parametrize("seconds", [0.05, 0.31, 0.7, 2.0, 3.3, 5.0])
def test_rows_stay_together_whatever_the_window(seconds, tmp_path):
    windows = list(stream(from_arrays(tmp_path), window_seconds=seconds).windows(0))
    names = [name for window in windows for name, _ in window.source.utterances]
    assert names == [f"row-{k}" for k in range(NUM_ROWS)]
    starts = [window.state["row"] for window in windows]
    assert [last - first for first, last in pairwise([*starts, NUM_ROWS])] == [len(w.source) for w in windows]


def test_one_window_is_read_ahead():
    taken = []

    def rows():
        for k in range(2_000):
            taken.append(k)
            yield {"audio": {"array": recording(k), "sampling_rate": 16_000}}

    windows = stream(datasets.IterableDataset.from_generator(rows)).windows(0)
    first = next(windows)
    for _ in range(200):
        if len(taken) > 2 * len(first.source):
            break
        threading.Event().wait(0.01)
    threading.Event().wait(0.2)
    # The next window, half of the one after it, and the rows examined ahead.
    assert 2 * len(first.source) < len(taken) < 3 * len(first.source) + 40
    windows.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stream")]
    count = len(taken)
    threading.Event().wait(0.1)
    assert len(taken) == count


def test_iterator_that_is_dropped_ends_its_threads(tmp_path):
    windows = stream(from_arrays(tmp_path)).windows(0)
    next(windows)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("stream")]
    del windows
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stream")]


def test_second_pass_ends_the_first(tmp_path):
    own = stream(from_arrays(tmp_path))
    expected = content(list(own.windows(1)))
    first = own.windows(0)
    next(first)
    assert content(list(own.windows(1))) == expected
    assert next(first, None) is None


def test_errors_of_the_stream_reach_the_reader():
    def rows():
        yield {"audio": {"array": recording(0), "sampling_rate": 16_000}}
        raise RuntimeError("the connection is lost")

    windows = stream(datasets.IterableDataset.from_generator(rows)).windows(0)
    with pytest.raises(RuntimeError, match="the connection is lost"):
        list(windows)


@pytest.mark.parametrize("kind", KINDS)
def test_stream_equals_its_dataset(kind, tmp_path):
    dataset = dataset_of(kind, tmp_path)
    source, (window,) = DatasetSource(dataset), stream(dataset.to_iterable_dataset()).windows(0)
    assert window.source.utterances == source.utterances
    copy = pickle.loads(pickle.dumps(window.source))
    for index in range(3):
        np.testing.assert_array_equal(window.source.load(index), source.load(index))
        np.testing.assert_array_equal(copy.load(index, 700, 800), source.load(index, 700, 800))
        np.testing.assert_allclose(source.load(index)[700:1_500], copy.load(index, 700, 800), rtol=0, atol=PART_ATOL)


def test_samples_of_a_stream_without_their_rate_are_refused():
    dataset = datasets.Dataset.from_dict({"speech": [noise(1_200).tolist(), noise(900).tolist()]})
    with pytest.raises(ValueError, match=r"'speech' is list<.*>, without its sampling rate"):
        stream(dataset.to_iterable_dataset(), audio_column="speech")


def test_skipped_rows_of_a_stream_are_counted(tmp_path, caplog):
    (tmp_path / "short.flac").write_bytes(flac(500))
    values = [
        {"bytes": flac(900), "path": None},
        {"bytes": b"no audio", "path": None},
        {"bytes": None, "path": None},
        None,
        {"bytes": None, "path": str(tmp_path / "gone.flac")},
        {"bytes": None, "path": str(tmp_path / "short.flac")},
    ]
    table = pa.table({"audio": pa.array(values), "id": ["a", "b", None, "d", "e", "a"]})
    with caplog.at_level(logging.WARNING):
        (window,) = stream(datasets.Dataset(table).to_iterable_dataset()).windows(0)
    assert window.source.utterances == [("a", 900), ("a#2", 500)]
    assert window.source.skipped == {"unreadable": ["b"], "missing": ["2", "d", "e"]}
    assert "Window 0 of epoch 0 of the stream: 4 of 6 recordings left out (3 missing, 1 unreadable)" in caplog.text


def test_row_that_cannot_be_decoded_is_named():
    data = flac(50_000)
    dataset = datasets.Dataset(pa.table({"audio": [data[: len(data) // 2]], "id": ["utterance-7"]}))
    (window,) = stream(dataset.to_iterable_dataset()).windows(0)
    with pytest.raises(AudioFileError, match=r"Utterance utterance-7: .* truncated or damaged") as caught:
        window.source.load(0)
    assert caught.value.reason == "truncated"


def test_files_at_urls_are_downloaded_with_retries(monkeypatch, caplog):
    fsspec = pytest.importorskip("fsspec")
    with fsspec.open("memory://corpus/a.flac", "wb") as file:
        file.write(flac(1_234))
    paths = ["memory://corpus/a.flac", "memory://corpus/gone.flac"]
    dataset = datasets.Dataset.from_dict({"audio": paths}).to_iterable_dataset()
    attempts = []
    read = fsspec.open

    def unreliable(*arguments):
        attempts.append(arguments)
        if len(attempts) in (1, 3):
            raise ConnectionError("try again")
        return read(*arguments)

    monkeypatch.setattr(streaming, "_RETRY_SECONDS", (0, 0, 0))
    monkeypatch.setattr(fsspec, "open", unreliable)
    (window,) = stream(dataset).windows(0)
    assert window.source.utterances == [("0", 1_234)]
    assert window.source.skipped == {"missing": ["1"]}
    assert "memory://corpus/a.flac could not be downloaded (try again)" in caplog.text

    def unreachable(*arguments):
        if len(attempts) > 4:
            raise RuntimeError("no network")  # as HTTP clients raise errors that are no OSError
        attempts.append(arguments)
        raise FileNotFoundError(arguments[0]) from ConnectionError("no network")  # as fsspec calls it

    monkeypatch.setattr(fsspec, "open", unreachable)
    # Not left out: another process may have downloaded it, and would have other windows.
    with pytest.raises(OSError, match=r"a\.flac could not be downloaded: no network"):
        list(stream(dataset).windows(0))


def test_stream_that_is_split_among_processes_is_refused(tmp_path):
    split = split_dataset_by_node(from_arrays(tmp_path), rank=0, world_size=2)
    with pytest.raises(ValueError, match=r"split among processes .* every process must read the same windows"):
        stream(split)


def test_stream_that_needs_torchcodec_is_refused(tmp_path):
    if importlib.util.find_spec("torchcodec"):
        pytest.skip("torchcodec is here")
    dataset = from_parquet(tmp_path)
    with pytest.raises(ValueError, match=r"needs torchcodec to decode .* Give it as load_dataset returns it"):
        list(stream(dataset.map(lambda row: row)).windows(0))


def test_stream_without_audio(tmp_path):
    dataset = from_arrays(tmp_path)
    with pytest.raises(ValueError, match="audio_column='speech' is not a column of the dataset, which has id, audio"):
        stream(dataset, audio_column="speech")
    with pytest.raises(ValueError, match="The column 'id' is int64, which is not audio"):
        stream(datasets.Dataset.from_dict({"id": [1]}).to_iterable_dataset(), audio_column="id")
    # If the columns are not known in advance, the first row shows them.
    with pytest.raises(ValueError, match="audio_column='speech' is not a column of the dataset, which has id, audio"):
        list(stream(from_generator(tmp_path), audio_column="speech").windows(0))


def test_empty_stream():
    def rows():
        yield from ()

    with pytest.raises(ValueError, match="The stream has no rows from row 0 of epoch 0 on"):
        list(stream(datasets.IterableDataset.from_generator(rows)).windows(0))
    with pytest.raises(ValueError, match=r"none of 2 recordings can be read \(2 unreadable\)"):
        list(stream(datasets.Dataset.from_dict({"audio": [b"no", b"nor"]}).to_iterable_dataset()).windows(0))


def test_stream_of_another_class(tmp_path):
    dataset = dataset_of("bytes", tmp_path)
    with pytest.raises(ValueError, match=r"datasets\.IterableDataset is needed, not Dataset\."):
        stream(dataset)
    with pytest.raises(ValueError, match=r"not IterableDatasetDict: choose one of its splits, train\."):
        stream(datasets.IterableDatasetDict(train=dataset.to_iterable_dataset()))
    with pytest.raises(ValueError, match=r"window_seconds=0 must be greater than 0"):
        stream(dataset.to_iterable_dataset(), window_seconds=0)
    with pytest.raises(ValueError, match=r"num_open_shards=0 must be at least 1"):
        stream(dataset.to_iterable_dataset(), num_open_shards=0)
