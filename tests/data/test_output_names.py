"""Where results of recordings are written: below the folder, possible on usual disks, each in a file of its own."""

import logging
import os

import pytest

from dinosr_hf.data import output_names
from dinosr_hf.data.output_names import output_path, output_paths


@pytest.mark.parametrize(
    ("recording", "expected"),
    [
        ("a.wav", "a.srt"),
        ("deep/a.b.MP3", "deep/a.b.srt"),
        ("7", "7.srt"),
        ("v1.5", "v1.5.srt"),
        (".wav", ".wav.srt"),
        ("a.wav#2", "a.wav#2.srt"),
        ("/data/x/a.wav", "data/x/a.srt"),
        ("//data/./x//a.wav", "data/x/a.srt"),
        ("../x/a.wav", "_up/x/a.srt"),
        ("../../a.wav", "_up/_up/a.srt"),
        ("b/../../a.wav", "_up/a.srt"),
        ("..", "_up.srt"),
        ("", "_.srt"),
        ("/", "_.srt"),
        ("caf\udce9.wav", r"caf\xe9.srt"),
        ("a\nb.wav", r"a\nb.srt"),
    ],
    ids=ascii,
)
def test_output_paths_are_in_the_folder(tmp_path, recording, expected):
    path = output_path(tmp_path, recording, "srt")
    assert path == tmp_path / expected and path.resolve().is_relative_to(tmp_path)


@pytest.mark.parametrize("letter", ["x", "é", "日"])
@pytest.mark.parametrize("suffix", ["srt", "safetensors"])
def test_long_names_are_cut_and_stay_different(tmp_path, letter, suffix):
    long = letter * (251 // len(letter.encode()))
    first, second = (output_path(tmp_path, f"{long}{end}.wav", suffix) for end in "12")
    assert first != second and {len(os.fsencode(first.name)), len(os.fsencode(second.name))} <= {253, 254, 255}
    assert first.name.startswith(long[:60]) and first.name.endswith(f".{suffix}")
    first.touch()
    fits = "y" * (254 - len(suffix))
    assert output_path(tmp_path, f"{fits}.wav", suffix).name == f"{fits}.{suffix}"
    assert len(output_path(tmp_path, f"{'z' * 300}/a.wav", suffix).parent.name) == 255


def test_changed_names_are_said(tmp_path, caplog):
    names = ["a.wav", "/data/b.wav", "../c.wav", "d" * 260]
    paths = output_paths(tmp_path, names, "txt")
    assert list(paths) == names and len(set(paths.values())) == 4
    (message,) = caplog.messages
    assert message.startswith("3 of 4 recordings have names that are no possible names below")
    assert message.endswith(f"/data/b.wav is written to {tmp_path / 'data' / 'b.txt'}.")
    caplog.clear()
    output_paths(tmp_path, ["a.wav", "b/c.FLAC", "d"], "txt")
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.wav", "b.wav", "a.flac"], r"a\.wav, a\.flac would all be written to \S+a\.txt\. Rename them"),
        (["../a.wav", "_up/a.wav"], r"\.\./a\.wav, _up/a\.wav would all be written to"),
        (["/d/a.wav", "d/a.wav"], r"/d/a\.wav, d/a\.wav would all be written to"),
        (["a.flac", "a.txt/b.wav"], r"a\.flac would be written to \S+a\.txt, which is the folder for a\.txt/b\.wav"),
        (["a.txt/b/c.wav", "a.wav"], r"a\.wav would be written to \S+a\.txt, which is the folder for a\.txt/b/c\.wav"),
        (["made.wav"], r"made\.wav would be written to \S+made\.txt, which is a folder"),
        (["file.wav/a.wav"], r"a\.wav would be written to \S+, but \S+file\.wav is a file"),
        (["/".join(["x" * 250] * 17)], r"The path of x+\.\.\. below \S+ is longer than 4,095 bytes"),
    ],
    ids=["suffixes", "parent", "absolute", "folder", "folder first", "folder on disk", "file on disk", "long path"],
)
def test_files_that_cannot_be_are_refused(tmp_path, names, message):
    (tmp_path / "made.txt").mkdir()
    (tmp_path / "file.wav").touch()
    with pytest.raises(ValueError, match=message):
        output_paths(tmp_path, names, "txt")


def test_the_folder_itself_may_be_a_file(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match=r"a\.wav would be written to \S+, but \S+out is a file"):
        output_paths(tmp_path / "out", ["a.wav"], "txt")


def test_names_that_differ_in_case_only(tmp_path, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING):
        assert len(output_paths(tmp_path, ["Ä.wav", "ä.flac", "b"], "txt")) == 3
    assert caplog.messages == ["The files of Ä.wav and ä.flac differ in case only: some disks cannot hold both."]
    monkeypatch.setattr(output_names, "_ignores_case", lambda folder: True)
    with pytest.raises(ValueError, match=r"Ä\.wav, ä\.flac would all be written to"):
        output_paths(tmp_path, ["Ä.wav", "ä.flac", "b"], "txt")


def test_this_disk_keeps_case_apart(tmp_path):
    (tmp_path / "Abc").mkdir()
    is_same = (tmp_path / "aBC").exists()
    assert output_names._ignores_case(tmp_path / "Abc" / "not" / "yet") == is_same
    (tmp_path / "Abc" / "2024").mkdir()
    assert output_names._ignores_case(tmp_path / "Abc" / "2024") == is_same


def test_the_case_of_a_folder_without_letters_is_that_of_the_one_above(tmp_path, monkeypatch):
    (tmp_path / "Abc" / "2024").mkdir(parents=True)
    (tmp_path / "aBC").symlink_to(tmp_path / "Abc")
    assert output_names._ignores_case(tmp_path / "Abc" / "2024")


def test_names_on_the_disk_are_utf8_where_the_locale_is_ascii(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(os, "fsdecode", lambda name: name.decode("ascii", "surrogateescape"))
    paths = output_paths(tmp_path, ["é.wav", r"caf\xe9.wav"], "txt")
    assert [path.name for path in paths.values()] == ["\udcc3\udca9.txt", r"caf\xe9.txt"]
    assert caplog.messages == []
