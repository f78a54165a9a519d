"""Scans of folders: all damage is found and counted, and the manifest equals the folder."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from dinosr_hf import DinoSRConfig
from dinosr_hf.data import FolderSource, min_maskable_samples, open_source
from dinosr_hf.data.scan import MIN_SECONDS, scan_folder, write_manifest
from scripts import load_command

soundfile = pytest.importorskip("soundfile")


def noise(num_samples: int, seed: int = 0, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, (num_samples, channels)).astype(np.float32)


def truncate(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.fixture
def folder(tmp_path):
    """Make usable recordings of several kinds."""
    root = tmp_path / "speech"
    (root / "sub").mkdir(parents=True)
    soundfile.write(root / "a.wav", noise(16_000), 16_000)
    soundfile.write(root / "b.flac", noise(48_001, channels=2), 44_100)
    soundfile.write(root / "sub" / "c.ogg", noise(20_000), 16_000, format="OGG", subtype="VORBIS")
    soundfile.write(root / "sub" / "d, e.mp3", noise(24_000), 16_000, format="MP3")
    soundfile.write(os.fsencode(root / "ü\udcff.wav"), noise(9_000), 8_000, subtype="FLOAT", format="WAV")
    return root


def damage(root: Path) -> dict[str, str]:
    """Add unusable files; return their reasons by name."""
    soundfile.write(root / "short.wav", noise(3_360), 16_000)
    soundfile.write(root / "shorter.wav", noise(3_000), 16_000)
    soundfile.write(root / "none.wav", noise(0), 16_000)
    (root / "nothing.mp3").write_bytes(b"")
    (root / "text.flac").write_text("not audio")
    soundfile.write(root / "zeros.flac", np.zeros(16_000), 16_000)
    soundfile.write(root / "level.wav", np.full(16_000, 0.25), 16_000)
    soundfile.write(root / "opposite.wav", noise(16_000) * [1, -1], 16_000, subtype="FLOAT")
    for name, value in (("nan", np.nan), ("infinite", np.inf)):
        samples = noise(16_000)
        samples[-1] = value
        soundfile.write(root / f"{name}.wav", samples, 16_000, subtype="FLOAT")
    # Silence with something at its end is no silence.
    soundfile.write(root / "late.flac", np.concatenate([np.zeros((60_000, 1)), noise(10)]), 16_000)
    soundfile.write(root / "sub" / ".hidden.wav", noise(16_000), 16_000)
    soundfile.write(root / "cut.flac", noise(100_000), 16_000)
    truncate(root / "cut.flac", 0.5)
    return {
        "shorter.wav": "too short",
        "none.wav": "empty",
        "nothing.mp3": "empty",
        "text.flac": "unreadable",
        "zeros.flac": "silent",
        "level.wav": "silent",
        "opposite.wav": "silent",
        "nan.wav": "not finite",
        "infinite.wav": "not finite",
        "sub/.hidden.wav": "hidden",
    }


@pytest.mark.parametrize("decode", [False, True], ids=["headers", "decode"])
def test_unusable_files_are_found_and_counted(folder, decode):
    good = {file.name for file in scan_folder(folder).usable}
    bad = damage(folder) | ({"cut.flac": "truncated"} if decode else {})
    scan = scan_folder(folder, decode=decode)

    assert {file.name: file.reason for file in scan.left_out} == bad
    assert {file.name for file in scan.usable} == good | {"short.wav", "late.flac"} | ({"cut.flac"} - set(bad))
    assert all(file.message for file in scan.left_out)
    assert not any(file.reason or file.message for file in scan.usable)
    report = str(scan)
    assert f"left out: {len(bad)} files" in report
    assert "2 not finite, such as infinite.wav" in report
    assert "3 silent, such as level.wav" in report


def test_files_are_measured(folder):
    scan = scan_folder(folder)
    assert scan.left_out == []
    files = {file.name: file[1:5] for file in scan.usable}
    assert files == {
        "a.wav": (16_000, 16_000, 1, "WAV PCM_16"),
        "b.flac": (48_001, 44_100, 2, "FLAC PCM_16"),
        "sub/c.ogg": (20_000, 16_000, 1, "OGG VORBIS"),
        "sub/d, e.mp3": (24_000, 16_000, 1, "MP3 MPEG_LAYER_III"),
        "ü\udcff.wav": (9_000, 8_000, 1, "WAV FLOAT"),
    }
    report = str(scan)
    hours = (1 + 48_001 / 44_100 + 1.25 + 1.5 + 1.125) / 3600
    assert f"5 usable files, {hours:.2f} h" in report
    assert "seconds    1.00 to 1.50, mean 1.19, median 1.12" in report
    assert "16,000 Hz: 3, 44,100 Hz: 1, 8,000 Hz: 1" in report
    assert "channels   1: 4, 2: 1" in report
    report.encode()


def test_only_beginnings_are_read(folder, monkeypatch):
    read = []
    plain = soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda self, count, **kw: read.append(count) or plain(self, count, **kw)
    )
    scan_folder(folder)
    # A tenth of a second of each, but all of the file that could have NaN.
    assert sorted(read) == sorted([1_600, 4_410, 1_600, 1_600, 800, 8_200])


def test_shortest_file_holds_a_masked_span():
    assert math.ceil(min_maskable_samples(DinoSRConfig()) / 160) / 100 == MIN_SECONDS


def test_min_seconds(folder):
    assert {file.name for file in scan_folder(folder, min_seconds=1.2).usable} == {"sub/c.ogg", "sub/d, e.mp3"}
    assert scan_folder(folder, min_seconds=1.25).usable[0].name == "sub/c.ogg"
    with pytest.raises(ValueError, match=r"min_seconds=-1 is out of range: it must be at least 0"):
        scan_folder(folder, min_seconds=-1)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
@pytest.mark.parametrize("place", ["inside", "above", "elsewhere"])
def test_manifest_equals_the_folder(folder, tmp_path, suffix, place):
    if suffix == ".tsv":
        (folder / "b.flac").unlink()
        (folder / "ü\udcff.wav").unlink()
    soundfile.write(folder / "zeros.wav", np.zeros(16_000), 16_000)
    where = {"inside": folder, "above": tmp_path, "elsewhere": tmp_path / "lists"}[place]
    manifest, left_out = write_manifest(scan_folder(folder), where / f"train{suffix}")
    assert sorted(p.name for p in where.iterdir() if p.name.startswith(("train", "."))) == sorted(
        [manifest.name, left_out.name]
    )
    if place != "elsewhere":  # both can be moved
        moved = tmp_path / "moved"
        moved.mkdir()
        shutil.copytree(folder, moved / folder.name)
        if place == "above":
            shutil.move(manifest, moved)
        shutil.rmtree(folder)
        folder = moved / folder.name
        manifest = folder / manifest.name if place == "inside" else moved / manifest.name
    by_manifest = open_source(manifest)
    (folder / "zeros.wav").unlink()
    by_folder = FolderSource(folder)
    assert by_manifest.utterances == by_folder.utterances
    for index in range(len(by_folder)):
        np.testing.assert_array_equal(by_manifest.load(index, 100, 2_000), by_folder.load(index, 100, 2_000))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_names_may_begin_and_end_with_spaces(tmp_path, suffix):
    names = {" a.wav", '"b".wav', "c, d.wav ", "  e/ f.wav"} - ({"c, d.wav "} if suffix == ".tsv" else set())
    for name in names:
        path = tmp_path / "speech" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.linspace(-0.5, 0.5, 8_000), 16_000, format="WAV")
    scan = scan_folder(tmp_path / "speech")
    manifest, *_ = write_manifest(scan, tmp_path / f"list{suffix}")
    assert len(open_source(manifest)) == len(scan.usable)
    assert {file.name for file in scan.usable} >= {" a.wav", "  e/ f.wav"}


def test_list_of_files_left_out(folder, tmp_path):
    bad = damage(folder)
    _, left_out = write_manifest(scan_folder(folder), tmp_path / "train.jsonl")
    assert left_out.name == "train.left_out.csv"
    with open(left_out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["name"]: row["reason"] for row in rows} == bad
    assert "0.188 s" in next(row["message"] for row in rows if row["name"] == "shorter.wav")

    for name in bad:
        (folder / name).unlink()
    assert write_manifest(scan_folder(folder), tmp_path / "train.jsonl", overwrite=True) == [tmp_path / "train.jsonl"]
    assert not left_out.exists()


def test_lines_of_a_manifest(folder, tmp_path):
    manifest, *_ = write_manifest(scan_folder(folder), tmp_path / "train.jsonl")
    rows = [json.loads(line) for line in manifest.read_text(encoding="ascii").splitlines()]
    assert rows[1] == {
        "path": "speech/b.flac",
        "id": "b.flac",
        "num_frames": 48_001,
        "sampling_rate": 44_100,
        "num_channels": 2,
        "format": "FLAC PCM_16",
        "duration": 1.088458,
    }


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_long_recordings_are_cut_into_equal_parts(folder, tmp_path, suffix):
    manifest, *_ = write_manifest(scan_folder(folder), tmp_path / f"parts{suffix}", cut_seconds=0.5)
    parts, whole = open_source(manifest), FolderSource(folder)
    by_recording = {utterance.id: [] for utterance in whole.utterances}
    for index, utterance in enumerate(parts.utterances):
        by_recording[utterance.id.partition("@")[0]].append(parts.load(index))
    for index, utterance in enumerate(whole.utterances):
        own, samples = by_recording[utterance.id], whole.load(index)
        assert len(own) == math.ceil(len(samples) / 8_000)
        lengths = [len(part) for part in own]
        assert max(lengths) <= 8_001 and max(lengths) - min(lengths) <= 2
        np.testing.assert_allclose(np.concatenate(own), samples[: sum(lengths)], atol=1e-4)
        assert len(samples) - sum(lengths) <= 1
    assert [u.id for u in parts.utterances if u.id.startswith("sub/c")] == [
        "sub/c.ogg@0",
        "sub/c.ogg@0.416625",
        "sub/c.ogg@0.833313",
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_whole_seconds_are_not_taken_for_rounded(tmp_path, suffix):
    (tmp_path / "speech").mkdir()
    soundfile.write(tmp_path / "speech" / "a.wav", noise(96_000), 16_000)
    manifest, *_ = write_manifest(scan_folder(tmp_path / "speech"), tmp_path / f"parts{suffix}", cut_seconds=2.0)
    assert [utterance.num_samples for utterance in open_source(manifest).utterances] == [32_000] * 3


def test_recordings_that_are_not_longer_stay_whole(folder, tmp_path):
    scan = scan_folder(folder)
    whole, *_ = write_manifest(scan, tmp_path / "whole.csv")
    parts, *_ = write_manifest(scan, tmp_path / "parts.csv", cut_seconds=1.5)
    assert parts.read_bytes() == whole.read_bytes()
    with pytest.raises(ValueError, match=r"cut_seconds=0\.4 is out of range: it must be at least 0\.42"):
        write_manifest(scan, tmp_path / "other.csv", cut_seconds=0.4)
    with pytest.raises(ValueError, match=r"a \.tsv cannot hold parts of recordings\. Write \.jsonl or \.csv"):
        write_manifest(scan, tmp_path / "other.tsv", cut_seconds=1.0)


def test_manifest_is_not_overwritten(folder, tmp_path):
    scan = scan_folder(folder)
    (manifest,) = write_manifest(scan, tmp_path / "train.csv")
    before = manifest.read_bytes()
    with pytest.raises(ValueError, match=r"train\.csv exists\. Give another name, or overwrite to replace it"):
        write_manifest(scan._replace(usable=scan.usable[:1]), manifest)
    assert manifest.read_bytes() == before
    write_manifest(scan._replace(usable=scan.usable[:1]), manifest, overwrite=True)
    assert len(manifest.read_bytes().splitlines()) == 2


def test_manifest_that_cannot_be_written_leaves_the_old_one(folder, tmp_path):
    manifest = tmp_path / "train.tsv"
    manifest.write_text("old")
    with pytest.raises(ValueError, match=r"different rates \(16,000 Hz: 3, 44,100 Hz: 1, .*Write .jsonl or .csv"):
        write_manifest(scan_folder(folder), manifest, overwrite=True)
    assert manifest.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["train.tsv"]


def test_file_name_that_a_tsv_cannot_hold(tmp_path):
    (tmp_path / "speech").mkdir()
    soundfile.write(tmp_path / "speech" / "a\tb.wav", noise(16_000), 16_000)
    scan = scan_folder(tmp_path / "speech")
    with pytest.raises(ValueError, match=r"'a\\tb.wav' has a tab, which a .tsv cannot hold"):
        write_manifest(scan, tmp_path / "train.tsv")
    manifest, *_ = write_manifest(scan, tmp_path / "train.csv")
    assert [utterance.id for utterance in open_source(manifest).utterances] == ["a\\tb.wav"]


def test_nothing_to_scan_or_to_write(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not a folder\. Give a folder that has audio files"):
        scan_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no audio files in it or below it\. Looked for \.wav, \.flac"):
        scan_folder(tmp_path)
    soundfile.write(tmp_path / "zeros.wav", np.zeros(16_000), 16_000)
    scan = scan_folder(tmp_path)
    with pytest.raises(ValueError, match=re.compile("There is nothing to write.*1 silent, such as zeros.wav", re.S)):
        write_manifest(scan, tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match=r"train\.txt must end in \.jsonl, \.csv or \.tsv\."):
        write_manifest(scan, tmp_path / "train.txt")


@pytest.fixture
def make_manifest():
    return load_command("make_manifest").main


def test_command(folder, tmp_path, make_manifest, capsys):
    soundfile.write(folder / "cut.flac", noise(100_000), 16_000)
    truncate(folder / "cut.flac", 0.5)
    manifest = tmp_path / "train.jsonl"
    make_manifest([str(folder), str(manifest), "--decode", "--min_seconds", "1.05"])
    printed = capsys.readouterr().out
    assert "4 usable files" in printed
    assert "1 truncated, such as cut.flac" in printed
    assert "1 too short, such as a.wav" in printed
    assert "6 files in " in printed
    assert printed.endswith(f"Written: {manifest} {tmp_path / 'train.left_out.csv'}\n")
    assert len(open_source(manifest)) == 4

    with pytest.raises(SystemExit, match=r"make_manifest.py: .*train.jsonl exists"):
        make_manifest([str(folder), str(manifest)])
    with pytest.raises(SystemExit, match=r"^make_manifest.py: m.xyz must end in \.jsonl, \.csv or \.tsv\.$"):
        make_manifest([str(folder), "m.xyz"])
    assert capsys.readouterr().out == ""  # refused before the scan
    make_manifest([str(folder), str(manifest), "--overwrite"])
    assert len(open_source(manifest)) == 6
    make_manifest([str(folder), str(manifest), "--overwrite", "--cut_seconds", "1.5"])
    assert len(open_source(manifest)) == 10  # five of cut.flac
    with pytest.raises(
        SystemExit, match=r"cut_seconds=6\.0 is out of range: it must be at least 8, twice min_seconds"
    ):
        make_manifest([str(folder), str(manifest), "--overwrite", "--cut_seconds", "6", "--min_seconds", "4"])


def test_decoder_prints_nothing(folder, capfd):
    """libmpg123 prints to stderr if it has to seek."""
    soundfile.write(folder / "long.mp3", np.concatenate([np.zeros((30_000, 1)), noise(200_000)]), 16_000, format="MP3")
    scan_folder(folder, decode=True)
    assert capfd.readouterr().err == ""
