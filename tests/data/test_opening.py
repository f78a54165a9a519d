"""Which source or stream a name opens, and errors for names that open none."""

from __future__ import annotations

import gzip
import logging
import tarfile

import numpy as np
import pytest

from audio_files import dataset_of, datasets, flac, manifest, noise, pa, small_corpus, write
from dinosr_hf.data import (
    FolderSource,
    ManifestSource,
    SpeechStream,
    TableSource,
    TarSource,
    open_recordings,
    open_source,
    open_stream,
)
from dinosr_hf.data.sources import dataset_errors

parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def folder(tmp_path):
    return small_corpus(tmp_path / "corpus")


def test_open_folder(folder):
    assert len(open_source(folder)) == 5
    assert isinstance(open_source(str(folder)), FolderSource)
    names = [utterance.id for utterance in open_source(folder, split="a").utterances]
    assert names == ["deep/er/x.mp3", "m.ogg", "z.FLAC"]
    with pytest.raises(ValueError, match=r"split='dev' is not a folder in .*, which has a. Choose one of them"):
        open_source(folder, split="dev")


def test_open_manifest(tmp_path):
    write(tmp_path / "a.wav", 5_000)
    path = manifest(tmp_path, ("a.wav", 5_000))
    assert isinstance(open_source(path), ManifestSource)
    with pytest.raises(ValueError, match=r"split='train': .*train\.tsv is a manifest, which has no splits"):
        open_source(path, split="train")


@pytest.mark.parametrize("kind", ["audio bytes", "arrays"])
def test_open_saved_dataset(tmp_path, kind):
    dataset = dataset_of(kind, tmp_path)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(tmp_path / "two")

    assert len(open_source(tmp_path / "one")) == 3
    assert len(open_source(tmp_path / "two", split="test")) == 1
    with pytest.raises(ValueError, match=r"split='train': .*one is a single split"):
        open_source(tmp_path / "one", split="train")
    with pytest.raises(ValueError, match=r"split=None: .*two has the splits train, test. Choose one"):
        open_source(tmp_path / "two")


def test_open_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    dataset = dataset_of("audio bytes", tmp_path)
    folder = tmp_path / "parquet"
    (folder / "data").mkdir(parents=True)
    dataset.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    dataset.select([0]).to_parquet(folder / "data" / "test-00000-of-00001.parquet")

    assert len(open_source(folder / "data" / "train-00000-of-00001.parquet")) == 3
    assert len(open_source(folder, split="test")) == 1
    source = open_source(folder, split="train")
    np.testing.assert_allclose(source.load(2), noise(3_000), rtol=0, atol=2**-15)
    with pytest.raises(ValueError, match=r"split=None: .*parquet has the splits train, test"):
        open_source(folder)


def columns(num_rows: int, **others):
    return pa.table({"audio": pa.array([flac(1_600)] * num_rows, pa.binary()), **others})


OPENED = pytest.mark.parametrize(
    "opened",
    [lambda path: open_source(path).utterances, lambda path: read(open_stream(path))],
    ids=["source", "stream"],
)


def write_shards(folder, *tables):
    folder.mkdir()
    for number, table in enumerate(tables):
        parquet.write_table(table, folder / f"{number}.parquet")
    return folder


@OPENED
@pytest.mark.parametrize("sizes", [(0, 2), (2, 0, 1)])
def test_shards_without_rows_do_no_harm(tmp_path, monkeypatch, opened, sizes):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write_shards(tmp_path / "shards", *(columns(size) for size in sizes))
    assert opened(folder) == [(str(number), 1_600) for number in range(sum(sizes))]


@OPENED
@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([columns(1), columns(1, text=["a"])], r"there are 1 new columns \(\{'text'\}\)"),
        ([columns(1, id=[1]), columns(1, id=["a"])], "Failed to parse string: 'a' as a scalar of type int64"),
        ([columns(1, id=["a"]), columns(1, id=[[1]])], "Couldn't cast array of type list<.*int64> to string"),
    ],
    ids=["columns", "id", "list"],
)
def test_shards_that_do_not_fit_together_are_named(tmp_path, monkeypatch, opened, tables, message):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    advice = "Check that its files are whole, have the same columns, of the same types, and that each split has rows"
    with pytest.raises(ValueError, match=rf"^\S+/shards cannot be read by datasets: {message}\. {advice}\.$"):
        opened(write_shards(tmp_path / "shards", *tables))


@OPENED
def test_parquet_without_rows_is_named(tmp_path, monkeypatch, opened):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write_shards(tmp_path / "shards", columns(0))
    with pytest.raises(
        ValueError, match=r"^\S+/0\.parquet (cannot be .* each split has rows\.|has no rows from row 0)"
    ):
        opened(folder / "0.parquet")


@OPENED
@pytest.mark.parametrize("kind", ["pages", "footer", "arrow"])
def test_damage_within_a_dataset_is_named(tmp_path, monkeypatch, opened, kind):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    if kind == "arrow":
        datasets.Dataset(columns(2)).save_to_disk(tmp_path / "shards")
    else:
        write_shards(tmp_path / "shards", columns(2))
    file = next(path for suffix in ("parquet", "arrow") for path in (tmp_path / "shards").glob(f"*.{suffix}"))
    content = bytearray(file.read_bytes())
    start = len(content) - 100 if kind == "footer" else 4
    content[start : start + 60] = b"\xff" * 60
    file.write_bytes(content)
    with pytest.raises(
        (ValueError, OSError), match=r"^\S+/shards cannot be read by datasets: .* Check that its files"
    ):
        opened(tmp_path / "shards")


def test_open_hub_name(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return dataset_of("audio bytes", tmp_path)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(open_source("someone/speech", split="train", config_name="en")) == 3
    assert asked == [(("someone/speech", "en"), {"split": "train"})]


def test_open_hub_name_without_a_split(tmp_path, monkeypatch):
    splits = datasets.DatasetDict(train=dataset_of("bytes", tmp_path), dev=dataset_of("bytes", tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: splits)
    with pytest.raises(ValueError, match="split=None: someone/speech has the splits train, dev"):
        open_source("someone/speech")


@pytest.mark.parametrize("error", [datasets.exceptions.DatasetNotFoundError("gone"), ConnectionError("no network")])
def test_open_missing_hub_name(monkeypatch, error):
    def load_dataset(*arguments, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match=rf"some/folder does not exist here, and was not found on the Hub \({error}\)\. Accepted are"
    ):
        open_source("some/folder")


def test_open_hub_dataset_that_needs_torchcodec(monkeypatch):
    def load_dataset(*arguments, **options):
        raise datasets.exceptions.DatasetGenerationError("failed") from ImportError("torchcodec")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"without torchcodec\. Download its files \(`hf download"):
        open_source("someone/speech")


@pytest.mark.parametrize("name", ["nothing", "./nothing/here", "data/a/b/c", "train.tsv", "gone/x.parquet"])
def test_open_missing(name):
    with pytest.raises(ValueError, match=rf"{name} does not exist\. Accepted are:\n  a folder with wav(.|\n)*Hub"):
        open_source(name)


def test_open_without_recordings(tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(ValueError, match=r"notes\.txt has no recordings\. Accepted are"):
        open_source(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match=r"has no audio in it\. Accepted are"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match=r"config_name='en' is for a dataset with configurations, and .* has none"):
        open_source(tmp_path, config_name="en")


def test_open_table(tmp_path):
    write(tmp_path / "a.wav", 5_000)
    (tmp_path / "train.csv").write_text("path\na.wav\n")
    for name in ("train.jsonl", "train.json"):
        (tmp_path / name).write_text('{"path": "a.wav"}\n')
    for name in ("train.csv", "train.jsonl", "train.json"):
        source = open_source(tmp_path / name)
        assert isinstance(source, TableSource)
        assert source.utterances == [("a.wav", 5_000)]
    with pytest.raises(ValueError, match=r"split='x': .*train\.csv is a table, which has no splits"):
        open_source(tmp_path / "train.csv", split="x")


@pytest.fixture
def archives(tmp_path):
    """Make two archives of one recording each, in separate folders."""
    for name in ("train", "test"):
        write(tmp_path / "a.flac", 5_000)
        (tmp_path / "tars" / name).mkdir(parents=True)
        with tarfile.open(tmp_path / "tars" / name / "0.tar", "w") as archive:
            archive.add(tmp_path / "a.flac", f"{name}.flac")
    return tmp_path / "tars"


def test_open_archives(archives):
    everything = [("test/0.tar/test.flac", 5_000), ("train/0.tar/train.flac", 5_000)]
    assert isinstance(open_source(archives), TarSource)
    assert open_source(archives).utterances == everything
    assert open_source(f"{archives}/*/0.tar").utterances == everything
    assert open_source(archives, split="test").utterances == [("0.tar/test.flac", 5_000)]
    assert open_source(archives / "train" / "0.tar").utterances == [("0.tar/train.flac", 5_000)]
    with pytest.raises(ValueError, match=r"split='x' is not a folder in .*tars, which has test, train"):
        open_source(archives, split="x")
    with pytest.raises(ValueError, match=r"split='x': .*0\.tar is an archive, which has no splits"):
        open_source(archives / "train" / "0.tar", split="x")
    with pytest.raises(ValueError, match="there is no tar archive here"):
        open_source(f"{archives}/gone-*.tar")


def test_open_compressed_archive(archives):
    (archives / "x.tar.gz").write_bytes(gzip.compress((archives / "train" / "0.tar").read_bytes()))
    with pytest.raises(ValueError, match=r"x\.tar\.gz is compressed \(gzip\)"):
        open_source(archives / "x.tar.gz")


def test_open_folder_with_audio_and_archives(archives, caplog):
    write(archives / "a.wav", 3_000)
    (archives / "train" / "0.tar").rename(archives / "0.tar")
    with caplog.at_level(logging.WARNING):
        assert open_source(archives).utterances == [("a.wav", 3_000)]
    assert "has .tar archives too, which are ignored because it has audio files" in caplog.text


def read(stream) -> list[tuple[str, int]]:
    assert isinstance(stream, SpeechStream)
    return [utterance for window in stream.windows(0) for utterance in window.source.utterances]


def test_a_split_may_have_archives_beside_one_with_audio(archives, caplog):
    write(archives / "single" / "a.wav", 3_000)
    with caplog.at_level(logging.WARNING):
        assert open_source(archives, split="test").utterances == [("0.tar/test.flac", 5_000)]
        assert open_source(archives, split="single").utterances == [("a.wav", 3_000)]
    assert "ignored" not in caplog.text
    with caplog.at_level(logging.WARNING):
        assert open_source(archives).utterances == [("single/a.wav", 3_000)]
    assert "has .tar archives too, which are ignored because it has audio files" in caplog.text


def test_stream_parquet_saved_datasets_and_archives(tmp_path, archives, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    dataset = dataset_of("audio bytes", tmp_path)
    (tmp_path / "parquet").mkdir()
    dataset.to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    dataset.select([0]).to_parquet(tmp_path / "parquet" / "test-00000-of-00001.parquet")
    dataset.save_to_disk(tmp_path / "saved", num_shards=2)
    three = [("0", 1_600), ("1", 2_400), ("2", 3_000)]

    assert read(open_stream(tmp_path / "parquet" / "train-00000-of-00001.parquet")) == three
    assert read(open_stream(tmp_path / "parquet", split="test")) == three[:1]
    saved = open_stream(tmp_path / "saved", window_seconds=0.1)
    assert read(saved) == three
    assert [window.index for window in saved.windows(0)] == [0, 1, 2]
    shuffled = read(open_stream(tmp_path / "saved", seed=1))
    assert sorted(num_samples for _, num_samples in shuffled) == [1_600, 2_400, 3_000]
    for name in (archives, archives / "train" / "0.tar", f"{archives}/*/0.tar"):
        utterances = read(open_stream(name, audio_column="flac"))
        assert ("train", 5_000) in utterances
    with pytest.raises(ValueError, match=r"split=None: .*parquet has the splits train, test"):
        open_stream(tmp_path / "parquet")
    with pytest.raises(ValueError, match=r"audio_column='audio' is not a column of the dataset, which has .*flac"):
        open_stream(archives)


@pytest.mark.parametrize("opened", [open_source, open_stream, lambda name: open_recordings([name])])
def test_an_empty_name_is_not_this_folder(opened, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=r"The name of the data is empty, as of a shell variable that is not set\."):
        opened("")
    with pytest.raises(ValueError, match=r"^An empty name is neither an audio file .* nor a folder\."):
        open_recordings(["b.wav", ""])
    assert len(open_source(".")) == len(open_source(folder))


def test_stream_hub_name(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return dataset_of("audio bytes", tmp_path).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read(open_stream("someone/speech", split="train", config_name="en"))) == 3
    assert asked == [(("someone/speech", "en"), {"split": "train", "streaming": True})]


def test_only_datasets_can_be_streamed(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"streaming is for datasets .* and .*corpus is not one\. Leave streaming out"
    ):
        open_stream(folder)
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"streaming is for datasets .* and .*train\.jsonl is not one"):
        open_stream(tmp_path / "train.jsonl")


def test_open_recordings_by_name(tmp_path):
    write(tmp_path / "x" / "a.wav", 1_600)
    write(tmp_path / "x" / "deep" / "b.flac", 1_200, rate=8_000)
    write(tmp_path / "x" / "deep" / ".hidden.wav", 1_600)
    write(tmp_path / "y" / "c.WAV", 800)
    (tmp_path / "y" / "bad.wav").write_text("no audio")
    source = open_recordings([tmp_path / "y" / "c.WAV", tmp_path / "x", tmp_path / "x" / "a.wav"])
    assert source.utterances == [("y/c.WAV", 800), ("x/a.wav", 1_600), ("x/deep/b.flac", 2_400)]
    assert len(source.load(2, 100, 50)) == 50
    (single,) = open_recordings([tmp_path / "x" / "deep" / "b.flac"]).utterances
    assert single.id == "b.flac"
    assert type(open_recordings([tmp_path / "x"])) is FolderSource
    assert type(open_recordings([manifest(tmp_path, ("x/a.wav", 1_600))])) is ManifestSource
    assert open_recordings([tmp_path / "y"]).skipped == {"unreadable": ["bad.wav"]}


def test_names_that_are_not_recordings_are_refused(tmp_path):
    write(tmp_path / "a.wav", 1_600)
    with pytest.raises(ValueError, match=r"a.tsv is neither an audio file .* nor a folder"):
        open_recordings([tmp_path / "a.wav", tmp_path / "a.tsv"])
    with pytest.raises(ValueError, match=r"none of 1 recordings can be read \(1 missing\): .*none.wav is not a file"):
        open_recordings([tmp_path / "none.wav"])
    with pytest.raises(ValueError, match="There are no files"):
        open_recordings([])
    with pytest.raises(ValueError, match=r"a\.tar is neither .*\. Put quotes around a pattern of archives"):
        open_recordings([tmp_path / "a.tar", tmp_path / "b.tar"])
    with pytest.raises(ValueError, match="config_name='x' needs a single input, but there are 2"):
        open_recordings([tmp_path / "a.wav", tmp_path / "a.wav"], config_name="x")
    with pytest.raises(ValueError, match="config_name='x' is for a dataset with configurations"):
        open_recordings([tmp_path / "a.wav"], config_name="x")
    with pytest.raises(ValueError, match=r"split='x': .*a\.wav is a recording, which has no splits"):
        open_recordings([tmp_path / "a.wav"], split="x")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ConnectionError("the Hub is away")])
def test_errors_of_system_and_network_are_not_blamed_on_the_data(error):
    with pytest.raises(type(error)) as caught, dataset_errors("speech"):
        raise error
    assert caught.value is error


def test_a_full_disk_is_not_blamed_on_the_data_that_is_copied():
    full = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left") as caught, dataset_errors("speech"):
        raise datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset") from full
    assert caught.value is full
