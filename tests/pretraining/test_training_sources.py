"""Runs on every kind of source: the storage of recordings changes nothing, and a resumed run continues exactly."""

from __future__ import annotations

import json
import math
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest

from audio_files import datasets, sf
from dinosr_hf.data import FolderSource, load_audio
from dinosr_hf.data.streaming import WindowSource
from dinosr_hf.pretraining import (
    RunInterrupted,
    TrainingStopped,
    find_checkpoints,
    open_data,
    parse_arguments,
    read_checkpoint,
    run,
)
from dinosr_hf.pretraining.feed import StepFeed
from pretraining_runs import ANCHORED, assert_same_run, metrics_of, send_at_load, write_config

# Half of TINY's, so that an epoch has several steps.
STEPS = {"step_seconds": 4.0, "micro_seconds": 4.0}

pytestmark = pytest.mark.usefixtures("no_pauses")


@pytest.fixture(scope="session")
def recordings(tmp_path_factory):
    """A folder of coloured noise in several formats, rates and channels."""
    folder = tmp_path_factory.mktemp("recordings")
    generator = np.random.default_rng(0)
    for number, (suffix, rate, channels) in enumerate(
        [("wav", 16000, 1), ("flac", 22050, 2), ("ogg", 16000, 1), ("mp3", 44100, 2), ("wav", 8000, 1)] * 3
    ):
        seconds = 0.8 + 0.15 * number
        audio = generator.standard_normal((int(rate * seconds), channels)).cumsum(axis=0) * 0.002
        sf.write(folder / f"{number:02d}.{suffix}", np.clip(audio, -0.9, 0.9), rate)
    return folder


@pytest.fixture(scope="session")
def flacs(recordings, tmp_path_factory):
    """Make the same recordings as files of one kind and rate, which TSV manifests and WebDatasets require."""
    folder = tmp_path_factory.mktemp("flacs")
    for path in recordings.iterdir():
        sf.write(folder / f"{path.stem}.flac", load_audio(path), 16_000)
    return folder


def arguments(folder, data, **changes):
    """Return the arguments of a tiny run on any data, in its own folder."""
    folder.mkdir(exist_ok=True)
    data = list(map(str, data)) if isinstance(data, list) else str(data)
    path = write_config(folder, data=data, output_dir=str(folder / "out"), **{**STEPS, **changes})
    return parse_arguments([str(path)], "unused")


def assert_sound(out, max_steps):
    """Check that all steps were made, with finite metrics and nothing left out."""
    lines = metrics_of(out)
    assert lines[-1]["step"] == max_steps
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)
    assert lines[-1]["skipped_files"] == lines[-1]["skipped_steps"] == 0


def listed(folder):
    return sorted(folder.iterdir())


# Each converts a folder of recordings to data, further arguments, and a function from names to ids.


def as_tar(folder, to):
    for name, paths in {"a": listed(folder)[:7], "b": listed(folder)[7:]}.items():
        with tarfile.open(to / f"{name}.tar", "w") as archive:
            for path in paths:
                archive.add(path, path.name)
    return to, {}, lambda name: f"{'a' if name < '07' else 'b'}.tar/{name}"


def as_tsv(folder, to):
    lines = [f"{path.name}\t{sf.info(path).frames}\n" for path in listed(folder)]
    (to / "train.tsv").write_text(f"{folder}\n{''.join(lines)}")
    return to / "train.tsv", {}, str


def as_csv(folder, to):
    rows = [f"{path},{path.stem},{sf.info(path).frames},{sf.info(path).samplerate}\n" for path in listed(folder)]
    (to / "train.csv").write_text(f"file_name,id,num_frames,sampling_rate\n{''.join(rows)}")
    return to / "train.csv", {}, lambda name: Path(name).stem


def as_jsonl(folder, to, id_of=str):
    rows = [json.dumps({"audio_filepath": str(path), "id": id_of(path.name)}) for path in listed(folder)]
    (to / "train.jsonl").write_text("\n".join(rows))
    return to / "train.jsonl", {}, id_of


def table(paths):
    rows = [{"id": path.stem, "audio": {"bytes": path.read_bytes(), "path": path.name}} for path in paths]
    return datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio())


def as_parquet(folder, to):
    table(listed(folder)).to_parquet(to / "train.parquet")
    return to / "train.parquet", {}, lambda name: Path(name).stem


def as_saved_dataset(folder, to):
    table(listed(folder)).save_to_disk(to / "saved")
    return to / "saved", {}, lambda name: Path(name).stem


def as_parquet_stream(folder, to):
    path, _, id_of = as_parquet(folder, to)
    return path, {"streaming": True}, id_of  # all of it in one window


def as_webdataset_stream(folder, to):
    as_tar(folder, to)
    (to / "b.tar").unlink()
    with tarfile.open(to / "a.tar", "a") as archive:
        for path in listed(folder)[7:]:
            archive.add(path, path.name)
    return to / "a.tar", {"streaming": True, "audio_column": "flac"}, lambda name: Path(name).stem


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return the output folder of a run on the files of a folder, whose ids are made of their names."""
    made = {}

    def make(folder, id_of):
        key = (folder, id_of("a.b"))
        if key not in made:
            place = tmp_path_factory.mktemp("plain")
            run(arguments(place / "run", folder if id_of is str else as_jsonl(folder, place, id_of)[0]))
            made[key] = place / "run" / "out"
        return made[key]

    return make


# The last two require files of one kind.
WAYS = [as_tar, as_csv, as_jsonl, as_parquet, as_saved_dataset, as_parquet_stream, as_tsv, as_webdataset_stream]


@pytest.mark.parametrize("way", WAYS)
def test_storage_of_recordings_does_not_change_the_run(tmp_path, recordings, flacs, plain, way):
    folder = flacs if way in WAYS[-2:] else recordings
    (tmp_path / "data").mkdir()
    data, changes, id_of = way(folder, tmp_path / "data")
    run(arguments(tmp_path / "run", data, **changes))

    assert_sound(tmp_path / "run" / "out", max_steps=4)
    assert_same_run(tmp_path / "run" / "out", plain(folder, id_of))


def test_other_ids_are_another_run(recordings, plain):
    # the negative control of the test above
    with pytest.raises(AssertionError):
        assert_same_run(plain(recordings, lambda name: f"x{name}"), plain(recordings, str))


# Streams of several shards and windows, and a mixture: each converts a folder to data and further arguments.


def in_shards(folder, to):
    (to / "data").mkdir(parents=True)
    for part in range(3):
        path = to / "data" / f"train-{part:05d}-of-00003.parquet"
        table(listed(folder)[5 * part : 5 * part + 5]).to_parquet(path, batch_size=2)
    return to, {"streaming": True, "window_seconds": 9.0}


def in_archives(folder, to):
    to.mkdir()
    as_tar(folder, to)
    return to, {"streaming": True, "window_seconds": 9.0, "audio_column": "flac"}


def in_two_folders(folder, to):
    for number, path in enumerate(listed(folder)):
        name = "small" if number % 3 == 0 else "large"
        (to / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to / name)
    return [to / "small", to / "large"], {"data_weights": [3.0, 1.0], "data_temperature": 0.5}


LONG = {**ANCHORED, "max_steps": 12}
READERS = {in_shards: WindowSource, in_archives: WindowSource, in_two_folders: FolderSource}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, recordings, flacs):
    """Return, for a way to store recordings, data, arguments, and a run on them with a checkpoint of each step."""
    made = {}

    def make(store):
        if store not in made:
            folder = tmp_path_factory.mktemp(store.__name__)
            data, changes = store(flacs if store is in_archives else recordings, folder / "data")
            run(arguments(folder / "run", data, **LONG, **changes, checkpoint_steps=1, keep_checkpoints=99))
            made[store] = data, changes, folder / "run" / "out"
        return made[store]

    return make


@pytest.mark.parametrize("store", READERS)
def test_streams_and_mixtures_train(undisturbed, store):
    out = undisturbed(store)[-1]
    assert_sound(out, max_steps=12)
    assert metrics_of(out)[-1]["epoch"] == 1


def manifests(out):
    return [read_checkpoint(path).manifest for path in reversed(find_checkpoints(out))]


def places(out):
    """Return epoch, window and steps done in it, after each step of a run."""
    return [tuple(manifest["feed"][name] for name in ("epoch", "window", "step")) for manifest in manifests(out)]


def before(place):
    """Return the position before a step that ends at `place`."""
    epoch, window, step = place
    if step == 1:
        return "at a window's beginning" if window else "at an epoch's beginning"
    return "in the next epoch" if epoch else "in mid-window"


WHERE = ["in mid-window", "at a window's beginning", "at an epoch's beginning", "in the next epoch"]
# All positions for one way to store recordings, two for the others, which differ in what they read, not in where.
STOPS = [(store, where) for store in READERS for where in (WHERE if store is in_shards else WHERE[::3])]


@pytest.mark.parametrize(("store", "where"), STOPS)
def test_run_stopped_by_a_signal_resumes_exactly(tmp_path, undisturbed, monkeypatch, store, where):
    data, changes, whole = undisturbed(store)
    ends = places(whole)
    done = next(number for number in range(1, 12) if before(ends[number]) == where)  # steps before the stop
    epoch, window, step = ends[done]
    options = arguments(tmp_path, data, **LONG, **changes, checkpoint_steps=0)
    with monkeypatch.context() as patch:
        # At the first recording of the next step.
        send_at_load(patch, signal.SIGTERM, manifests(whole)[done - 1]["progress"]["utterances"], READERS[store])
        with pytest.raises(RunInterrupted, match=f"SIGTERM: stopped after step {done}, with"):
            run(options)
    assert places(tmp_path / "out") == [(epoch, window, step - 1)]
    run(options)
    assert_same_run(tmp_path / "out", whole)


@pytest.mark.parametrize(("store", "where"), [stop for stop in STOPS if "beginning" in stop[1]])
def test_a_checkpoint_after_the_last_step_of_a_window_or_epoch_leads_to_the_same_end(
    tmp_path, undisturbed, store, where
):
    data, changes, whole = undisturbed(store)
    ends = places(whole)
    done = next(number for number in range(1, 12) if before(ends[number]) == where)
    assert ends[done - 1][:2] != ends[done][:2]
    (tmp_path / "out").mkdir()
    shutil.copytree(whole / f"checkpoint-{done}", tmp_path / "out" / f"checkpoint-{done}")
    shutil.copy(whole / "metrics.jsonl", tmp_path / "out")
    run(arguments(tmp_path, data, **LONG, **changes, checkpoint_steps=0))
    assert_same_run(tmp_path / "out", whole)


@pytest.mark.parametrize("where", ["at a window's beginning", "at an epoch's beginning"])
def test_a_stream_that_fails_writes_a_checkpoint_and_goes_on_later(tmp_path, undisturbed, monkeypatch, where):
    data, changes, whole = undisturbed(in_shards)
    ends, plans = places(whole), StepFeed._window_plans
    done = next(number for number in range(1, 12) if before(ends[number]) == where)
    options, last_window = arguments(tmp_path, data, **LONG, **changes, checkpoint_steps=0), ends[done - 1][1]

    def fail(feed, stream):
        for plan in plans(feed, stream):
            yield plan
            if feed._window == last_window:
                raise OSError("shard 3 could not be downloaded")

    with monkeypatch.context() as patch:
        patch.setattr(StepFeed, "_window_plans", fail)
        with pytest.raises(TrainingStopped) as end:
            run(options)
    assert str(end.value) == f"shard 3 could not be downloaded. The run resumes from checkpoint-{done}."
    run(options)
    assert_same_run(tmp_path / "out", whole)


def test_one_of_several_data_may_have_a_split(tmp_path, flacs):
    shutil.copytree(flacs, tmp_path / "parts" / "train")
    (tmp_path / "table.jsonl").write_text(json.dumps({"path": str(next(flacs.iterdir()))}) + "\n")
    options = arguments(tmp_path / "run", [tmp_path / "parts", tmp_path / "table.jsonl"], data_split=["train", ""])
    source, _ = open_data(options.data, 0)
    assert len(source) == len(listed(flacs)) + 1
    assert {name.split("/")[0] for name in source.ids} == {"parts:train", "table.jsonl"}


def test_workers_read_the_same_stream(tmp_path, undisturbed):
    data, changes, whole = undisturbed(in_shards)
    run(arguments(tmp_path, data, **LONG, **changes, num_workers=2, checkpoint_steps=0))
    assert_same_run(tmp_path / "out", whole)


def test_a_mixture_that_was_moved_is_the_same_run(tmp_path, undisturbed):
    data, changes, whole = undisturbed(in_two_folders)
    for path in data:
        shutil.copytree(path, tmp_path / "moved" / path.name)
    moved = [tmp_path / "moved" / path.name for path in data]
    run(arguments(tmp_path, moved, **LONG, **changes, checkpoint_steps=0))
    assert_same_run(tmp_path / "out", whole)


def test_a_stream_that_changed_under_the_checkpoint_begins_the_next_epoch(tmp_path, recordings, undisturbed, caplog):
    data, changes, whole = undisturbed(in_shards)
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "out").mkdir()
    shutil.copytree(whole / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    shutil.copy(whole / "anchor.safetensors", tmp_path / "out")
    for path in (tmp_path / "data").glob("data/*.parquet"):
        table(listed(recordings)[:7]).to_parquet(path)
    with caplog.at_level("INFO", "dinosr_hf"):
        run(arguments(tmp_path, tmp_path / "data", **LONG, **changes))
    assert "The position in the stream is lost: The stream has other rows than before from row" in caplog.text
    assert "Epoch 1 starts now." in caplog.text
    assert_sound(tmp_path / "out", max_steps=12)
    first = metrics_of(tmp_path / "out")[0]
    assert (first["step"], first["epoch"]) == (4, 1)
