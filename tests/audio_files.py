"""Recordings for tests, as files and as datasets."""

from __future__ import annotations

import io

import numpy as np
import pytest

sf = pytest.importorskip("soundfile")
datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")

# A part of a resampled recording, as in test_audio.py.
PART_ATOL = 1e-6

KINDS = ["audio bytes", "audio paths", "bytes", "paths", "arrays"]


def noise(num_frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, num_frames).astype(np.float32)


def write(path, num_frames: int, rate: int = 16_000, num_channels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, np.repeat(noise(num_frames)[:, None], num_channels, 1), rate)


def flac(num_frames: int, rate: int = 16_000) -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, noise(num_frames), rate, format="FLAC")
    return buffer.getvalue()


def manifest(tmp_path, *rows, root=None):
    path = tmp_path / "train.tsv"
    path.write_text("\n".join([str(root or tmp_path), *(f"{name}\t{frames}" for name, frames in rows), ""]))
    return path


def dataset_of(kind: str, tmp_path):
    """Return three recordings of 1,600, 2,400 (at 8 kHz) and 3,000 samples, as one kind of column."""
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


def small_corpus(root):
    """Make a folder of five audio files of several kinds, and one file that is not audio."""
    write(root / "b.wav", 8_000)
    write(root / "a" / "z.FLAC", 4_000, num_channels=2)
    write(root / "a" / "deep" / "er" / "x.mp3", 11_025, rate=22_050)
    write(root / "a" / "m.ogg", 5_000)
    write(root / "0.flac", 8_000, rate=8_000)
    (root / "a" / "notes.txt").write_text("no audio")
    return root
