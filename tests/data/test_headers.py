"""Files whose headers lie, and files joined to one: all is read, or refused or warned about by name."""

from __future__ import annotations

import io
import struct
import tarfile
import time

import numpy as np
import pytest

from audio_files import datasets, noise, pa, sf
from dinosr_hf.data import FolderSource, open_source
from dinosr_hf.data.audio import AudioFileError, Samples, audio_info, load_audio
from dinosr_hf.data.scan import scan_folder
from dinosr_hf.data.sources import DatasetSource

pytest.importorskip("soxr")

LENGTH = 48_000


def encoded(kind: str, subtype: str | None = None, *, seed: int = 0, rate: int = 16_000, channels: int = 1) -> bytes:
    buffer = io.BytesIO()
    samples = np.repeat(noise(LENGTH, seed)[:, None], channels, 1)
    sf.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def patched(data: bytes, position: int, new: bytes) -> bytes:
    return data[:position] + new + data[position + len(new) :]


def wav(num_bytes: int, data: bytes | None = None) -> bytes:
    """Return a WAV that states so many bytes of samples."""
    data = encoded("WAV") if data is None else data
    return patched(data, data.index(b"data") + 4, struct.pack("<I", num_bytes))


def au(num_bytes: int) -> bytes:
    return patched(encoded("AU", "PCM_16"), 8, struct.pack(">I", num_bytes))


def flac(num_frames: int | None = None, rate: int | None = None) -> bytes:
    """Return a FLAC whose header states another number of frames or rate."""
    data = encoded("FLAC")
    fields = int.from_bytes(data[18:26], "big")  # rate: 20 bits, channels and bits: 8, frames: 36
    if num_frames is not None:
        fields = fields >> 36 << 36 | num_frames
    if rate is not None:
        fields = fields & (1 << 44) - 1 | rate << 44
    return patched(data, 18, fields.to_bytes(8, "big"))


def mp3(num_frames: int | None = None, *, info: bool = True, seed: int = 0, **options) -> bytes:
    """Return an MP3 whose first frame states another number of frames, or without that frame."""
    data = encoded("MP3", seed=seed, **options)
    start = max(data.find(b"Info"), data.find(b"Xing"))
    if num_frames is not None:
        data = patched(data, start + 8, struct.pack(">I", num_frames))
    return data if info else data[data.index(data[:2], 4) :]


def mp3_in_wav() -> bytes:
    data = mp3(info=False)
    layout = struct.pack("<HHIIHHHHIHHH", 0x55, 1, 16_000, 4_000, 1, 0, 12, 1, 2, 144, 1, 0)
    body = b"fmt " + struct.pack("<I", len(layout)) + layout + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def chunked(kind: str, name: bytes, layout: str, num_bytes: int) -> bytes:
    """Return a file of chunks, of which the one with the samples states so many bytes."""
    data = encoded(kind, "PCM_16")
    return patched(data, data.index(name) + 4, struct.pack(layout, num_bytes))


def rf64(num_bytes: int) -> bytes:
    data = encoded("RF64", "PCM_16")
    return patched(data, data.index(b"ds64") + 16, struct.pack("<Q", num_bytes))


def ogg_pages(data: bytes) -> list[bytes]:
    return [b"OggS" + page for page in data.split(b"OggS")[1:]]


def vorbis_of_time(time: int) -> bytes:
    """Return an Ogg whose last page states another time."""
    *pages, last = ogg_pages(encoded("OGG", "VORBIS"))
    return b"".join([*pages, patched(last, 6, struct.pack("<q", time))])


def two_at_once() -> bytes:
    """Return an Ogg with two recordings, page by page."""
    both = zip(*(ogg_pages(encoded("OGG", "VORBIS", seed=seed)) for seed in (0, 1)), strict=False)
    return b"".join(page for pair in both for page in pair)


def variable_mp3(num_frames: int | None = None) -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, noise(LENGTH), 16_000, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    data = buffer.getvalue()
    return data if num_frames is None else patched(data, data.index(b"Xing") + 8, struct.pack(">I", num_frames))


def cut_out(data: bytes, num_bytes: int) -> bytes:
    return data[: len(data) // 2] + data[len(data) // 2 + num_bytes :]


def put_in(data: bytes, middle: bytes) -> bytes:
    return data[: len(data) // 2] + middle + data[len(data) // 2 :]


ID3 = b"ID3\x03\x00\x00\x00\x00\x02\x00" + bytes(256)
JUNK = np.random.default_rng(1).bytes(3_000)


def close_to(length: int) -> list[int]:
    """Return lengths of an MP3 without its encoder's delay in the header."""
    return list(range(length, length + 6 * 576))


OTHER = {"VORBIS": ("OGG", "VORBIS"), "OPUS": ("OGG", "OPUS")}

# Name: bytes of the file, the lengths it may have, and a part of the warning, if there is one.
READ = {
    "FLAC of no frames": (lambda: flac(0), [LENGTH], ""),
    "FLAC of 2^36 - 1 frames": (lambda: flac(2**36 - 1), [LENGTH], "promises 68,719,476,735 frames, but 48,000"),
    "WAV of no bytes": (lambda: wav(0), [LENGTH], "promises 0 bytes of samples, but 96,000 are there"),
    "WAV of half": (lambda: wav(LENGTH), [LENGTH], "promises 48,000 bytes of samples, but 96,000 are there"),
    "WAV of unknown length": (lambda: wav(2**32 - 1), [LENGTH], ""),
    "WAV of twice as much": (lambda: wav(4 * LENGTH), [LENGTH], "promises 192,000 bytes, but 96,000 are there and"),
    "WAV of three bytes more": (lambda: wav(2 * LENGTH + 3), [LENGTH], ""),
    "WAV after a tag": (lambda: ID3 + encoded("WAV"), [LENGTH], ""),
    "WAV of zeros in front of the samples": (
        lambda: put_in(encoded("WAV"), b"").replace(
            b"data", b"JUNK" + struct.pack("<I", 5_000) + bytes(5_000) + b"data"
        ),
        [LENGTH],
        "",
    ),
    "WAV with a chunk behind": (lambda: encoded("WAV") + b"LIST\4\0\0\0INFO" + b"bext\2\0\0\0ab", [LENGTH], ""),
    "WAV with padding": (lambda: encoded("WAV") + bytes(5_000), [LENGTH], ""),
    "WAV with a tag": (lambda: encoded("WAV") + ID3, [LENGTH], ""),
    "two WAVs": (lambda: encoded("WAV") + encoded("WAV"), [2 * LENGTH], "2 files joined to one"),
    "AU of no bytes": (lambda: au(0), [LENGTH], "promises 0 bytes"),
    "AU of half": (lambda: au(LENGTH), [LENGTH], "promises 48,000 bytes"),
    "two AUs": (lambda: encoded("AU", "PCM_16") * 2, [2 * LENGTH], "2 files joined to one"),
    "AU of 2^31 - 1 bytes": (lambda: au(2**31 - 1), [LENGTH], ""),
    "AU of twice as much": (lambda: au(4 * LENGTH), [LENGTH], "promises 192,000 bytes, but 96,000 are there and read"),
    "AIFF of no bytes": (
        lambda: chunked("AIFF", b"SSND", ">I", 8),
        [LENGTH],
        "promises 8 bytes of samples, but 96,008",
    ),
    "AIFF of half": (lambda: chunked("AIFF", b"SSND", ">I", LENGTH), [LENGTH], "promises 48,000 bytes of samples"),
    "AIFF cut off": (lambda: encoded("AIFF")[:-LENGTH], [LENGTH // 2], "promises 96,008 bytes, but 48,008 are there"),
    "two AIFFs": (lambda: encoded("AIFF") * 2, [2 * LENGTH], "2 files joined to one"),
    "CAF of unknown length": (lambda: chunked("CAF", b"data", ">q", -1), [LENGTH], ""),
    "CAF of no bytes": (lambda: chunked("CAF", b"data", ">q", 4), [LENGTH], "promises 4 bytes of samples, but 96,004"),
    "CAF cut off": (lambda: encoded("CAF", "PCM_16")[:-LENGTH], [LENGTH // 2], "96,004 bytes, but 48,004 are there"),
    "RF64 of no bytes": (lambda: rf64(0), [LENGTH], "promises 0 bytes of samples, but 96,000 are there and read"),
    "RF64 of half": (
        lambda: rf64(LENGTH),
        [LENGTH],
        "promises 48,000 bytes of samples, but 96,000 are there and read",
    ),
    "RF64 of 2^64 - 1 bytes": (lambda: rf64(2**64 - 1), [LENGTH], ""),
    "W64 cut off": (lambda: encoded("W64", "PCM_16")[:-LENGTH], [LENGTH // 2], "promises 96,104 bytes, but 48,104"),
    "SPHERE cut off": (
        lambda: encoded("NIST", "PCM_16")[:-LENGTH],
        [LENGTH // 2],
        "promises 97,024 bytes, but 49,024",
    ),
    "Vorbis cut off": (
        lambda: encoded("OGG", "VORBIS")[:-100],
        range(30_000, LENGTH),
        "has no last page. The pages that exist",
    ),
    "Vorbis after a tag": (lambda: ID3 + encoded("OGG", "VORBIS"), [LENGTH], ""),
    "chained Opus, the first cut off": (
        lambda: encoded("OGG", "OPUS")[:-100] + encoded("OGG", "OPUS"),
        range(LENGTH, 2 * LENGTH - 100),
        "its stream, or one of them, has no last page",
    ),
    "two Vorbis streams at once": (two_at_once, range(30_000, LENGTH + 1), "2 recordings at the same time"),
    "MP3 of 2^31 frames": (lambda: mp3(2**31), close_to(LENGTH), ""),
    "MP3 of variable bit rate": (variable_mp3, [LENGTH], ""),
    "MP3 of variable bit rate, of some frames too few": (lambda: variable_mp3(80), close_to(LENGTH), ""),
    "MP3 without Info, cut off": (
        lambda: mp3(info=False)[:-50],
        close_to(LENGTH - 576),
        "its last frame is not complete",
    ),
    "MP3 of one frame": (lambda: mp3(1), close_to(LENGTH), ""),
    "MP3 with a tag, without Info": (lambda: ID3 + mp3(info=False), close_to(LENGTH), ""),
    "MP3 with junk": (lambda: put_in(mp3(), JUNK), [LENGTH], "3,000 bytes between its frames"),
    "MP3 with zeros": (lambda: ID3 + put_in(mp3(info=False), bytes(70_000)), close_to(LENGTH), "70,000 bytes between"),
    "MP3 with a gap": (
        lambda: ID3 + cut_out(mp3(info=False), 700),
        range(LENGTH - 6 * 576, LENGTH),
        "bytes between its frames are damaged",
    ),
    "two MP3s": (lambda: mp3() + mp3(seed=1), close_to(2 * LENGTH), ""),
    "two MP3s with tags": (lambda: ID3 + mp3() + ID3 + mp3(seed=1), close_to(2 * LENGTH), ""),
    "two MP3s, the second without Info": (lambda: mp3() + mp3(info=False), close_to(2 * LENGTH), ""),
    "MP3 after padding": (lambda: bytes(500) + mp3(), [LENGTH], ""),
    "MP3 in a WAV": (mp3_in_wav, close_to(LENGTH), ""),
    **{
        f"chained {name}": (lambda kind=kind: encoded(*kind) + encoded(*kind, seed=1), [2 * LENGTH], "")
        for name, kind in OTHER.items()
    },
    **{
        f"chained {name} of one and two channels": (
            lambda kind=kind: encoded(*kind) + encoded(*kind, channels=2),
            [2 * LENGTH],
            "",
        )
        for name, kind in OTHER.items()
    },
    "Vorbis and Opus": (lambda: encoded(*OTHER["VORBIS"]) + encoded(*OTHER["OPUS"]), [2 * LENGTH], ""),
}


@pytest.mark.parametrize("name", READ)
def test_all_of_it_is_read(tmp_path, caplog, name):
    make, lengths, warning = READ[name]
    data = make()
    path = tmp_path / f"{name}.bin"
    path.write_bytes(data)

    whole = load_audio(path)

    assert len(whole) == audio_info(path).num_samples
    assert len(whole) in lengths
    assert (warning in caplog.text and f"{path}: " in caplog.text) if warning else not caplog.text
    np.testing.assert_array_equal(load_audio(data), whole)
    np.testing.assert_array_equal(load_audio(io.BytesIO(data)), whole)
    for start in (len(whole) - 900, len(whole) // 2 - 400, 7):  # not in their order
        part = load_audio(path, start=start, num_samples=900)
        np.testing.assert_allclose(part, whole[start : start + 900], rtol=0, atol=1e-6)
    with pytest.raises(AudioFileError, match=r"\.bin has .* samples at 16,000 Hz, but the part"):
        load_audio(path, start=len(whole) - 5, num_samples=6)


@pytest.mark.parametrize("kind", ["VORBIS", "OPUS"])
def test_joined_streams_are_their_parts(kind):
    first, second = (encoded(*OTHER[kind], seed=seed) for seed in (0, 1))
    parts = np.concatenate([load_audio(first), load_audio(second)])
    np.testing.assert_array_equal(load_audio(first + second), parts)
    assert np.abs(parts[:LENGTH] - parts[LENGTH:]).max() > 0.1


def test_joined_wavs_are_their_parts():
    parts = np.concatenate([load_audio(encoded("WAV")), load_audio(encoded("WAV", seed=1, channels=2))])
    np.testing.assert_array_equal(load_audio(encoded("WAV") + encoded("WAV", seed=1, channels=2)), parts)


def test_damaged_mp3_is_the_whole_one_without_the_damage():
    # Decoders need a frame or two to recover where bytes are missing, none where there are too many.
    np.testing.assert_allclose(load_audio(put_in(mp3(), JUNK))[:20_000], load_audio(mp3())[:20_000], atol=1e-6)
    tail = load_audio(cut_out(mp3(info=False), 700))[-10_000:]
    np.testing.assert_allclose(tail, load_audio(mp3(info=False))[-10_000:], atol=1e-3)


def mp2(bit_rate, num_frames=200):
    """Frames of silence of MPEG layer II, 1,152 samples each."""
    index = (32, 48, 56, 64, 80, 96, 112, 128, 160, 192).index(bit_rate) + 1
    header = bytes([0xFF, 0xFD, index << 4 | 1 << 2, 0xC0])  # 48 kHz, mono
    return header.ljust(bit_rate * 3, b"\0") * num_frames


def test_layer_ii_is_read_whole():
    for data in (mp2(192, 400), mp2(64) + mp2(192)):
        assert audio_info(data).num_samples == len(load_audio(data)) == 400 * 1152 // 3


REFUSED = {
    "rate 1": (lambda: flac(rate=1), "its sampling rate is 1 Hz, which must be from 1,000 to 768,000"),
    "rate 2^31": (lambda: patched(encoded("WAV"), 24, struct.pack("<I", 2**31 - 1)), "its sampling rate is 2,147,483"),
    "chained Vorbis of two rates": (
        lambda: encoded(*OTHER["VORBIS"]) + encoded(*OTHER["VORBIS"], rate=8_000),
        "it is 2 files joined to one, with rates of 8,000, 16,000 Hz. Convert it",
    ),
    "chained Opus of two rates": (
        lambda: encoded(*OTHER["OPUS"]) + encoded(*OTHER["OPUS"], rate=8_000),
        "it is 2 files joined to one, with rates of 8,000, 16,000 Hz. Convert it",
    ),
    "two MP3s of two rates": (lambda: mp3() + mp3(rate=24_000), "its parts have different sampling rates"),
    "two MP3s of one and two channels": (lambda: mp3() + mp3(channels=2), "numbers of channels or layers. Convert"),
    "MPEG layer II whose bit rate falls": (lambda: mp2(192) + mp2(64), "its bit rate falls, and libsndfile takes"),
    "AU that begins far behind its end": (
        lambda: patched(au(2 * LENGTH), 4, struct.pack(">I", 10**9)),
        "its header promises no samples, but it has 96,024 bytes. Convert it, for example with ffmpeg",
    ),
    "Vorbis that ends at its beginning": (lambda: vorbis_of_time(0), "its pages are not in the order of time"),
    "Vorbis that ends at its middle": (lambda: vorbis_of_time(20_000), "its pages are not in the order of time"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(tmp_path, name):
    make, message = REFUSED[name]
    path = tmp_path / "x.bin"
    path.write_bytes(make())
    for read in (audio_info, load_audio):
        with pytest.raises(AudioFileError, match=r"x\.bin cannot be read: ") as caught:
            read(path)
        assert message in str(caught.value)
        assert caught.value.reason == "unreadable"
    with pytest.raises(AudioFileError, match="The recording cannot be read: "):
        load_audio(path.read_bytes())


@pytest.mark.parametrize("rate", [0, 1, 10**9])
def test_rates_of_arrays_out_of_range_are_refused(rate):
    for read in (audio_info, load_audio):
        with pytest.raises(AudioFileError, match=f"its sampling rate is {rate:,} Hz"):
            read(Samples(noise(100), rate))


@pytest.mark.parametrize("data", [lambda: flac(20_000), lambda: encoded("FLAC") * 2], ids=["too low", "joined"])
def test_flac_that_goes_on_is_warned_about(tmp_path, caplog, data):
    (tmp_path / "x.flac").write_bytes(encoded("FLAC"))
    load_audio(tmp_path / "x.flac")
    assert not caplog.text
    (tmp_path / "x.flac").write_bytes(data())
    for _ in range(2):
        load_audio(tmp_path / "x.flac")
    assert caplog.text.count("x.flac: ") == 1
    assert "frames that its header promises, and are not read. Convert it" in caplog.text


def test_time_to_find_frames_is_linear():
    one = mp3(info=False)
    data = one[: one.index(one[:2], 4)] * 40_000
    start = time.perf_counter()
    assert audio_info(data).num_samples > 40_000 * 500
    assert time.perf_counter() - start < 10  # 45 s, if each frame copies the rest of the file


def test_lack_of_memory_is_an_unreadable_file(tmp_path, monkeypatch):
    (tmp_path / "x.wav").write_bytes(encoded("WAV"))

    def read(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(sf.SoundFile, "read", read)
    with pytest.raises(AudioFileError, match=r"x\.wav cannot be read: it needs more memory than there is"):
        load_audio(tmp_path / "x.wav")


def test_file_beside_a_resource_fork(tmp_path):
    (tmp_path / "x.mp3").write_bytes(mp3())
    (tmp_path / "._x.mp3").write_bytes(JUNK)  # libsndfile, given a path, takes it for a part of the file
    assert len(load_audio(tmp_path / "x.mp3")) == LENGTH


CANNOT_SEEK = [("WAV", "GSM610"), ("AIFF", "GSM610"), ("W64", "GSM610"), ("WAV", "G721_32"), ("AU", "G723_40")]
CANNOT_SEEK += [("AU", "G721_32"), ("AU", "G723_24"), ("WAV", "NMS_ADPCM_16"), ("XI", "DPCM_16")]


@pytest.mark.parametrize(("kind", "subtype"), CANNOT_SEEK)
def test_codec_that_cannot_seek(kind, subtype):
    data = encoded(kind, subtype, rate=8_000)
    assert not sf.SoundFile(io.BytesIO(data)).seekable()
    whole = load_audio(data)
    assert len(whole) == audio_info(data).num_samples
    for start in (len(whole) * 2 // 3, 7, len(whole) // 3):  # not in their order
        part = load_audio(data, start=start, num_samples=900)
        np.testing.assert_allclose(part, whole[start : start + 900], atol=1e-6)


# What each source makes of a FLAC without a length, a chained Opus, a good and an unreadable file.
FILES = {
    "a.flac": lambda: flac(0),
    "b.opus": lambda: encoded(*OTHER["OPUS"]) * 2,
    "c.wav": lambda: encoded("WAV"),
    "d.wav": lambda: REFUSED["rate 2^31"][0](),
}
LENGTHS = [LENGTH, 2 * LENGTH, LENGTH]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("speech")
    for name, make in FILES.items():
        (root / name).write_bytes(make())
    return root


def test_folder_and_manifest_have_the_lengths(folder):
    assert [utterance.num_samples for utterance in FolderSource(folder).utterances] == LENGTHS
    scan = scan_folder(folder)
    assert [file.num_frames for file in scan.usable] == LENGTHS
    assert [(file.name, file.reason) for file in scan.left_out] == [("d.wav", "unreadable")]


@pytest.mark.parametrize("kind", ["tar", "rows"])
def test_warnings_have_the_id(tmp_path, caplog, kind):
    files = {"a": wav(0), "b": wav(0)}
    if kind == "tar":
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            for name, data in files.items():
                info = tarfile.TarInfo(f"{name}.wav")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        source, ids = open_source(str(tmp_path / "x.tar")), ["x.tar/a.wav", "x.tar/b.wav"]
    else:
        table = pa.table({"audio": pa.array(list(files.values())), "id": list(files)})
        source, ids = DatasetSource(datasets.Dataset(table)), ["Utterance a", "Utterance b"]
    for index in range(2):
        assert len(source.load(index)) == LENGTH
        assert caplog.text.count(f"{ids[index]}: its header promises 0 bytes") == 1


@pytest.mark.parametrize("kind", ["tar", "rows"])
def test_other_sources_have_the_lengths(folder, tmp_path, kind):
    if kind == "tar":
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            for name in FILES:
                archive.add(folder / name, name)
        source = open_source(str(tmp_path / "x.tar"))
    else:
        rows = pa.array([(folder / name).read_bytes() for name in FILES])
        source = DatasetSource(datasets.Dataset(pa.table({"audio": rows})))
    assert [utterance.num_samples for utterance in source.utterances] == LENGTHS
    assert [len(source.load(index)) for index in range(3)] == LENGTHS
    assert list(source.skipped) == ["unreadable"]
