"""Folders, manifests and datasets: what is found, what is left out and why, and that parts are read as parts."""

from __future__ import annotations

import io
import logging
import os
import pickle

import numpy as np
import pytest

from dinosr_hf.data import AudioFileError, DatasetSource, FolderSource, ManifestSource, open_source, sources

sf = pytest.importorskip("soundfile")
datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")

# A part of a resampled recording, as in test_audio.py.
PART_ATOL = 1e-6


def noise(num_frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, num_frames).astype(np.float32)


def write(path, num_frames: int, rate: int = 16_000, num_channels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, np.repeat(noise(num_frames)[:, None], num_channels, 1), rate)


def flac(num_frames: int, rate: int = 16_000) -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, noise(num_frames), rate, format="FLAC")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Five readable files of several kinds."""
    root = tmp_path / "corpus"
    write(root / "b.wav", 8_000)
    write(root / "a" / "z.FLAC", 4_000, num_channels=2)
    write(root / "a" / "deep" / "er" / "x.mp3", 11_025, rate=22_050)
    write(root / "a" / "m.ogg", 5_000)
    write(root / "0.flac", 8_000, rate=8_000)
    (root / "a" / "notes.txt").write_text("no audio")
    return root


def test_folder_is_searched_and_sorted(folder):
    source = FolderSource(folder)
    assert source.utterances == [
        ("0.flac", 16_000),
        ("a/deep/er/x.mp3", 8_000),
        ("a/m.ogg", 5_000),
        ("a/z.FLAC", 4_000),
        ("b.wav", 8_000),
    ]
    assert len(source) == 5
    assert source.skipped == {}
    for index, (_, num_samples) in enumerate(source.utterances):
        whole = source.load(index)
        assert whole.shape == (num_samples,)
        assert whole.dtype == np.float32
        np.testing.assert_allclose(source.load(index, 1_000, 500), whole[1_000:1_500], rtol=0, atol=PART_ATOL)


def test_folder_follows_links_once(folder, tmp_path):
    write(tmp_path / "elsewhere" / "c.wav", 3_000)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "loop").symlink_to(folder)
    names = [utterance.id for utterance in FolderSource(folder).utterances]
    assert "linked/c.wav" in names
    assert len(names) == 6


def test_folder_counts_what_it_leaves_out(folder, caplog):
    (folder / "bad.wav").write_text("no audio at all")
    (folder / "worse.mp3").write_text("nor here")
    (folder / "empty.flac").touch()
    write(folder / "silent.wav", 0)
    (folder / "._b.wav").write_bytes(b"left by another system")
    write(folder / ".trash" / "old.wav", 100)

    with caplog.at_level(logging.WARNING):
        source = FolderSource(folder)

    assert len(source) == 5
    assert source.skipped == {
        "unreadable": ["bad.wav", "worse.mp3"],
        "empty": ["empty.flac", "silent.wav"],
        "hidden": ["._b.wav"],
    }
    assert "4 of 9 recordings left out (2 empty, 2 unreadable)" in caplog.text
    assert "bad.wav cannot be read as audio" in caplog.text


def test_folder_of_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"has no audio files in it or below it\. Looked for \.wav, \.flac"):
        FolderSource(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        FolderSource(tmp_path / "missing")
    (tmp_path / "bad.wav").write_text("no audio")
    with pytest.raises(ValueError, match=r"1 of 1 recordings left out \(1 unreadable\).*bad\.wav cannot be read"):
        FolderSource(tmp_path)


def test_file_that_went_bad_after_the_scan(folder):
    source = FolderSource(folder)
    write(folder / "b.wav", 100)
    with pytest.raises(AudioFileError, match=r"b\.wav has 100 samples at 16,000 Hz, but the part from 0 to 8,000"):
        source.load(4, 0, 8_000)


def manifest(tmp_path, *rows, root=None):
    path = tmp_path / "train.tsv"
    path.write_text("\n".join([str(root or tmp_path), *(f"{name}\t{frames}" for name, frames in rows), ""]))
    return path


def test_manifest_opens_a_few_files_only(tmp_path, monkeypatch):
    opened = []
    write(tmp_path / "one.wav", 5_000)
    for k in range(99):
        (tmp_path / f"{k}.wav").symlink_to(tmp_path / "one.wav")
    read = sources.audio_info
    monkeypatch.setattr(sources, "audio_info", lambda path: opened.append(path) or read(path))

    source = ManifestSource(manifest(tmp_path, *((f"{k}.wav", 5_000) for k in range(99))))

    assert source.utterances == [(f"{k}.wav", 5_000) for k in range(99)]
    assert len(opened) == 16
    assert {tmp_path / "0.wav", tmp_path / "98.wav"} <= set(opened)
    np.testing.assert_array_equal(source.load(3, 100, 200), source.load(3)[100:300])


def test_manifest_beside_its_folder_with_other_rate_empty_and_repeated_lines(tmp_path):
    write(tmp_path / "clips" / "a.wav", 4_001, rate=8_000)
    write(tmp_path / "clips" / "b.wav", 3_000, rate=8_000)
    path = manifest(tmp_path, ("a.wav", 4_001), ("none.wav", 0), ("b.wav", 3_000), ("a.wav", 4_001), root="clips")

    source = ManifestSource(path)

    assert source.utterances == [("a.wav", 8_002), ("b.wav", 6_000), ("a.wav#2", 8_002)]
    assert source.skipped == {"empty": ["none.wav"]}
    np.testing.assert_array_equal(source.load(2), source.load(0))
    assert len(source.load(1)) == 6_000


@pytest.mark.parametrize("line", ["a.wav 4000", "a.wav\tlong", "a.wav\t1\t2"])
def test_manifest_with_a_line_of_another_form(tmp_path, line):
    path = tmp_path / "train.tsv"
    path.write_text(f"{tmp_path}\nb.wav\t5\n{line}\n")
    with pytest.raises(ValueError, match=r"train\.tsv, line 3: .* is not `relative/path<TAB>frames`"):
        ManifestSource(path)


def test_manifest_whose_folder_is_not_here(tmp_path):
    path = manifest(tmp_path, ("a.wav", 5), root="/no/such/folder")
    with pytest.raises(
        ValueError, match=r"its first line must be the folder .* '/no/such/folder' is not a folder here"
    ):
        ManifestSource(path)


def test_manifest_that_disagrees_with_a_header(tmp_path):
    write(tmp_path / "a.wav", 4_000, rate=8_000)
    message = r"a\.wav has 8,000 frames there, but the file has 8,000 samples at 16 kHz \(its own rate is 8,000 Hz\)"
    with pytest.raises(ValueError, match=message):
        ManifestSource(manifest(tmp_path, ("a.wav", 8_000)))


def test_manifest_of_several_rates(tmp_path):
    write(tmp_path / "a.wav", 4_000, rate=8_000)
    write(tmp_path / "b.wav", 4_000, rate=16_000)
    with pytest.raises(ValueError, match=r"different rates \(a\.wav 8,000 Hz, b\.wav 16,000 Hz\).*Give the folder"):
        ManifestSource(manifest(tmp_path, ("a.wav", 4_000), ("b.wav", 4_000)))


def test_manifest_of_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"train\.tsv has no utterances"):
        ManifestSource(manifest(tmp_path))


def dataset_of(kind: str, tmp_path):
    """Three recordings of 1,600, 2,400 (at 8 kHz) and 3,000 samples, as one kind of column."""
    lengths, rates = [1_600, 1_200, 3_000], [16_000, 8_000, 16_000]
    files = [flac(n, rate) for n, rate in zip(lengths, rates, strict=True)]
    paths = []
    for k, data in enumerate(files):
        (tmp_path / f"{k}.flac").write_bytes(data)
        paths.append(str(tmp_path / f"{k}.flac"))
    arrays = [noise(n) for n in lengths]
    structs = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    column = {
        "audio bytes": lambda: pa.array([{"bytes": data, "path": "x.flac"} for data in files], structs),
        "audio paths": lambda: pa.array([{"bytes": None, "path": path} for path in paths], structs),
        "bytes": lambda: pa.array(files),
        "paths": lambda: pa.array(paths),
        "arrays": lambda: pa.array(
            [{"array": a, "sampling_rate": rate} for a, rate in zip(arrays, rates, strict=True)],
            pa.struct({"array": pa.list_(pa.float32()), "sampling_rate": pa.int64()}),
        ),
    }[kind]()
    dataset = datasets.Dataset(pa.table({"audio": column, "text": ["a", "b", "c"]}))
    if kind.startswith("audio"):
        dataset = dataset.cast_column("audio", datasets.Audio())
        assert dataset.features["audio"].decode
    return dataset


KINDS = ["audio bytes", "audio paths", "bytes", "paths", "arrays"]


@pytest.mark.parametrize("kind", KINDS)
def test_dataset_of_every_kind_of_column(tmp_path, kind):
    source = DatasetSource(dataset_of(kind, tmp_path))
    assert source.utterances == [("0", 1_600), ("1", 2_400), ("2", 3_000)]
    atol = 0 if kind == "arrays" else 2**-15  # 16 bits of the file
    np.testing.assert_allclose(source.load(2), noise(3_000), rtol=0, atol=atol)
    for index in range(3):
        whole = source.load(index)
        assert whole.shape == (source.utterances[index].num_samples,)
        assert whole.dtype == np.float32
        np.testing.assert_allclose(source.load(index, 700, 800), whole[700:1_500], rtol=0, atol=PART_ATOL)


def test_dataset_of_plain_lists():
    dataset = datasets.Dataset.from_dict({"speech": [noise(1_200).tolist(), noise(900).tolist()]})
    source = DatasetSource(dataset, "speech", sampling_rate=8_000)
    assert source.utterances == [("0", 2_400), ("1", 1_800)]
    assert source.load(0, 100, 50).shape == (50,)
    with pytest.raises(ValueError, match="sampling_rate=None, but the column 'speech' has samples"):
        DatasetSource(dataset, "speech")


def test_dataset_with_a_rate_that_it_knows_itself(tmp_path):
    with pytest.raises(ValueError, match="sampling_rate=8000, but the column 'audio' has arrays"):
        DatasetSource(dataset_of("arrays", tmp_path), sampling_rate=8_000)


def test_dataset_that_was_selected_filtered_and_formatted(tmp_path):
    dataset = dataset_of("arrays", tmp_path).add_column("id", ["x", "y", "x"]).select([2, 0, 1]).with_format("torch")
    source = DatasetSource(dataset)
    assert source.utterances == [("x", 3_000), ("x#2", 1_600), ("y", 2_400)]
    np.testing.assert_array_equal(source.load(0), noise(3_000))
    np.testing.assert_array_equal(source.load(1), noise(1_600))


def test_dataset_counts_what_it_leaves_out(tmp_path, caplog):
    structs = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    values = [{"bytes": b"no audio", "path": None}, {"bytes": None, "path": None}, {"bytes": flac(900), "path": None}]
    table = pa.table({"audio": pa.array([*values, None], structs), "id": ["bad", "none", "good", "null"]})
    with caplog.at_level(logging.WARNING):
        source = DatasetSource(datasets.Dataset(table))
    assert source.utterances == [("good", 900)]
    assert source.skipped == {"unreadable": ["bad"], "missing": ["none", "null"]}
    assert "3 of 4 recordings left out (2 missing, 1 unreadable)" in caplog.text
    assert source.load(0).shape == (900,)

    arrays = [{"array": [], "sampling_rate": 16_000}, {"array": None, "sampling_rate": None}, None]
    arrays.append({"array": noise(700).tolist(), "sampling_rate": 16_000})
    source = DatasetSource(datasets.Dataset.from_dict({"audio": arrays}))
    assert source.utterances == [("3", 700)]
    assert source.skipped == {"empty": ["0", "1", "2"]}
    np.testing.assert_array_equal(source.load(0), noise(700))


def test_dataset_row_that_cannot_be_read_is_named(tmp_path):
    data = flac(50_000)
    table = pa.table({"audio": [data[: len(data) // 2]], "id": ["utterance-7"]})
    source = DatasetSource(datasets.Dataset(table))
    with pytest.raises(AudioFileError, match=r"Utterance utterance-7: .* truncated or damaged") as caught:
        source.load(0)
    assert caught.value.reason == "truncated"


@pytest.mark.parametrize(
    "values", [[1, 2], [[1, 2]], [{"a": 1}]], ids=["numbers", "lists of integers", "other structs"]
)
def test_dataset_column_that_is_not_audio(values):
    with pytest.raises(ValueError, match=r"The column 'audio' is .*, which is not audio\. Audio is"):
        DatasetSource(datasets.Dataset.from_dict({"audio": values}))


def test_dataset_without_the_column(tmp_path):
    with pytest.raises(
        ValueError, match="audio_column='speech' is not a column of the dataset, which has audio, text"
    ):
        DatasetSource(dataset_of("bytes", tmp_path), "speech")


def test_dataset_of_splits_or_of_another_class(tmp_path):
    dataset = dataset_of("bytes", tmp_path)
    with pytest.raises(ValueError, match=r"not DatasetDict: choose one of its splits, train, test\."):
        DatasetSource(datasets.DatasetDict(train=dataset, test=dataset))
    with pytest.raises(ValueError, match=r"A map-style datasets\.Dataset is needed, not IterableDataset\."):
        DatasetSource(dataset.to_iterable_dataset())


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
def test_open_hub_name_that_is_not_there(monkeypatch, error):
    def load_dataset(*arguments, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match=rf"some/folder is not here, and not found on the Hub \({error}\)\. Accepted are"
    ):
        open_source("some/folder")


def test_open_hub_dataset_that_needs_torchcodec(monkeypatch):
    def load_dataset(*arguments, **options):
        raise datasets.exceptions.DatasetGenerationError("failed") from ImportError("torchcodec")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"without torchcodec\. Download its files \(`hf download"):
        open_source("someone/speech")


@pytest.mark.parametrize("name", ["nothing", "./nothing/here", "data/a/b/c", "train.tsv", "gone/x.parquet"])
def test_open_nothing(name):
    with pytest.raises(ValueError, match=rf"{name} is not here\. Accepted are:\n  a folder with wav, flac(.|\n)*Hub"):
        open_source(name)


def test_open_what_is_of_no_use(tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(ValueError, match=r"notes\.txt is nothing to train on\. Accepted are"):
        open_source(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match=r"has no audio in it\. Accepted are"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="config_name='en' belongs to a dataset on the Hub"):
        open_source(tmp_path, config_name="en")


@pytest.mark.parametrize("kind", ["folder", "manifest", *KINDS])
def test_sources_travel_to_workers(folder, tmp_path, kind):
    if kind == "folder":
        source = FolderSource(folder)
    elif kind == "manifest":
        source = ManifestSource(manifest(tmp_path, ("b.wav", 8_000), ("a/m.ogg", 5_000), root=folder))
    else:
        source = DatasetSource(dataset_of(kind, tmp_path))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.utterances == source.utterances
    np.testing.assert_array_equal(copy.load(1, 10, 300), source.load(1, 10, 300))


def test_file_name_that_is_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.wav")
    write(tmp_path / "plain.wav", 500)
    os.rename(tmp_path / "plain.wav", tmp_path / name)
    source = FolderSource(tmp_path)
    assert source.utterances == [(name, 500)]
    assert len(source.load(0)) == 500
