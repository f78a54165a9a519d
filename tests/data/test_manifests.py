"""Manifests and tables: parsing, the few files that are opened, and disagreements with the files."""

from __future__ import annotations

import json

import numpy as np
import pytest

from audio_files import PART_ATOL, manifest, sf, write
from dinosr_hf.data import AudioFileError, ManifestSource, TableSource, manifests, open_source


def test_manifest_opens_few_files(tmp_path, monkeypatch):
    opened = []
    write(tmp_path / "one.wav", 5_000)
    for k in range(99):
        (tmp_path / f"{k}.wav").symlink_to(tmp_path / "one.wav")
    read = manifests.audio_info
    monkeypatch.setattr(manifests, "audio_info", lambda path: opened.append(path) or read(path))

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


def test_manifest_with_a_byte_order_mark_and_other_line_ends(tmp_path):
    write(tmp_path / "é.wav", 4_000)
    path = tmp_path / "train.tsv"
    path.write_bytes(f"\ufeff{tmp_path}\r\né.wav\t4000\r\n".encode())
    assert ManifestSource(path).utterances == [("é.wav", 4_000)]
    path.write_bytes(f"{tmp_path}\né.wav\t4000\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"train\.tsv is not UTF-8, but UTF-16"):
        ManifestSource(path)


def test_paths_that_windows_wrote(tmp_path):
    write(tmp_path / "clips" / "a.wav", 4_000)
    write(tmp_path / "b\\c.wav", 5_000)
    expected = [("clips/a.wav", 4_000), ("b\\c.wav", 5_000)]
    path = manifest(tmp_path, ("clips\\a.wav", 4_000), ("b\\c.wav", 5_000))
    assert ManifestSource(path).utterances == expected
    (tmp_path / "metadata.csv").write_text("file_name,text\nclips\\a.wav,one\nb\\c.wav,two\n")
    source = TableSource(tmp_path / "metadata.csv")
    assert source.utterances == expected
    assert source.labels() == ["one", "two"]
    assert source.unlisted() == []


COMMON_VOICE = """client_id\tpath\tsentence\tup_votes\tage
{}\tcv_1.mp3\t"Yes," she said.\t2\t
{}\tcv_2.mp3\t"No.\t2\t
"""


@pytest.mark.parametrize("folder", ["clips", "."])
def test_table_of_common_voice(tmp_path, folder):
    for name in ("cv_1.mp3", "cv_2.mp3"):
        write(tmp_path / folder / name, 4_000)
    path = tmp_path / "train.tsv"
    path.write_text(COMMON_VOICE.format("x", "y"))
    source = open_source(path)
    assert source.labels() == ['"Yes," she said.', '"No.']
    assert source.labels("client_id") == ["x", "y"]
    assert [utterance.id for utterance in source.utterances] == ["cv_1.mp3", "cv_2.mp3"]
    assert len(source.load(1)) == source.utterances[1].num_samples
    assert source.unlisted() == []


def test_table_without_column_of_paths_is_no_manifest(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("name\tsentence\na.wav\tx\n")
    with pytest.raises(ValueError, match=r"must be the folder .* or, of a table, name its columns, .* path or"):
        open_source(path)


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl"])
def test_table_with_a_byte_order_mark(tmp_path, name):
    write(tmp_path / "a.wav", 4_000)
    path = table(tmp_path, [{"path": "a.wav", "text": "x"}], name)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert TableSource(path).labels() == ["x"]


@pytest.mark.parametrize("exponent", [999_999_999, 999_999_999_999_999_999])
def test_table_with_numbers_of_any_size(tmp_path, exponent):
    path = tmp_path / "train.csv"
    path.write_text(f"path,duration\na.wav,1e{exponent}\n")
    with pytest.raises(ValueError, match=r"line 2: duration is '1e9+', but must be a number of .* at most"):
        TableSource(path)
    write(tmp_path / "a.wav", 4_000)
    path.write_text(f"path,duration\na.wav,1e-{exponent}\n")
    with pytest.raises(ValueError, match="none of 1 recordings can be read"):
        TableSource(path)


@pytest.mark.parametrize("line", ["a.wav 4000", "a.wav\tlong", "a.wav\t1\t2", "\t5", f"a.wav\t{'9' * 5000}"])
def test_manifest_with_a_line_of_another_form(tmp_path, line):
    path = tmp_path / "train.tsv"
    path.write_text(f"{tmp_path}\nb.wav\t5\n{line}\n")
    with pytest.raises(ValueError, match=r"train\.tsv, line 3: .* is not `relative/path<TAB>frames`"):
        ManifestSource(path)


def test_manifest_with_missing_folder(tmp_path):
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


def test_empty_manifest(tmp_path):
    with pytest.raises(ValueError, match=r"train\.tsv has no utterances"):
        ManifestSource(manifest(tmp_path))


def table(tmp_path, rows, name="train.jsonl"):
    path = tmp_path / name
    if name.endswith(".csv"):
        lines = [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def counted(monkeypatch):
    """Return the list of files whose headers are read."""
    opened = []
    read = manifests.audio_info
    monkeypatch.setattr(manifests, "audio_info", lambda path: opened.append(path) or read(path))
    return opened


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.csv"])
@pytest.mark.parametrize("column", manifests.PATH_COLUMNS)
def test_table_beside_its_files(tmp_path, name, column):
    write(tmp_path / "clips" / "a.wav", 4_001, rate=8_000)
    write(tmp_path / "b.wav", 3_000)
    rows = [{column: "clips/a.wav", "text": "x"}, {column: str(tmp_path / "b.wav"), "text": "y"}]
    source = TableSource(table(tmp_path, rows, name))
    assert source.utterances == [("clips/a.wav", 8_002), (str(tmp_path / "b.wav"), 3_000)]
    np.testing.assert_array_equal(source.load(1), sf.read(tmp_path / "b.wav", dtype="float32")[0])
    np.testing.assert_allclose(source.load(0, 1_000, 500), source.load(0)[1_000:1_500], rtol=0, atol=PART_ATOL)


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv"])
@pytest.mark.parametrize(
    "length",
    [
        {"num_frames": 2_500, "sampling_rate": 8_000},
        {"num_samples": 5_000},
        {"duration": 0.3125},
        {"num_frames": 2_500, "sampling_rate": 8_000, "num_samples": 7, "duration": 7},
    ],
    ids=["frames", "samples", "seconds", "frames first"],
)
def test_table_with_lengths_opens_few_files(tmp_path, counted, name, length):
    write(tmp_path / "one.wav", 2_500, rate=8_000)
    for k in range(99):
        (tmp_path / f"{k}.wav").symlink_to(tmp_path / "one.wav")
    source = TableSource(table(tmp_path, [{"path": f"{k}.wav", **length} for k in range(99)], name))
    lost = 1 if list(length) == ["duration"] else 0  # half of the fourth decimal is 0.8 samples
    assert source.utterances == [(f"{k}.wav", 5_000 - lost) for k in range(99)]
    assert len(counted) == 16
    assert {tmp_path / "0.wav", tmp_path / "98.wav"} <= set(counted)
    assert len(source.load(3)) == 5_000 - lost


def test_table_reads_headers_where_it_has_no_lengths(tmp_path, counted):
    write(tmp_path / "a.wav", 4_000)
    write(tmp_path / "b.wav", 5_000)
    (tmp_path / "bad.wav").write_text("no audio")
    rows = [
        {"path": "a.wav", "num_samples": 4_000},
        {"path": "b.wav", "num_samples": None},
        {"path": "bad.wav"},
        {"path": "none.wav", "num_samples": 0},
    ]
    source = TableSource(table(tmp_path, rows))
    assert source.utterances == [("a.wav", 4_000), ("b.wav", 5_000)]
    assert source.skipped == {"unreadable": ["bad.wav"], "empty": ["none.wav"]}
    assert sorted(path.name for path in counted) == ["a.wav", "b.wav", "bad.wav"]


@pytest.mark.parametrize("decimals", range(8))
def test_table_of_rounded_durations_never_promises_too_much(tmp_path, decimals):
    lengths = [16_000 + 37 * k for k in range(20)]
    for length in lengths:
        write(tmp_path / f"{length}.wav", length)
    rows = [{"path": f"{length}.wav", "duration": f"{length / 16_000:.{decimals}f}"} for length in lengths]
    source = TableSource(table(tmp_path, rows, "train.csv"))
    for index, ((_, given), length) in enumerate(zip(source.utterances, lengths, strict=True)):
        assert length - 16_000 / 10**decimals - 1 <= given <= length
        assert given == length or decimals < 5
        assert len(source.load(index)) == given


def test_table_of_parts(tmp_path):
    write(tmp_path / "long.wav", 48_000)
    whole = sf.read(tmp_path / "long.wav", dtype="float32")[0]
    rows = [
        {"audio_filepath": "long.wav", "offset": 0.25, "duration": 0.5, "id": "first"},
        {"audio_filepath": "long.wav", "offset": 0.5, "duration": 1},
        {"audio_filepath": "long.wav", "offset": 2, "duration": 1.0},
    ]
    source = TableSource(table(tmp_path, rows))
    # Only parts at the end of the file may be too long: two numbers, each right to half a hundredth.
    assert source.utterances == [("first", 8_000), ("long.wav@0.5", 16_000), ("long.wav@2", 16_000 - 160)]
    np.testing.assert_array_equal(source.load(0), whole[4_000:12_000])
    np.testing.assert_array_equal(source.load(1, 100, 50), whole[8_100:8_150])
    np.testing.assert_array_equal(source.load(2, 15_000), whole[47_000:47_840])


def test_table_of_an_audio_folder(tmp_path):
    write(tmp_path / "a.wav", 16_000)
    (tmp_path / "metadata.csv").write_text(
        '\ufefffile_name,transcription,duration\na.wav,"one, ""two""\nthree",1.000\n'
    )
    source = TableSource(tmp_path / "metadata.csv")
    assert source.utterances == [("a.wav", 15_992)]


def test_table_of_one_file_twice(tmp_path):
    write(tmp_path / "a.wav", 4_000)
    source = TableSource(table(tmp_path, [{"path": "a.wav", "id": 7}, {"path": "a.wav", "id": 7}]))
    assert source.utterances == [("7", 4_000), ("7#2", 4_000)]


def test_parts_without_an_offset_are_refused(tmp_path):
    write(tmp_path / "a.wav", 16_000)
    rows = [{"path": "a.wav", "start": number / 4, "text": text} for number, text in enumerate(["one", "", "two"])]
    with pytest.raises(ValueError, match=r"lines 1 and 3: a\.wav has two different values of text\. Its columns st"):
        TableSource(table(tmp_path, rows)).labels("text")
    parts = [{**row, "offset": row.pop("start"), "duration": 0.25} for row in rows]
    assert TableSource(table(tmp_path, parts)).labels("text") == ["one", "", "two"]
    assert TableSource(table(tmp_path, [rows[0], rows[0]])).labels("text") == ["one", "one"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"file": "a.wav", "text": "x"},
            "no column with paths of audio. Its columns are file, text; the paths must be in one of",
        ),
        ({"path": None}, "line 1: path is None, but must be the path of a file"),
        (
            {"path": "a.wav", "num_samples": "many"},
            "line 1: num_samples is 'many', but must be a whole number of at least 0",
        ),
        ({"path": "a.wav", "num_samples": 1.5}, "but must be a whole number"),
        ({"path": "a.wav", "duration": float("nan")}, "line 1: duration is 'NaN'"),
        ({"path": "a.wav", "duration": -1}, "line 1: duration is -1"),
        (
            {"path": "a.wav", "duration": 1e299},
            r"line 1: duration is '1E\+299', but must be .* at most 1,000,000,000,000",
        ),
        ({"path": "a.wav", "num_samples": 10**13}, "line 1: num_samples is 10000000000000"),
        ({"path": "a.wav", "num_samples": True}, "line 1: num_samples is True"),
        ({"path": "a.wav", "id": ["a"]}, "line 1, id: a label must be text or a number"),
        ({"path": "a.wav\nb.wav"}, r"line 1: path is 'a\.wav\\nb\.wav', but must be the path of a file"),
        ({"path": "a.wav\0"}, "but must be the path of a file"),
        ({"path": "a.wav", "offset": 1}, "line 1: offset=1 needs a duration"),
        ([1], r"line 1: '\[1\]' is not a JSON object; each line must be one"),
    ],
    ids=[
        "column",
        "path",
        "text",
        "half",
        "nan",
        "negative",
        "huge",
        "long",
        "flag",
        "id",
        "lines",
        "NUL",
        "offset",
        "list",
    ],
)
def test_table_that_cannot_be_parsed(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        TableSource(table(tmp_path, [row]))


@pytest.mark.parametrize(
    "length",
    [
        {"num_samples": 4_001},
        {"num_samples": 3_999},
        {"duration": 0.302},
        {"duration": 0.22},
        {"duration": 0.201, "offset": 0.1},
    ],
    ids=["longer", "shorter", "more seconds", "fewer seconds", "part beyond the end"],
)
def test_table_that_disagrees_with_a_header(tmp_path, length):
    write(tmp_path / "a.wav", 4_000)
    with pytest.raises(ValueError, match=r"a\.wav reaches to sample .* but the file has 4,000 samples"):
        TableSource(table(tmp_path, [{"path": "a.wav", **length}]))


def test_empty_table(tmp_path):
    (tmp_path / "empty.csv").write_text("path,duration\n")
    with pytest.raises(ValueError, match=r"empty\.csv has no utterances"):
        TableSource(tmp_path / "empty.csv")
    with pytest.raises(AudioFileError, match=r"gone\.wav is not a file"):
        TableSource(table(tmp_path, [{"path": "gone.wav", "num_samples": 5}]))
