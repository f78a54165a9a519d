"""Ids of utterances: unique whatever people write, and text, in every source."""

import csv
import io
import json
import math
import os
import tarfile

import numpy as np
import pytest

from audio_files import datasets, flac, noise, pa, write
from dinosr_hf.analysis import match_labels
from dinosr_hf.data import DatasetSource, FileSource, FolderSource, ManifestSource, TableSource, TarSource, open_source
from dinosr_hf.data.mixture import JoinedSource
from dinosr_hf.data.opening import open_stream
from dinosr_hf.data.scan import scan_folder, write_manifest

WRITTEN = ["a", "a", "a#2", "b"]
UNIQUE = ["a", "a#3", "a#2", "b"]
LENGTHS = [4_000, 4_100, 4_200, 4_300]
LATIN = "caf\udce9.wav"  # a name in Latin-1, as old zips have it


def write_all(folder):
    """Write four recordings, and return their names."""
    for length in LENGTHS:
        write(folder / f"{length}.wav", length)
    return [f"{length}.wav" for length in LENGTHS]


def write_csv(path, rows, **options):
    with open(path, "w", newline="", **options) as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    return path


def from_csv(tmp_path, ids):
    return TableSource(write_csv(tmp_path / "t.csv", [("path", "id"), *zip(write_all(tmp_path), ids, strict=True)]))


def from_jsonl(tmp_path, ids):
    rows = ({"path": path, "id": name} for path, name in zip(write_all(tmp_path), ids, strict=True))
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TableSource(tmp_path / "t.jsonl")


def rows_with_ids(tmp_path, ids):
    audio = [{"bytes": flac(length), "path": None} for length in LENGTHS]
    return datasets.Dataset(pa.table({"audio": audio, "id": ids}))


def from_dataset(tmp_path, ids):
    return DatasetSource(rows_with_ids(tmp_path, ids))


def from_parquet(tmp_path, ids):
    rows_with_ids(tmp_path, ids).to_parquet(tmp_path / "t.parquet")
    return open_source(tmp_path / "t.parquet")


def from_stream(tmp_path, ids):
    rows_with_ids(tmp_path, ids).save_to_disk(tmp_path / "saved")
    (window,) = open_stream(tmp_path / "saved", window_seconds=100).windows(0)
    return window.source


@pytest.mark.parametrize("make", [from_csv, from_jsonl, from_dataset, from_parquet, from_stream])
def test_ids_that_repeat_get_free_numbers(make, tmp_path):
    source = make(tmp_path, WRITTEN)
    assert [tuple(utterance) for utterance in source.utterances] == list(zip(UNIQUE, LENGTHS, strict=True))
    assert [len(source.load(index)) for index in range(4)] == LENGTHS


@pytest.mark.parametrize("make", [from_dataset, from_parquet, from_stream])
def test_a_missing_id_is_the_number_of_the_row(make, tmp_path):
    assert [name for name, _ in make(tmp_path, ["a", None, "1", ""]).utterances] == ["a", "1", "1#2", "3"]


@pytest.mark.parametrize("make", [from_jsonl, from_dataset, from_parquet, from_stream])
def test_numbers_with_a_gap_are_whole(make, tmp_path):
    ids = [name for name, _ in make(tmp_path, [17.0, 17.0, math.nan, 2.5]).utterances]
    assert ids == ["17", "17#2", "4200.wav" if make is from_jsonl else "2", "2.5"]


@pytest.mark.parametrize("make", [from_jsonl, from_dataset, from_parquet, from_stream])
@pytest.mark.parametrize("value", [["a"], {"name": "a"}, True], ids=str)
def test_an_id_that_is_neither_text_nor_a_number_is_refused(make, value, tmp_path):
    with pytest.raises(ValueError, match=r"(line 1, id|row 0, column 'id'): a label must be text or a number, but"):
        make(tmp_path, [value] * 4)


def test_numbers_do_not_depend_on_what_is_skipped(tmp_path):
    names = write_all(tmp_path)
    before = from_csv(tmp_path, WRITTEN)
    (tmp_path / names[0]).write_bytes(b"no audio")
    after = TableSource(tmp_path / "t.csv")
    assert after.skipped == {"unreadable": ["a"]} and after.utterances == before.utterances[1:]


def test_paths_and_members_that_repeat_get_free_numbers(tmp_path):
    write(tmp_path / "a.wav", 4_000)
    (tmp_path / "a.wav#2").symlink_to("a.wav")
    paths = ["a.wav", "a.wav", "a.wav#2"]
    unique = ["a.wav", "a.wav#3", "a.wav#2"]
    (tmp_path / "t.tsv").write_text("\n".join([str(tmp_path), *(f"{path}\t4000" for path in paths), ""]))
    assert [name for name, _ in ManifestSource(tmp_path / "t.tsv").utterances] == unique
    table = write_csv(tmp_path / "t.csv", [["path"], *([path] for path in paths)])
    assert [name for name, _ in TableSource(table).utterances] == unique
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for length in (4_000, 5_000):
            data, member = flac(length), tarfile.TarInfo("a.flac")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    source = TarSource(tmp_path / "t.tar")
    assert [tuple(each) for each in source.utterances] == [("t.tar/a.flac", 4_000), ("t.tar/a.flac#2", 5_000)]


def test_joined_sources_keep_ids_apart(tmp_path):
    source = from_csv(tmp_path, WRITTEN)
    names = [name for name, _ in JoinedSource([source, source]).utterances]
    assert names == [f"{number}:{name}" for number in (0, 1) for name in UNIQUE]


@pytest.fixture
def latin(tmp_path):
    """A folder with a name in Latin-1, and one with a line break."""
    folder = tmp_path / "old zip"
    folder.mkdir()
    for name, length in {LATIN: 4_000, "a\nb.wav": 5_000, "plain.wav": 6_000}.items():
        (folder / name).write_bytes(flac(length))
    return folder


IDS = ["a\\nb.wav", "caf\\xe9.wav", "plain.wav"]


def check_latin(source):
    assert sorted(tuple(each) for each in source.utterances) == list(zip(IDS, [5_000, 4_000, 6_000], strict=True))
    for index, (_, length) in enumerate(source.utterances):
        np.testing.assert_allclose(source.load(index), noise(length), atol=1e-4)


def test_names_that_are_not_utf8_are_escaped_in_ids_and_found_on_the_disk(latin):
    check_latin(FolderSource(latin))
    check_latin(FileSource(sorted(latin.iterdir())))


def test_archives_with_names_that_are_not_utf8(latin):
    with tarfile.open(latin.parent / "t.tar", "w") as archive:
        for path in sorted(latin.iterdir()):
            archive.add(path, path.name)
        archive.addfile(tarfile.TarInfo("." + LATIN))
    source = TarSource(latin.parent / "t.tar")
    assert sorted(name for name, _ in source.utterances) == [f"t.tar/{name}" for name in IDS]
    assert source.skipped == {"hidden": ["t.tar/.caf\\xe9.wav"]}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_manifests_lead_back_to_names_that_are_not_utf8(latin, suffix):
    (latin / ("bad" + LATIN)).write_bytes(b"no audio")
    manifest, left_out = write_manifest(scan_folder(latin), latin.parent / f"all{suffix}")
    source = open_source(manifest)
    assert [name for name, _ in source.utterances] == IDS[1:]
    np.testing.assert_allclose(source.load(0), noise(4_000), atol=1e-4)
    rows = list(csv.reader(io.StringIO(left_out.read_text("utf-8"))))
    assert [row[:2] for row in rows[1:]] == [["a\\nb.wav", "line break"], ["badcaf\\xe9.wav", "unreadable"]]
    assert "badcaf\\xe9.wav" in rows[2][2]


def test_a_folder_with_a_line_break_in_its_name_has_no_manifest(tmp_path):
    write(tmp_path / "a\nb" / "c.wav", 5_000)
    with pytest.raises(ValueError, match=r"'a\\nb' has a line break in its name, which no manifest can hold\. Rename"):
        write_manifest(scan_folder(tmp_path / "a\nb"), tmp_path / "all.jsonl")


def test_hidden_and_unreadable_files_are_named_by_text(latin):
    (latin / ("." + LATIN)).write_bytes(b"hidden")
    (latin / LATIN).write_bytes(b"no audio")
    source = FolderSource(latin)
    assert source.skipped == {"unreadable": [IDS[1]], "hidden": ["." + IDS[1]]}
    os.fsencode(str(scan_folder(latin))).decode("utf-8")


def test_transcripts_and_labels_of_names_that_are_not_utf8_are_found(latin):
    (latin / ("caf\udce9" + ".trans.txt")).write_text("plain one\n")
    folder = latin / "spk\udce9"
    folder.mkdir()
    (folder / "x.wav").write_bytes(flac(4_000))
    (folder / "spk.trans.txt").write_text("x two\n")
    source = FolderSource(latin)
    found = dict(zip((name for name, _ in source.utterances), source.labels(), strict=True))
    assert found == {"a\\nb.wav": None, "caf\\xe9.wav": None, "plain.wav": "one", "spk\\xe9/x.wav": "two"}
    labels = {"caf\udce9": ["A"], "plain": ["B"]}  # as of TextGrids with such names
    assert match_labels(IDS, labels) == {"caf\\xe9.wav": "caf\udce9", "plain.wav": "plain"}
