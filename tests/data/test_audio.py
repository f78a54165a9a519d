"""Decode, resample and read parts of files; errors for unusable files."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from dinosr_hf.data import audio
from dinosr_hf.data.audio import AudioFileError, audio_info, load_audio, normalize_waveform, resampled_length

sf = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

# A part and the same slice of the whole: float32 noise of soxr (measured 8e-7), of libmpg123 and libopus (1.2e-7).
PART_ATOL = 1e-6

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "float.wav": ("WAV", "FLOAT"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}


def speechlike(num_frames: int, num_channels: int = 1, seed: int = 0) -> np.ndarray:
    """Return smooth noise with syllables, float32 (num_frames, num_channels) below 0.5."""
    noise = np.random.default_rng(seed).standard_normal((num_frames + 7, num_channels))
    smooth = sum(noise[k : k + num_frames] for k in range(8)) / 8
    syllables = 0.55 + 0.45 * np.sin(np.arange(num_frames) / 2000)
    return (0.2 * syllables[:, None] * np.clip(smooth, -2.5, 2.5)).astype(np.float32)


def encoded(samples: np.ndarray, rate: int, suffix: str = "float.wav", **options) -> bytes:
    buffer = io.BytesIO()
    container, subtype = FORMATS[suffix]
    sf.write(buffer, samples, rate, format=container, subtype=subtype, **options)
    return buffer.getvalue()


def written(path: Path, *arguments, **options) -> Path:
    path.write_bytes(encoded(*arguments, **options))
    return path


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_is_read_from_path_bytes_and_file(tmp_path, suffix):
    samples = speechlike(20_011)
    path = written(tmp_path / f"a.{suffix}", samples, 16_000, suffix)

    info = audio_info(path)
    loaded = load_audio(path)

    assert info == (20_011, 16_000, 1)
    assert loaded.shape == (20_011,)
    assert loaded.dtype == np.float32
    assert np.corrcoef(loaded, samples[:, 0])[0, 1] > (0.9 if suffix in ("ogg", "opus", "mp3") else 0.999999)
    np.testing.assert_array_equal(load_audio(str(path)), loaded)
    np.testing.assert_array_equal(load_audio(path.read_bytes()), loaded)
    with open(path, "rb") as file:
        assert audio_info(file) == info
        np.testing.assert_array_equal(load_audio(file), loaded)


def test_channels_are_averaged():
    samples = speechlike(1000, num_channels=3)
    np.testing.assert_allclose(load_audio(encoded(samples, 16_000)), samples.mean(axis=1), atol=1e-7)
    assert audio_info(encoded(samples, 16_000)).num_channels == 3


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 15_999])
@pytest.mark.parametrize("num_frames", [5, 1_001, 22_049])
def test_header_length_is_the_loaded_length(rate, num_frames):
    data = encoded(speechlike(num_frames), rate)
    assert audio_info(data).num_samples == len(load_audio(data)) == resampled_length(num_frames, rate)


def test_other_target_rate():
    data = encoded(speechlike(16_000), 16_000)
    assert len(load_audio(data, sampling_rate=8_000)) == 8_000
    assert len(load_audio(data, sampling_rate=8_000, start=100, num_samples=77)) == 77


PARTS = [(0, 1), (0, 16_000), (11_111, 5_000), (15_999, 1), (40_000, 7_999), (47_000, None)]


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_part_is_the_exact_slice_at_the_same_rate(suffix):
    data = encoded(speechlike(48_000), 16_000, suffix)
    whole = load_audio(data)
    for start, count in PARTS:
        part = load_audio(data, start=start, num_samples=count)
        np.testing.assert_array_equal(part, whole[start:][:count])


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_part_is_the_slice_after_resampling(rate):
    data = encoded(speechlike(3 * rate + 1), rate)
    whole = load_audio(data)
    for start, count in PARTS:
        part = load_audio(data, start=start, num_samples=count)
        np.testing.assert_allclose(part, whole[start:][:count], rtol=0, atol=PART_ATOL)


def test_resampler_needs_its_margin(monkeypatch):
    data = encoded(speechlike(3 * 44_100), 44_100)
    whole = load_audio(data)
    monkeypatch.setattr(audio, "_RESAMPLER_MARGIN", 2)
    assert np.abs(load_audio(data, start=20_000, num_samples=5_000) - whole[20_000:25_000]).max() > 1e-4


def differences_of_parts(suffix: str, seconds: int) -> float:
    data = encoded(speechlike(16_000 * seconds + 17), 16_000, suffix)
    whole = load_audio(data)
    starts = range(5, len(whole) - 400, len(whole) // 60)
    return max(np.abs(load_audio(data, start=k, num_samples=400) - whole[k : k + 400]).max() for k in starts)


@pytest.mark.parametrize("seconds", [3, 13])
@pytest.mark.parametrize("suffix", ["ogg", "opus", "mp3"])
def test_part_of_a_lossy_file_is_the_slice(suffix, seconds):
    assert differences_of_parts(suffix, seconds) <= PART_ATOL


def test_lossy_decoder_needs_preroll(monkeypatch):
    monkeypatch.setattr(audio, "_PREROLL_SECONDS", {})
    assert differences_of_parts("ogg", 3) > 1e-3


@pytest.mark.parametrize(
    ("suffix", "rate", "most"),
    [("wav", 16_000, 8_000), ("flac", 16_000, 8_000), ("wav", 48_000, 26_000), ("ogg", 16_000, 168_000)],
)
def test_only_the_part_and_its_margins_are_read(tmp_path, monkeypatch, suffix, rate, most):
    path = written(tmp_path / f"long.{suffix}", speechlike(60 * rate), rate, suffix)
    counts = []
    read = sf.SoundFile.read

    def counted_read(self, *arguments, **options):
        frames = read(self, *arguments, **options)
        counts.append(len(frames))
        return frames

    monkeypatch.setattr(sf.SoundFile, "read", counted_read)
    load_audio(path, start=400_000, num_samples=8_000)
    assert 8_000 * rate / 16_000 <= sum(counts) <= most
    counts.clear()
    audio_info(path)
    assert counts == []


def without_length(samples: np.ndarray, bitrate_mode: str) -> bytes:
    """Return an MP3 without its first frame, which has the length but no audio."""
    data = encoded(samples, 16_000, "mp3", bitrate_mode=bitrate_mode, compression_level=0.5)
    size = data.index(data[:2], 4)
    assert any(marker in data[:size] for marker in (b"Xing", b"Info"))
    return data[size:]


LOUD_THEN_SILENT = np.concatenate([np.random.default_rng(0).uniform(-0.9, 0.9, 32_000), np.zeros(320_000)])
ID3V2 = b"ID3\x03\x00\x00\x00\x00\x02\x00" + bytes(256)
ID3V1 = b"TAG" + bytes(125)


@pytest.mark.parametrize(("head", "tail"), [(b"", b""), (ID3V2, b""), (b"", ID3V1), (ID3V2, ID3V1)])
@pytest.mark.parametrize("bitrate_mode", ["CONSTANT", "VARIABLE"])
def test_mp3_without_a_length_is_read_whole(tmp_path, capfd, bitrate_mode, head, tail):
    samples = speechlike(352_000) if bitrate_mode == "CONSTANT" else LOUD_THEN_SILENT
    path = tmp_path / "no_length.mp3"
    path.write_bytes(head + without_length(samples, bitrate_mode) + tail)
    if bitrate_mode == "VARIABLE":
        assert sf.info(path).frames < 60_000  # the decoder would stop here

    num_samples = audio_info(path).num_samples
    whole = load_audio(path)

    assert len(whole) == num_samples
    assert 352_000 <= num_samples <= 352_000 + 5 * 576  # the encoder's delay is not known either
    expected = load_audio(encoded(samples, 16_000, "mp3", bitrate_mode=bitrate_mode, compression_level=0.5))
    for start, count in [(0, 400), (150_000, 7_000), (num_samples - 400, 400)]:
        part = load_audio(path, start=start, num_samples=count)
        np.testing.assert_allclose(part, whole[start:][:count], rtol=0, atol=PART_ATOL)
    assert max(np.correlate(whole[:40_000], expected[2_000:30_000])) > 0.9 * np.sum(expected[2_000:30_000] ** 2)
    with pytest.raises(AudioFileError, match=f"no_length.mp3 has {num_samples:,} samples at 16,000 Hz, but the part"):
        load_audio(path, start=num_samples - 100, num_samples=101)
    assert capfd.readouterr().err == ""


def test_mp3_without_a_length_at_another_rate():
    data = without_length(LOUD_THEN_SILENT, "VARIABLE")
    whole = load_audio(data, sampling_rate=8_000)
    assert len(whole) == resampled_length(audio_info(data).num_samples, 16_000, 8_000)
    for start, count in [(20_000, 500), (len(whole) - 500, 500)]:
        part = load_audio(data, start=start, num_samples=count, sampling_rate=8_000)
        np.testing.assert_allclose(part, whole[start:][:count], rtol=0, atol=PART_ATOL)
    with pytest.raises(AudioFileError, match=f"has {len(whole):,} samples at 8,000 Hz, but the part"):
        load_audio(data, start=len(whole) - 500, num_samples=501, sampling_rate=8_000)


def test_header_without_a_length_is_not_trusted():
    data = encoded(LOUD_THEN_SILENT, 16_000, "mp3", bitrate_mode="VARIABLE", compression_level=0.5)
    position = data.index(b"Xing") + 7
    assert data[position] & 1  # the flag that the number of frames follows
    data = data[:position] + bytes([data[position] & ~1]) + data[position + 1 :]
    assert audio_info(data).num_samples == len(load_audio(data)) >= 352_000


def test_missing_file(tmp_path):
    with pytest.raises(AudioFileError, match=r"gone\.wav is not a file\. Check the path") as caught:
        load_audio(tmp_path / "gone.wav")
    assert caught.value.reason == "missing"


def test_file_without_permission(tmp_path, monkeypatch):
    path = tmp_path / "x.wav"
    path.write_bytes(b"RIFF")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("dinosr_hf.data.audio.open", refuse, raising=False)  # root may read everything
    with pytest.raises(AudioFileError, match=r"x\.wav cannot be read: Permission denied\. Check its permissions"):
        load_audio(path)


def test_file_of_zero_bytes(tmp_path):
    (tmp_path / "none.wav").touch()
    with pytest.raises(AudioFileError, match=r"none\.wav is empty \(0 bytes\)") as caught:
        audio_info(tmp_path / "none.wav")
    assert caught.value.reason == "empty"


def test_file_without_samples(tmp_path):
    path = written(tmp_path / "none.wav", np.zeros(0, np.float32), 16_000)
    for read in (audio_info, load_audio):
        with pytest.raises(AudioFileError, match=r"none\.wav has no samples") as caught:
            read(path)
        assert caught.value.reason == "empty"


def test_file_that_is_not_audio(tmp_path):
    (tmp_path / "notes.wav").write_text("hello" * 100)
    with pytest.raises(AudioFileError, match=r"notes\.wav cannot be read as audio: .*Convert the file") as caught:
        load_audio(tmp_path / "notes.wav")
    assert caught.value.reason == "unreadable"


@pytest.mark.parametrize("suffix", ["flac", "mp3"])
def test_truncated_file(tmp_path, suffix):
    data = encoded(speechlike(160_000), 16_000, suffix)
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(data[: len(data) // 2])
    assert audio_info(path).num_samples == 160_000  # as its header promises
    with pytest.raises(AudioFileError, match=rf"cut\.{suffix} is truncated or damaged") as caught:
        load_audio(path)
    assert caught.value.reason == "truncated"
    with pytest.raises(AudioFileError, match="truncated or damaged"):
        load_audio(path, start=140_000, num_samples=1_000)


def test_part_past_the_end(tmp_path):
    path = written(tmp_path / "short.wav", speechlike(8_000), 16_000)
    with pytest.raises(
        AudioFileError, match=r"has 8,000 samples at 16,000 Hz, but the part from 7,000 to 9,000"
    ) as caught:
        load_audio(path, start=7_000, num_samples=2_000)
    assert caught.value.reason == "truncated"


def test_nonfinite_samples(tmp_path):
    samples = speechlike(8_000)
    samples[5_000] = np.nan
    path = written(tmp_path / "nan.wav", samples, 16_000)
    with pytest.raises(AudioFileError, match=r"nan\.wav has samples that are NaN or infinite") as caught:
        load_audio(path)
    assert caught.value.reason == "not finite"
    assert len(load_audio(path, num_samples=4_000)) == 4_000


@pytest.mark.parametrize(("start", "num_samples"), [(-1, 5), (0, 0)])
def test_part_out_of_range(start, num_samples):
    with pytest.raises(ValueError, match=f"start={start} and num_samples={num_samples} must be at least"):
        load_audio(encoded(speechlike(100), 16_000), start=start, num_samples=num_samples)


def test_error_is_picklable():
    error = pickle.loads(pickle.dumps(AudioFileError("a.wav is empty.", "empty")))
    assert (str(error), error.reason) == ("a.wav is empty.", "empty")
    assert AudioFileError("only a message").reason == "unreadable"  # torch rebuilds it so


class SlowFile(io.BytesIO):
    """A file that signals its first read, and then delays it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.is_being_read = threading.Event()

    def readinto(self, buffer):
        if not self.is_being_read.is_set():
            self.is_being_read.set()
            threading.Event().wait(0.5)
        return super().readinto(buffer)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_fork_while_a_file_is_being_opened():
    data = encoded(speechlike(1_000), 16_000)
    slow = SlowFile(data)
    reader = threading.Thread(target=audio_info, args=(slow,))
    reader.start()
    assert slow.is_being_read.wait(30)
    child = multiprocessing.get_context("fork").Process(target=load_audio, args=(data,))
    child.start()
    child.join(10)
    exit_code = child.exitcode
    child.kill()
    reader.join()
    assert exit_code == 0


def test_normalisation_is_layer_norm():
    waveform = speechlike(5_000)[:, 0] + 0.3
    expected = torch.nn.functional.layer_norm(torch.from_numpy(waveform), (5_000,), eps=1e-5)
    np.testing.assert_allclose(normalize_waveform(waveform), expected, atol=1e-5)
    assert normalize_waveform(waveform).dtype == np.float32
    np.testing.assert_array_equal(normalize_waveform(np.full(10, 0.5, np.float32)), np.zeros(10))


@pytest.mark.parametrize(("module", "rate"), [("soundfile", 16_000), ("soxr", 8_000)])
def test_missing_package_is_named_with_its_extra(monkeypatch, module, rate):
    data = encoded(speechlike(1_000), rate)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'needs {module}: pip install "dinosr-hf\[train\]"'):
        load_audio(data)
