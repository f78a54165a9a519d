"""The pipeline of speech recognition after `import dinosr_hf`: transformers' own class, and ours."""

import importlib.util
import io
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import soxr
import torch
from transformers import AutomaticSpeechRecognitionPipeline, AutoProcessor, pipeline

from audio_files import noise, sf
from dinosr_hf import DinoSRForCTC
from dinosr_hf.recognition import SpeechRecognitionPipeline
from dinosr_hf.recognition.decoding import GreedyDecoder
from dinosr_hf.recognition.text import make_processor
from recognisers import save_models

CLASSES = [AutomaticSpeechRecognitionPipeline, SpeechRecognitionPipeline]
TASK = "automatic-speech-recognition"
LENGTHS = [2_000, 1_111, 1_502]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    save_models(path)
    return str(path / "recogniser")


@pytest.fixture(scope="module", params=CLASSES, ids=["transformers", "ours"])
def either(request, folder):
    chosen = None if request.param is AutomaticSpeechRecognitionPipeline else request.param
    made = pipeline(TASK, model=folder, pipeline_class=chosen)
    assert type(made) is request.param and isinstance(made.model, DinoSRForCTC)
    return made


@pytest.fixture(scope="module")
def ours(folder):
    return pipeline(TASK, model=folder, pipeline_class=SpeechRecognitionPipeline)


@torch.no_grad()
def logits_of(recogniser, wave):
    inputs = recogniser.feature_extractor(wave, sampling_rate=16_000, return_tensors="pt")
    return recogniser.model(**inputs).logits[0]


def test_arrays_and_dicts(either):
    wave = noise(2_000)
    text = either.tokenizer.decode(logits_of(either, wave).argmax(-1))
    assert len(text) > 3
    for given in (wave, torch.from_numpy(wave), {"raw": wave, "sampling_rate": 16_000}, np.stack([wave, wave])):
        assert either(given)["text"] == text
    assert either({"array": wave, "sampling_rate": 16_000, "path": None})["text"] == text
    assert either(noise(2_000, seed=1))["text"] != text


def test_a_row_of_datasets_has_a_decoder(ours):
    wave = noise(4_000)
    decoder = SimpleNamespace(
        get_all_samples=lambda: SimpleNamespace(data=torch.from_numpy(np.stack([wave, wave])), sample_rate=32_000)
    )
    assert ours(decoder)["text"] == ours({"raw": wave, "sampling_rate": 32_000})["text"] != ours(wave)["text"]


def test_batches_are_their_utterances(either):
    waves = [noise(length, length) for length in LENGTHS]
    alone = [either(wave)["text"] for wave in waves]
    assert [found["text"] for found in either(waves, batch_size=3)] == alone
    timed = either(waves, batch_size=3, return_timestamps="word")
    for found, wave in zip(timed, waves, strict=True):
        assert found["chunks"] == either(wave, return_timestamps="word")["chunks"]
    # Not so if padding were read.
    inputs = either.feature_extractor(waves, sampling_rate=16_000, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = either.model(inputs["input_values"]).logits
    assert either.tokenizer.batch_decode(logits.argmax(-1)) != alone


def test_chunks_are_cut_at_frames(either):
    # As by hand: each chunk by itself, its inner frames kept. 20 samples a frame; 50 frames, 10 on each side.
    wave = noise(3_333)
    found = either(wave, chunk_length_s=1_000 / 16_000, stride_length_s=200 / 16_000)
    labels = []
    for start in range(0, 3_333, 600):
        chunk = logits_of(either, wave[start : start + 1_000]).argmax(-1)
        is_last = start + 1_000 >= 3_333
        labels.append(chunk[0 if start == 0 else 10 : None if is_last else 40])
        if is_last:
            break
    text = either.tokenizer.decode(torch.cat(labels))
    assert found["text"] == text != either(wave)["text"]
    batched = either(wave, chunk_length_s=1_000 / 16_000, stride_length_s=200 / 16_000, batch_size=4)
    assert batched["text"] == text


def test_times_of_characters(either):
    wave = noise(2_000)
    chunks = either(wave, return_timestamps="char")["chunks"]
    frames = logits_of(either, wave).argmax(-1).tolist()
    assert "".join(chunk["text"] for chunk in chunks).strip() == either(wave)["text"] != ""
    tokenizer, letters = either.tokenizer, [chunk for chunk in chunks if chunk["text"] != " "]
    for chunk in letters:
        begin, end = (round(time * 16_000 / 20) for time in chunk["timestamp"])
        assert {tokenizer.decode([label]) for label in frames[begin:end]} == {chunk["text"]}
    assert len(letters) > 3


def test_times_of_words(folder, ours):
    wave = noise(2_000)
    decoder = GreedyDecoder.from_tokenizer(ours.tokenizer, ours.model.config)
    (expected,) = decoder.decode(logits_of(ours, wave).log_softmax(-1).numpy())
    found = ours(wave, return_timestamps="word")
    assert [chunk["text"] for chunk in found["chunks"]] == [word.word for word in expected.words]
    times = [chunk["timestamp"] for chunk in found["chunks"]]
    np.testing.assert_allclose(times, [word[1:] for word in expected.words], atol=1e-9)
    theirs = pipeline(TASK, model=folder)(wave, return_timestamps="word")["chunks"]
    assert [chunk["text"] for chunk in theirs] == [chunk["text"] for chunk in found["chunks"]]
    assert [chunk["timestamp"] for chunk in theirs] != times
    chunked = ours(wave, return_timestamps="word", chunk_length_s=1.0)
    assert [chunk["timestamp"] for chunk in chunked["chunks"]] == times  # one chunk
    assert ours(np.zeros(400, dtype=np.float32), return_timestamps="word")["chunks"] is not None


def test_phones_are_words(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "phones")
    vocabulary = AutoProcessor.from_pretrained(folder).tokenizer.get_vocab()
    make_processor(vocabulary, "phonemes").save_pretrained(tmp_path / "phones")
    recognise = pipeline(TASK, model=str(tmp_path / "phones"), pipeline_class=SpeechRecognitionPipeline)
    wave = noise(2_000)
    found = recognise(wave, return_timestamps="word")
    assert found["text"].split() == [chunk["text"] for chunk in found["chunks"]] and len(found["chunks"]) > 3
    decoder = GreedyDecoder.from_tokenizer(recognise.tokenizer, recognise.model.config)
    (expected,) = decoder.decode(logits_of(recognise, wave).log_softmax(-1).numpy())
    times = [chunk["timestamp"] for chunk in found["chunks"]]
    np.testing.assert_allclose(times, [word[1:] for word in expected.words], atol=1e-9)


def test_files_and_their_bytes(ours, tmp_path):
    wave = noise(2_000)
    path = tmp_path / "a.flac"
    sf.write(path, np.stack([wave, wave], axis=1), 16_000, subtype="PCM_24")
    text = ours(wave)["text"]
    assert ours(str(path))["text"] == ours(path)["text"] == ours(path.read_bytes())["text"] == text
    assert [found["text"] for found in ours([str(path), str(path)], batch_size=2)] == [text, text]
    with pytest.raises(ValueError, match=r"none.wav is not a file"):
        ours(str(tmp_path / "none.wav"))


def test_tensors_of_other_types(ours):
    wave = torch.from_numpy(noise(2_000)).bfloat16()
    text = ours(wave.float().numpy())["text"]
    assert ours(wave)["text"] == ours(wave.float().requires_grad_())["text"] == text != ""


@pytest.mark.parametrize("rate", [None, float("nan"), "fast"])
def test_rates_that_are_no_numbers(ours, rate):
    with pytest.raises(ValueError, match=f"sampling_rate is {rate!r}, but must be a whole number of Hz"):
        ours({"raw": noise(2_000), "sampling_rate": rate})


@pytest.mark.parametrize("rate", [8_000, 22_050])
def test_other_rates(ours, rate):
    wave = noise(rate // 8)
    text = ours(soxr.resample(wave, rate, 16_000, quality="HQ"))["text"]
    given = {"array": wave, "sampling_rate": rate}
    assert ours(given)["text"] == text and set(given) == {"array", "sampling_rate"}
    buffer = io.BytesIO()
    sf.write(buffer, wave, rate, format="WAV", subtype="FLOAT")
    assert ours(buffer.getvalue())["text"] == text != ours(wave)["text"]


def test_stride_of_another_rate(ours):
    wave = noise(2_000)
    stretched = {"raw": np.repeat(wave, 2), "sampling_rate": 32_000, "stride": (400, 800)}
    resampled = soxr.resample(stretched["raw"], 32_000, 16_000, quality="HQ")
    expected = ours({"raw": resampled, "sampling_rate": 16_000, "stride": (200, 400)})
    assert ours(stretched)["text"] == expected["text"] != ours(resampled)["text"]


def test_samples_before_channels_are_refused(ours):
    with pytest.raises(ValueError, match=r"shape \(500, 2\).*transpose it"):
        ours({"raw": noise(1_000).reshape(500, 2), "sampling_rate": 8_000})


@pytest.mark.skipif(shutil.which("ffmpeg") is not None, reason="ffmpeg is here")
def test_transformers_own_class_needs_ffmpeg(folder, tmp_path):
    sf.write(tmp_path / "a.wav", noise(2_000), 16_000)
    with pytest.raises(ValueError, match="ffmpeg was not found"):
        pipeline(TASK, model=folder)(str(tmp_path / "a.wav"))


@pytest.mark.skipif(importlib.util.find_spec("torchaudio") is not None, reason="torchaudio is here")
def test_transformers_own_class_needs_torchaudio(folder):
    with pytest.raises(ImportError, match="torchaudio is required to resample"):
        pipeline(TASK, model=folder)({"raw": noise(2_000), "sampling_rate": 8_000})


def test_processor_is_found(folder):
    assert type(AutoProcessor.from_pretrained(folder)).__name__ == "Wav2Vec2Processor"


def test_too_short_for_a_frame(either, ours, tmp_path):
    short, wave = noise(5), noise(2_000)
    text = either(wave)["text"]
    assert either(short) == {"text": ""} != text
    assert either({"raw": short, "sampling_rate": 16_000}) == {"text": ""}
    for batch_size in (1, 2):
        assert either([short, wave], batch_size=batch_size) == [{"text": ""}, {"text": text}]
    assert either(short, return_timestamps="word")["chunks"] == []
    sf.write(tmp_path / "a.wav", short, 16_000)
    assert ours(str(tmp_path / "a.wav")) == {"text": ""}


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.where(np.arange(2_000) == 700, np.nan, noise(2_000)), "NaN or infinite"),
        (np.where(np.arange(2_000) == 700, np.inf, noise(2_000)), "NaN or infinite"),
        (noise(0), "has no samples"),
        (np.empty((0, 2), np.float32), r"shape \(0, 2\)"),
        (noise(4_000).reshape(2_000, 2), r"shape \(2000, 2\).*transpose it"),
    ],
    ids=["nan", "infinite", "empty", "empty, of two channels", "samples before channels"],
)
def test_unusable_arrays_are_refused_alike(ours, samples, message):
    ways = {
        "alone": lambda: ours(samples),
        "dict": lambda: ours({"raw": samples, "sampling_rate": 16_000}),
        "batch": lambda: ours([noise(2_000), samples], batch_size=2),
        "chunks": lambda: ours(samples, chunk_length_s=1_000 / 16_000),
        "tensor": lambda: ours(torch.from_numpy(samples)),
    }
    for read in ways.values():
        with pytest.raises(ValueError, match=message):
            read()
