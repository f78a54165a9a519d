"""Recordings run through a stand-in for a model in windows: what is joined, kept in memory, and read."""

import errno
import os

import numpy as np
import pytest

from audio_files import noise, sf
from dinosr_hf.data import FileSource, normalize_waveform
from dinosr_hf.inference import windowed
from dinosr_hf.inference.windowed import WindowedInference
from tiny import tiny_config

LENGTHS = {"a": 1_234, "long": 9_871, "b": 2_345}


@pytest.fixture
def source(tmp_path):
    for seed, (name, length) in enumerate(LENGTHS.items()):
        sf.write(tmp_path / f"{name}.wav", noise(length, seed), 16_000, subtype="FLOAT")
    return FileSource([tmp_path / f"{name}.wav" for name in LENGTHS])


def first_samples(config):
    """Return a stand-in for a model, whose rows are the first sample of each frame."""

    def compute(waves):
        hop = config.inputs_to_logits_ratio
        return [wave[: config.num_frames(len(wave)) * hop : hop, None] for wave in waves]

    return compute


def run(source, **options):
    config = tiny_config()
    settings = {"window_seconds": 0.1, "context_seconds": 0.02, "batch_seconds": 0.15, "normalizes": False}
    runner = WindowedInference(config, **{**settings, **options})
    return dict(runner.run(source, first_samples(config)))


@pytest.mark.parametrize("batch_seconds", [0.05, 0.15, 3.0])
def test_rows_are_joined_in_order(source, batch_seconds):
    found = run(source, batch_seconds=batch_seconds)
    hop = tiny_config().inputs_to_logits_ratio
    for index, rows in found.items():
        wave = source.load(index)
        assert len(rows) == tiny_config().num_frames(len(wave))
        np.testing.assert_array_equal(rows[:, 0], wave[: len(rows) * hop : hop])
    assert sorted(found) == [0, 1, 2]


def test_large_rows_are_kept_in_a_file(source, monkeypatch):
    plain = run(source)
    monkeypatch.setattr(windowed, "_MAX_BYTES_IN_MEMORY", 1_000)
    found = run(source)
    assert isinstance(found[1], np.memmap) and not isinstance(plain[1], np.memmap)
    np.testing.assert_array_equal(found[1], plain[1])


def test_a_full_disk_is_said(source, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(windowed, "_MAX_BYTES_IN_MEMORY", 1_000)
    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    with pytest.raises(OSError, match=r"has no space for a temporary file of 0\.0 GB\. Set TMPDIR to a folder"):
        run(source)


def test_a_long_recording_is_measured_in_few_parts(tmp_path, monkeypatch):
    sf.write(tmp_path / "a.wav", noise(40_000, 0), 16_000, subtype="FLOAT")
    source = FileSource([tmp_path / "a.wav"])
    monkeypatch.setattr(windowed, "_PART_SAMPLES", 16_000)
    reads, load = [], source.load
    monkeypatch.setattr(source, "load", lambda index, *part: reads.append(part) or load(index, *part))
    found = run(source, normalizes=True, batch_seconds=0.01)  # as of a model that takes one window at a time
    assert reads[:3] == [(0, 16_000), (16_000, 16_000), (32_000, 8_000)]
    wave, hop = normalize_waveform(load(0)), tiny_config().inputs_to_logits_ratio
    np.testing.assert_allclose(found[0][:, 0], wave[: len(found[0]) * hop : hop], rtol=1e-5, atol=1e-6)


def test_only_the_requested_recordings(source):
    config = tiny_config()
    runner = WindowedInference(config, window_seconds=0.1, context_seconds=0.02)
    assert [index for index, _ in runner.run(source, first_samples(config), indices=[0, 2])] == [2, 0]


def test_an_error_of_the_model_ends_the_run(source):
    def compute(waves):
        raise RuntimeError("out of memory")

    runner = WindowedInference(tiny_config(), window_seconds=0.1, context_seconds=0.02)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(runner.run(source, compute))
