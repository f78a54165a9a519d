"""Folders and datasets: files and rows that are found or skipped, and reading of parts."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest

from audio_files import KINDS, PART_ATOL, dataset_of, datasets, flac, manifest, noise, pa, small_corpus, write
from dinosr_hf.data import AudioFileError, DatasetSource, FolderSource, ManifestSource


@pytest.fixture
def folder(tmp_path):
    return small_corpus(tmp_path / "corpus")


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


def test_skipped_files_are_counted(folder, caplog):
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
        "hidden": ["._b.wav", ".trash/old.wav"],
    }
    assert "4 of 9 recordings left out (2 empty, 2 unreadable)" in caplog.text
    assert "bad.wav cannot be read as audio" in caplog.text


def test_folder_without_audio(tmp_path):
    with pytest.raises(ValueError, match=r"has no audio files in it or below it\. Looked for \.wav, \.flac"):
        FolderSource(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        FolderSource(tmp_path / "missing")
    (tmp_path / "bad.wav").write_text("no audio")
    with pytest.raises(
        ValueError, match=r": none of 1 recordings can be read \(1 unreadable\): .*bad\.wav cannot be read"
    ):
        FolderSource(tmp_path)


def test_file_truncated_after_listing(folder):
    source = FolderSource(folder)
    write(folder / "b.wav", 100)
    with pytest.raises(AudioFileError, match=r"b\.wav has 100 samples at 16,000 Hz, but the part from 0 to 8,000"):
        source.load(4, 0, 8_000)


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


def test_samples_without_their_rate_are_refused():
    dataset = datasets.Dataset.from_dict({"speech": [noise(1_200).tolist(), noise(900).tolist()]})
    with pytest.raises(ValueError, match=r"'speech' is list<.*>, without its sampling rate\. Audio is .* Make one of"):
        DatasetSource(dataset, "speech")


def test_dataset_after_select_filter_and_format(tmp_path):
    dataset = dataset_of("arrays", tmp_path).add_column("id", ["x", "y", "x"]).select([2, 0, 1]).with_format("torch")
    source = DatasetSource(dataset)
    assert source.utterances == [("x", 3_000), ("x#2", 1_600), ("y", 2_400)]
    np.testing.assert_array_equal(source.load(0), noise(3_000))
    np.testing.assert_array_equal(source.load(1), noise(1_600))


def test_skipped_rows_are_counted(caplog):
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


def test_dataset_row_that_cannot_be_read_is_named():
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
    with pytest.raises(ValueError, match=r"A datasets\.Dataset is needed, not IterableDataset\."):
        DatasetSource(dataset.to_iterable_dataset())


@pytest.mark.parametrize("kind", ["folder", "manifest", *KINDS])
def test_sources_are_picklable(folder, tmp_path, kind):
    if kind == "folder":
        source = FolderSource(folder)
    elif kind == "manifest":
        source = ManifestSource(manifest(tmp_path, ("b.wav", 8_000), ("a/m.ogg", 5_000), root=folder))
    else:
        source = DatasetSource(dataset_of(kind, tmp_path))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.utterances == source.utterances
    np.testing.assert_array_equal(copy.load(1, 10, 300), source.load(1, 10, 300))
