"""Tar archives: members are found, read like the unpacked files, and invalid archives are refused."""

from __future__ import annotations

import gzip
import io
import logging
import os
import pickle
import tarfile

import numpy as np
import pytest

from audio_files import flac, noise, sf, write
from dinosr_hf.data import AudioFileError, FolderSource, TarSource
from dinosr_hf.utils.names import printable_name


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def mp3(num_frames: int) -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, noise(num_frames), 16_000, format="MP3")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Make files of several kinds, and the same ones in two archives."""
    root = tmp_path / "unpacked"
    write(root / "b.wav", 8_000)
    write(root / "a" / "z.flac", 40_000, num_channels=2)
    write(root / "a" / "x.mp3", 22_050, rate=22_050)
    write(root / "a" / "m.ogg", 20_000)
    (tmp_path / "tars").mkdir()
    for number, names in enumerate([["b.wav", "a/z.flac"], ["a/x.mp3", "a/m.ogg"]]):
        with tarfile.open(tmp_path / "tars" / f"train-{number}.tar", "w") as archive:
            for name in names:
                archive.add(root / name, name)
                add(archive, name.rpartition(".")[0] + ".json", b"{}")
    return root


def test_archive_equals_its_folder(folder, tmp_path):
    unpacked, source = FolderSource(folder), TarSource(tmp_path / "tars")
    assert [name for name, _ in source.utterances] == [
        "train-0.tar/b.wav",
        "train-0.tar/a/z.flac",
        "train-1.tar/a/x.mp3",
        "train-1.tar/a/m.ogg",
    ]
    assert source.skipped == {}
    where = {name: index for index, (name, _) in enumerate(unpacked.utterances)}
    for index, (name, num_samples) in enumerate(source.utterances):
        other = where[name.partition("/")[2]]
        assert num_samples == unpacked.utterances[other].num_samples
        np.testing.assert_array_equal(source.load(index), unpacked.load(other))
        np.testing.assert_array_equal(source.load(index, 3_000, 700), unpacked.load(other, 3_000, 700))


def test_archive_by_name_folder_and_pattern(folder, tmp_path):
    tars = tmp_path / "tars"
    assert TarSource(str(tars / "train-*.tar")).utterances == TarSource(tars).utterances
    assert TarSource(tars / "train-1.tar").utterances == TarSource(tars).utterances[2:]
    (tars / "train-0.tar").rename(tmp_path / "train-0.tar")
    names = [name for name, _ in TarSource(tmp_path / "**" / "*.tar").utterances]
    assert names[0] == "tars/train-1.tar/a/x.mp3"
    assert names[-1] == "train-0.tar/a/z.flac"


def test_archive_reads_only_the_part(tmp_path, monkeypatch):
    data = io.BytesIO()
    sf.write(data, noise(16_000 * 60), 16_000, format="WAV")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "long.wav", data.getvalue())
    source = TarSource(tmp_path / "x.tar")
    read = []

    class CountedFile(io.FileIO):
        def read(self, size=-1):
            data = super().read(size)
            read.append(len(data))
            return data

    monkeypatch.setattr(tarfile, "bltn_open", CountedFile)
    assert len(source.load(0, 800_000, 1_600)) == 1_600
    assert 0 < sum(read) < 200_000 < len(data.getvalue())


def test_archive_is_picklable(folder, tmp_path):
    source = TarSource(tmp_path / "tars")
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.load(1, 10, 300), source.load(1, 10, 300))


def test_skipped_members_are_counted(tmp_path, caplog):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "a.flac", flac(4_000))
        add(archive, "bad.flac", b"no audio")
        add(archive, "none.mp3", b"")
        add(archive, "._a.flac", b"left by another system")
        add(archive, "a.flac", flac(3_000))
        link = tarfile.TarInfo("l.flac")
        link.type, link.linkname = tarfile.SYMTYPE, "a.flac"
        archive.addfile(link)
    with caplog.at_level(logging.WARNING):
        source = TarSource(tmp_path / "x.tar")
    assert source.utterances == [("x.tar/a.flac", 4_000), ("x.tar/a.flac#2", 3_000)]
    assert source.skipped == {
        "unreadable": ["x.tar/bad.flac"],
        "empty": ["x.tar/none.mp3"],
        "hidden": ["x.tar/._a.flac"],
        "link": ["x.tar/l.flac"],
    }
    assert "2 of 4 recordings left out (1 empty, 1 unreadable)" in caplog.text


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archive_of_every_format_and_long_names(tmp_path, format):
    names = ["d" * 90 + "/" + "e" * 60 + "/a.flac"]
    if format != tarfile.USTAR_FORMAT:
        names += ["é" * 150 + ".flac", os.fsdecode(b"caf\xe9.flac")]
    with tarfile.open(tmp_path / "x.tar", "w", format=format) as archive:
        for name in names:
            add(archive, name, flac(2_000))
    source = TarSource(tmp_path / "x.tar")
    assert source.utterances == [(f"x.tar/{printable_name(name)}", 2_000) for name in names]


def test_archive_with_a_damaged_member(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "a.wav", b"RIFF" + flac(100))
        add(archive, "b.mp3", mp3(160_000))
    source = TarSource(tmp_path / "x.tar")
    assert source.skipped == {"unreadable": ["x.tar/a.wav"]}
    with tarfile.open(tmp_path / "x.tar") as archive:
        member = archive.getmember("b.mp3")
    os.truncate(tmp_path / "x.tar", member.offset_data + member.size // 2)
    with pytest.raises(AudioFileError, match=r"x\.tar/b\.mp3: .*x\.tar has become shorter: it is truncated"):
        source.load(0)
    (tmp_path / "x.tar").unlink()
    with pytest.raises(AudioFileError, match=r"x\.tar/b\.mp3: .*x\.tar is not a file"):
        source.load(0)


def test_compressed_archive_is_refused(folder, tmp_path):
    tar = tmp_path / "tars" / "train-0.tar"
    for name in ("a.tar.gz", "b.tar"):
        (tmp_path / name).write_bytes(gzip.compress(tar.read_bytes()))
        with pytest.raises(ValueError, match=rf"{name} is compressed \(gzip\).*Decompress the archive"):
            TarSource(tmp_path / name)


def test_truncated_archive_is_refused(folder, tmp_path, caplog):
    tar = tmp_path / "tars" / "train-1.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:4_000])
    with pytest.raises(ValueError, match=r"train-1\.tar cannot be read as a tar archive: .*Download it again"):
        TarSource(tmp_path / "tars")
    # Between two members nothing but the missing end mark tells.
    tar.write_bytes(whole[: -(-len(whole.rstrip(b"\0")) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE])
    with caplog.at_level(logging.WARNING):
        assert len(TarSource(tar)) > 0
    assert "train-1.tar has no end-of-archive mark; it may be truncated" in caplog.text


def test_archive_without_audio(tmp_path):
    with pytest.raises(ValueError, match=r"there is no tar archive here. Give a \.tar file"):
        TarSource(tmp_path)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "a.txt", b"text")
    with pytest.raises(ValueError, match=r"there are no audio files in 1 archive\(s\), such as .*x\.tar. Looked for"):
        TarSource(tmp_path)
    (tmp_path / "y.tar").write_text("no archive, but as long as the header of one would be" * 20)
    with pytest.raises(ValueError, match=r"y\.tar cannot be read as a tar archive"):
        TarSource(tmp_path / "y.tar")
