"""Tar archives: members are found, read like the unpacked files, and invalid archives are refused."""

from __future__ import annotations

import gzip
import io
import logging
import os
import pickle
import tarfile
import time

import numpy as np
import pytest

from audio_files import flac, noise, sf, write
from dinosr_hf.data import AudioFileError, FolderSource, TarSource, audio
from dinosr_hf.data.opening import open_source, open_stream
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

    monkeypatch.setattr("builtins.open", CountedFile)
    assert len(source.load(0, 800_000, 1_600)) == 1_600
    assert 0 < sum(read) < 200_000 < len(data.getvalue())


def test_the_streams_of_a_member_are_found_once(folder, tmp_path, monkeypatch):
    source, looked = TarSource(tmp_path / "tars"), []
    find = audio.find_streams
    monkeypatch.setattr(audio, "find_streams", lambda file, size: looked.append(size) or find(file, size))
    audio._find_streams_at.cache_clear()
    whole = [source.load(index) for index in range(len(source))]
    for index, samples in enumerate(whole):
        np.testing.assert_allclose(source.load(index, 3_000, 700), samples[3_000:3_700], atol=1e-6)
    assert len(looked) == len(source)


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


def header(name: bytes, size: int | bytes, kind: bytes = b"0") -> bytes:
    """Return the header of a member: its size may be anything, also the twelve bytes that state it."""
    block = bytearray(tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT))
    block[:100], block[156:157] = name.ljust(100, b"\0"), kind
    block[124:136] = size if isinstance(size, bytes) else (size % 256**12 | (size >= 0) << 95).to_bytes(12, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: bytes, data: bytes, kind: bytes = b"0") -> bytes:
    return header(name, len(data), kind) + data + bytes(-len(data) % 512)


def record(key: bytes, value: bytes) -> bytes:
    """Return a record of an extended header, with its length in front."""
    length = len(key) + len(value) + 3
    while len(text := b"%d %s=%s\n" % (length, key, value)) != length:
        length += 1
    return text


def named(*records: bytes) -> bytes:
    return member(b"x", b"".join(records), b"x")


GOOD, END = member(b"a.flac", flac(2_000)), bytes(1024)
LONG_NAME = member(b"", b"b.flac\0", b"L")
SHARED_SIZE = member(b"", record(b"size", b"5"), b"g")
HOSTILE = {
    "negative": (GOOD + header(b"b.flac", -512), "a member claims -512 bytes of the archive's"),
    "back-to-the-first": (GOOD + header(b"b.flac", -512 - len(GOOD)), r"a member claims -\d,\d+ bytes"),
    "negative-octal": (GOOD + header(b"b.flac", b"-0000002000\0"), "a member claims -1,024 bytes"),
    "negative-first": (header(b"b.flac", -512) + GOOD, "at byte 0, a member claims -512 bytes"),
    "negative-folder": (GOOD + header(b"d/", -512, b"5"), "a member claims -512 bytes"),
    "negative-unknown": (GOOD + header(b"d", -512, b"Z"), "a member claims -512 bytes"),
    "negative-name": (GOOD + header(b"", -512, b"L") + GOOD, "read length must be|invalid"),
    "negative-record": (named(record(b"size", b"-512")) + GOOD, "a member claims -512 bytes"),
    "negative-with-a-shared-size": (SHARED_SIZE + header(b"b.flac", -512), "a member claims 5 bytes"),
    "huge": (GOOD + header(b"b.flac", 2**80), "a member claims 1,208,925,819,614,629,174,706,176 bytes"),
    "huge-name": (GOOD + header(b"", 2**62, b"L") + GOOD, "MemoryError"),
    "huge-extended-header": (GOOD + header(b"", 2**80, b"x") + GOOD, "cannot fit 'int'"),
    "gigabyte-name": (header(b"", 2**30, b"L") + GOOD, "empty header"),
    "empty-record": (GOOD + named(b"0 path=b\n") + GOOD, "invalid header"),
    "chained-names": (LONG_NAME * 20_000 + GOOD, "recursion"),
    "chained-records": (named(record(b"path", b"b.flac")) * 20_000 + GOOD, "recursion"),
    "name-of-nothing": (GOOD + LONG_NAME, "end of file header"),
    "sparse": (GOOD + member(b"s.flac", flac(2_000), b"S"), "s.flac is sparse"),
    "sparse-map": (named(record(b"GNU.sparse.map", b"0,1")) + GOOD, "a.flac is sparse"),
    "damaged-in-the-middle": (GOOD + b"x" * 512 + GOOD, "checksum|invalid header"),
    "damaged-after-zeros": (GOOD + bytes(1024) + b"x" * 512 + GOOD, "checksum|invalid header"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_in_less_than_a_second(tmp_path, name):
    data, message = HOSTILE[name]
    path = tmp_path / "hostile.tar"
    path.write_bytes(data + END)
    for opened in (open_source, open_stream):
        start = time.process_time()  # the processor's, whatever else runs beside
        with pytest.raises(ValueError, match=rf"hostile\.tar cannot be read as a tar archive: .*({message})"):
            opened(path)
        assert time.process_time() - start < 1


@pytest.mark.filterwarnings("ignore")
def test_the_parts_of_the_hostile_archives_make_an_archive(tmp_path):
    # negative control: used as they are meant, the same headers are fine
    shared = member(b"", record(b"comment", b"of all"), b"g")
    records = record(b"path", b"long.flac"), record(b"size", b"%d" % len(flac(2_000)))
    sized = named(*records) + header(b"c", 0) + GOOD[512:]
    path = tmp_path / "fine.tar"
    path.write_bytes(shared + LONG_NAME + GOOD + sized + header(b"l.flac", 99_999, b"1") + GOOD + END)
    assert [name for name, _ in TarSource(path).utterances] == [f"fine.tar/{name}.flac" for name in ("b", "long", "a")]


def test_archives_joined_to_one_are_read_whole_but_not_streamed(tmp_path):
    path = tmp_path / "joined.tar"
    path.write_bytes(GOOD + bytes(10_240) + member(b"b.flac", flac(3_000)) + END)
    assert TarSource(path).utterances == [("joined.tar/a.flac", 2_000), ("joined.tar/b.flac", 3_000)]
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=r"joined\.tar .*another archive follows its end.*Download it again, or pack"):
        open_stream(path)


def test_a_stream_of_a_hostile_archive_names_the_fault(tmp_path, monkeypatch):
    # of the Hub, where the archive cannot be checked before
    pytest.importorskip("datasets")
    monkeypatch.setattr("dinosr_hf.data.opening.check_archive", lambda path: None)
    (tmp_path / "first.tar").write_bytes(LONG_NAME * 20_000 + GOOD + END)
    with pytest.raises(ValueError, match=r"first\.tar cannot be read by datasets: .*\. Check that its files"):
        open_stream(tmp_path / "first.tar")
    late = b"".join(member(b"%d.flac" % number, flac(2_000)) for number in range(9))
    (tmp_path / "late.tar").write_bytes(late + LONG_NAME * 20_000 + GOOD + END)
    stream = open_stream(tmp_path / "late.tar", audio_column="flac", window_seconds=0.5)
    with pytest.raises(ValueError, match=r"late\.tar cannot be read by datasets: .*\. Check that its files"):
        list(stream.windows(0))
