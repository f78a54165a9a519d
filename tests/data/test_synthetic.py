"""The synthetic corpus: reproducible, with times that match the waveform, and clear errors."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import itertools
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile

from dinosr_hf.data import _espeak, synthetic
from dinosr_hf.data._grammar import GRAMMARS
from dinosr_hf.data.audio import SAMPLING_RATE
from dinosr_hf.data.synthetic import LANGUAGES, SILENCE, SPLITS, SyntheticCorpus
from light_imports import LIGHT_IMPORTS


def assert_same_row(row: dict[str, Any], expected: dict[str, Any]) -> None:
    np.testing.assert_array_equal(row["audio"]["array"], expected["audio"]["array"])
    assert {**row, "audio": None} == {**expected, "audio": None}


def cut(row: dict[str, Any], segment: dict[str, Any]) -> np.ndarray:
    start, end = (round(segment[side] * SAMPLING_RATE) for side in ("start", "end"))
    return row["audio"]["array"][start:end]


def zero_crossings(samples: np.ndarray) -> float:
    """Return the fraction of samples at which the sign changes."""
    return float(np.mean(np.signbit(samples[1:]) != np.signbit(samples[:-1])))


def run_script(tmp_path: Path, code: str) -> str:
    """Return the output of a script in a new process, which has `SyntheticCorpus`."""
    script = tmp_path / "script.py"
    script.write_text(f"{LIGHT_IMPORTS}{code}", encoding="utf-8")
    return subprocess.run([sys.executable, str(script)], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def noisy_rows() -> list[dict[str, Any]]:
    return list(SyntheticCorpus(num_utterances=100, languages=LANGUAGES, num_speakers=50, text="mixed"))


@pytest.fixture(scope="module")
def clean_rows() -> list[dict[str, Any]]:
    return list(SyntheticCorpus(num_utterances=100, languages=LANGUAGES, num_speakers=50, text="mixed", noise=False))


# A row


def test_a_row_has_the_agreed_columns_and_types(noisy_rows):
    row = noisy_rows[7]
    assert list(row) == ["id", "audio", "text", "speaker_id", "language", "num_samples", "phones", "words"]
    assert row["audio"]["array"].dtype == np.float32
    assert row["audio"]["array"].shape == (row["num_samples"],)
    assert row["audio"]["sampling_rate"] == 16_000
    assert len({row["id"] for row in noisy_rows}) == len(noisy_rows)


@pytest.mark.parametrize("rows", ["noisy_rows", "clean_rows"])
def test_level_is_audible_and_never_clips(rows, request):
    for row in request.getfixturevalue(rows):
        waveform = row["audio"]["array"]
        assert np.abs(waveform).max() < 1
        assert -45 < 20 * np.log10(np.sqrt(np.mean(waveform**2))) < -12


def test_utterances_last_mostly_one_to_six_seconds(noisy_rows):
    seconds = np.array([row["num_samples"] for row in noisy_rows]) / SAMPLING_RATE
    assert np.mean((seconds > 1) & (seconds < 6)) > 0.9
    assert seconds.max() < 12


def test_phones_are_contiguous_from_start_to_end(noisy_rows):
    for row in noisy_rows:
        phones = row["phones"]
        assert phones[0]["start"] == 0
        assert phones[-1]["end"] == row["num_samples"] / SAMPLING_RATE
        assert all(phone["end"] > phone["start"] for phone in phones)
        assert all(left["end"] == right["start"] for left, right in itertools.pairwise(phones))
        assert phones[0]["label"] == phones[-1]["label"] == SILENCE


def test_words_are_those_of_the_text_and_enclose_whole_phones(noisy_rows):
    for row in noisy_rows:
        words = row["words"]
        assert [word["label"] for word in words] == row["text"].split()
        assert all(left["end"] <= right["start"] for left, right in itertools.pairwise(words))
        for phone in row["phones"]:
            inside = [w for w in words if w["start"] <= phone["start"] and phone["end"] <= w["end"]]
            assert len(inside) == 1 or (phone["label"] == SILENCE and not inside)


@pytest.mark.parametrize("language", LANGUAGES)
def test_text_is_lower_case_words_of_the_grammar(language):
    vocabulary = " ".join(text for rule in GRAMMARS[language].values() for text in rule)
    for row in SyntheticCorpus(num_utterances=10, languages=(language,)):
        assert row["language"] == language
        assert all(word.isalpha() and word.islower() and word in vocabulary for word in row["text"].split())


def test_digits_are_digits():
    for row in SyntheticCorpus(num_utterances=10, text="digits", languages=("de",)):
        words = row["text"].split()
        assert 3 <= len(words) <= 8
        assert set(words) <= set(GRAMMARS["de"]["digit"])


def test_mixed_has_both_kinds(noisy_rows):
    digits = {digit for grammar in GRAMMARS.values() for digit in grammar["digit"]}
    only_digits = [set(row["text"].split()) <= digits for row in noisy_rows]
    assert 0.3 < np.mean(only_digits) < 0.7


# Times compared with the waveform, without noise


def test_silences_are_silent_and_phones_are_not(clean_rows):
    for row in clean_rows:
        edge = SAMPLING_RATE // 200  # the resampler rings for a few milliseconds
        for phone in row["phones"]:
            samples = cut(row, phone)
            if phone["label"] == SILENCE:
                assert np.abs(samples[edge:-edge]).max() < 1e-3
            else:
                assert np.abs(samples).max() > 1e-3


def test_hisses_cross_zero_more_often_than_vowels_and_nasals(clean_rows):
    rates: dict[str, list[float]] = {"sʃ": [], "aeiou": [], "mn": []}
    for row in clean_rows:
        for phone in row["phones"]:
            for members, values in rates.items():
                if phone["label"] in members:
                    values.append(zero_crossings(cut(row, phone)))
    assert np.percentile(rates["sʃ"], 5) > 0.35
    assert np.percentile(rates["aeiou"], 95) < 0.3
    assert np.percentile(rates["mn"], 95) < 0.25


@pytest.mark.parametrize("language", LANGUAGES)
def test_sound_changes_at_the_boundaries_of_phones(clean_rows, language):
    """Spectral change (over 20 ms) is largest at the boundaries, and smaller 20 ms before and after them."""
    hop, window = 80, 160
    changes: dict[int, list[float]] = {shift: [] for shift in range(-4, 5)}  # in hops of 5 ms
    for row in (row for row in clean_rows if row["language"] == language):
        frames = np.lib.stride_tricks.sliding_window_view(row["audio"]["array"], window)[::hop]
        spectrum = np.log(np.abs(np.fft.rfft(frames * np.hanning(window))) + 1e-3)
        change = np.linalg.norm(spectrum[4:] - spectrum[:-4], axis=1)  # item i: around sample (i + 3) * hop
        for phone in row["phones"][:-1]:
            centre = round(phone["end"] * SAMPLING_RATE / hop) - 3
            if 4 <= centre < len(change) - 4:
                for shift, values in changes.items():
                    values.append(float(change[centre + shift]))
    means = {shift: np.mean(values) for shift, values in changes.items()}
    assert max(means, key=lambda shift: means[shift]) in (-1, 0, 1)
    assert means[0] > 1.5 * means[-4]
    assert means[0] > 1.5 * means[4]


def test_a_stop_has_its_closure_and_a_double_stop_a_long_one():
    def closure(text: str, voice: str, label: str) -> float:
        samples, events = _espeak.synthesize(text, voice=voice, pitch=50, pitch_range=50, rate=160, volume=30, seed=0)
        segments, _ = synthetic._phone_segments(samples, events)
        first = next(segment for segment in segments[2:] if segment.label == label)
        return synthetic._silent_run(samples == 0, first.start + 1) + np.argmax(samples[first.start :] != 0)

    assert 0.02 < closure("ella toca.", "es+m3", "k") / _espeak.ESPEAK_RATE < 0.075
    assert closure("gatto.", "it+m3", "t") / _espeak.ESPEAK_RATE > 0.1


def test_every_nameless_sound_goes_to_its_neighbour():
    """ "r" in Italian and "ío" in Spanish have a nameless part that is not silence."""
    for text, voice in (("tre treni.", "it+m3"), ("río frío.", "es+m3")):
        samples, events = _espeak.synthesize(text, voice=voice, pitch=50, pitch_range=50, rate=160, volume=30, seed=0)
        segments, _ = synthetic._phone_segments(samples, events)
        assert any(not event.name for event in events[:-3])
        assert all(np.mean(samples[s.start : s.end] == 0) > 0.9 for s in segments if s.label == SILENCE)


# Labels


def test_labels_have_no_marks_of_stress_and_length(clean_rows, monkeypatch):
    labels = {phone["label"] for row in clean_rows for phone in row["phones"]}
    assert not any(mark in label for label in labels for mark in "ˈˌː")
    monkeypatch.setattr(synthetic, "_label", lambda name: name)
    named = {phone["label"] for row in SyntheticCorpus(10, noise=False) for phone in row["phones"]}
    assert all(any(mark in name for name in named) for mark in "ˈː")  # espeak-ng's own


def test_labels_of_espeak_names():
    assert [synthetic._label(name) for name in ("ˈeɪ", "ˌɑː", "ss", "a-", "tʃ")] == ["eɪ", "ɑ", "s", "a", "tʃ"]


def test_labels_are_not_empty(noisy_rows):
    labels = {phone["label"] for row in noisy_rows for phone in row["phones"]}
    assert all(label and label.strip() == label for label in labels)


# Reproducibility


def test_rows_do_not_depend_on_their_order(noisy_rows):
    corpus = SyntheticCorpus(num_utterances=100, languages=LANGUAGES, num_speakers=50, text="mixed")
    for index in (40, 3, 99, 3, 0, -1):
        assert_same_row(corpus[index], noisy_rows[index])


def test_a_larger_corpus_begins_with_the_smaller_one():
    for small, large in zip(SyntheticCorpus(num_utterances=3), SyntheticCorpus(num_utterances=1000), strict=False):
        assert_same_row(small, large)


def digest(rows: Iterable[dict[str, Any]]) -> str:
    return hashlib.sha256(
        b"".join(np.asarray(row["audio"]["array"], np.float32).tobytes() for row in rows)
    ).hexdigest()


def test_another_process_makes_the_same_speech(tmp_path):
    code = """
import hashlib
corpus = SyntheticCorpus(num_utterances=20, seed=5, languages=("fr", "en"))
print(hashlib.sha256(b"".join(corpus[index]["audio"]["array"].tobytes() for index in (19, 4, 11))).hexdigest())
"""
    corpus = SyntheticCorpus(num_utterances=20, seed=5, languages=("fr", "en"))
    rows = {index: corpus[index] for index in (4, 11, 19)}
    assert run_script(tmp_path, code) == digest([rows[19], rows[4], rows[11]])


def test_two_processes_make_the_dataset_that_one_makes(tmp_path):
    code = """
if __name__ == "__main__":
    corpus = SyntheticCorpus(num_utterances=14, seed=1)
    corpus.to_dataset(num_proc=2).save_to_disk(sys.argv[0] + ".dataset")
    corpus.export(sys.argv[0] + ".folder", num_proc=2)
"""
    run_script(tmp_path, code)
    corpus = SyntheticCorpus(num_utterances=14, seed=1)
    dataset = datasets.load_from_disk(tmp_path / "script.py.dataset")
    assert digest(dataset) == digest(corpus)
    assert dataset.remove_columns("audio").to_list() == corpus.to_dataset().remove_columns("audio").to_list()
    corpus.export(tmp_path)
    for name in ("metadata.csv", "phones.jsonl", f"{dataset[13]['id']}.flac"):
        assert (tmp_path / "train" / name).read_bytes() == (tmp_path / "script.py.folder/train" / name).read_bytes()


def test_breath_noise_is_seeded():
    """Negative control: the variant "victor" has breath noise, which differs with another seed."""
    settings = {"voice": "en+victor", "pitch": 50, "pitch_range": 50, "rate": 160, "volume": 30}
    first, _ = _espeak.synthesize("a quiet horse.", seed=1, **settings)
    again, _ = _espeak.synthesize("a quiet horse.", seed=1, **settings)
    other, _ = _espeak.synthesize("a quiet horse.", seed=2, **settings)
    np.testing.assert_array_equal(first, again)
    assert len(first) != len(other) or (first != other).any()


@pytest.mark.parametrize("change", [{"seed": 1}, {"split": "test"}, {"languages": ("it",)}, {"text": "digits"}])
def test_other_settings_say_something_else(change):
    plain, other = (SyntheticCorpus(num_utterances=1, **settings)[0] for settings in ({}, change))
    assert plain["text"] != other["text"]


def test_noise_is_added_to_the_same_speech(noisy_rows, clean_rows):
    for noisy, clean in zip(noisy_rows, clean_rows, strict=True):
        assert {**noisy, "audio": None} == {**clean, "audio": None}
        assert (noisy["audio"]["array"] != clean["audio"]["array"]).any()


def test_signal_to_noise_ratio_is_in_its_range(monkeypatch):
    def ratio_db(row: dict[str, Any]) -> float:
        silence = np.concatenate([cut(row, p) for p in (row["phones"][0], row["phones"][-1])])
        speech = np.concatenate([cut(row, p) for p in row["words"]])
        return 10 * np.log10(np.mean(speech**2) / np.mean(silence**2))

    monkeypatch.setattr(synthetic, "_SNR_DB", (5, 5))
    loud = [ratio_db(row) for row in SyntheticCorpus(num_utterances=10)]
    monkeypatch.setattr(synthetic, "_SNR_DB", (30, 30))
    quiet = [ratio_db(row) for row in SyntheticCorpus(num_utterances=10)]
    # Speech plus noise over noise; the room's tail is in the silence after the last phone.
    np.testing.assert_allclose(loud, 6.2, atol=1.5)
    assert min(quiet) > 10
    assert np.median(quiet) > np.median(loud) + 8


# Speakers


def test_splits_share_no_speaker_and_no_voice():
    speakers = {
        split: [SyntheticCorpus(num_utterances=1, split=split, num_speakers=60).speaker(n) for n in range(60)]
        for split in SPLITS
    }
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        for field in ("id", "variant"):
            shared = {getattr(s, field) for s in speakers[one]} & {getattr(s, field) for s in speakers[other]}
            assert not shared
    assert all(len({speaker.id for speaker in group}) == 60 for group in speakers.values())


def test_speakers_differ_widely():
    corpus = SyntheticCorpus(num_utterances=1, num_speakers=60)
    speakers = [corpus.speaker(number) for number in range(60)]
    assert len({speaker[1:] for speaker in speakers}) == 60
    assert len({speaker.variant for speaker in speakers}) > 20
    for field, least in (("pitch", 40), ("pitch_range", 30), ("rate", 50), ("tract", 0.15)):
        values = [getattr(speaker, field) for speaker in speakers]
        assert max(values) - min(values) > least


def test_languages_take_turns():
    corpus = SyntheticCorpus(num_utterances=1, num_speakers=10, languages=("es", "it"))
    assert [corpus.speaker(number).language for number in range(4)] == ["es", "it", "es", "it"]


def test_rows_have_the_speakers_of_the_corpus(noisy_rows):
    corpus = SyntheticCorpus(num_utterances=100, languages=LANGUAGES, num_speakers=50, text="mixed")
    languages = {speaker.id: speaker.language for speaker in map(corpus.speaker, range(50))}
    assert all(languages[row["speaker_id"]] == row["language"] for row in noisy_rows)
    assert len({row["speaker_id"] for row in noisy_rows}) > 30


# Datasets and folders


def test_dataset_has_typed_features():
    dataset = SyntheticCorpus(num_utterances=2).to_dataset()
    assert dataset.features["audio"]["array"] == datasets.Sequence(datasets.Value("float32"))
    assert dataset.features["audio"]["sampling_rate"] == datasets.Value("int32")
    assert dataset.features["num_samples"] == datasets.Value("int64")
    for row, expected in zip(dataset, SyntheticCorpus(num_utterances=2), strict=True):
        np.testing.assert_array_equal(np.array(row["audio"]["array"], np.float32), expected["audio"]["array"])
        assert {**row, "audio": None} == {**expected, "audio": None}


def test_dataset_of_no_utterances_is_empty_and_typed():
    dataset = SyntheticCorpus(num_utterances=0).to_dataset()
    assert len(dataset) == 0
    assert "phones" in dataset.features


@pytest.mark.parametrize("format", ["flac", "wav"])
def test_export_is_an_audio_folder(tmp_path, format):
    corpus = SyntheticCorpus(num_utterances=3, split="validation")
    folder = corpus.export(tmp_path, format=format)
    assert folder == tmp_path / "validation"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["validation"]
    with open(folder / "metadata.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    phones = [json.loads(line) for line in (folder / "phones.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        ["metadata.csv", "phones.jsonl", *(line["file_name"] for line in table)]
    )
    for row, line, phone_line in zip(corpus, table, phones, strict=True):
        samples, rate = soundfile.read(folder / line["file_name"], dtype="float32")
        assert rate == SAMPLING_RATE
        assert soundfile.info(folder / line["file_name"]).format == format.upper()
        np.testing.assert_allclose(samples, row["audio"]["array"], atol=1 / 32_768)
        assert line == {
            "file_name": f"{row['id']}.{format}",
            "transcription": row["text"],
            "speaker_id": row["speaker_id"],
            "language": row["language"],
            "duration": str(row["num_samples"] / SAMPLING_RATE),
        }
        assert phone_line == {"name": row["id"], "phones": row["phones"], "words": row["words"]}


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def fail(*arguments: Any, **settings: Any) -> None:
        raise RuntimeError("no voice today")

    monkeypatch.setattr(synthetic, "synthesize", fail)
    with pytest.raises(RuntimeError, match="no voice today"):
        SyntheticCorpus(num_utterances=2).export(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_export_does_not_overwrite(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"train exists\. Remove it or choose another folder"):
        SyntheticCorpus(num_utterances=1).export(tmp_path)


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_utterances": -1}, "num_utterances must be 0 or more, got -1"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"languages": ("en", "xx")}, r"languages must be one or more of \('en', .* got \('en', 'xx'\)"),
        ({"languages": ()}, "languages must be one or more"),
        ({"languages": ("en", "en")}, "each once"),
        ({"languages": "en"}, r"pass \('en',\)"),
        ({"num_speakers": 0}, "num_speakers must be at least 1 per language, 1 here, got 0"),
        ({"num_speakers": 1, "languages": ("en", "de")}, "at least 1 per language, 2 here, got 1"),
        ({"split": "dev"}, r"split must be one of \('train', 'validation', 'test'\), got 'dev'"),
        ({"text": "poems"}, r"text must be one of \('sentences', 'digits', 'mixed'\), got 'poems'"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SyntheticCorpus(**{"num_utterances": 1, **settings})


def test_corpus_is_frozen_and_hashable():
    corpus = SyntheticCorpus(1, languages=["en", "de"], num_texts=[1, 2])
    same = SyntheticCorpus(1, languages=("en", "de"), num_texts=(1, 2))
    assert corpus == same and hash(corpus) == hash(same)
    assert corpus != SyntheticCorpus(1, languages=("en", "de"), num_texts=(1, 3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        corpus.seed = 1


def test_unknown_format_speaker_and_process_count_are_refused(tmp_path):
    corpus = SyntheticCorpus(num_utterances=1)
    with pytest.raises(ValueError, match=r"format must be one of \('flac', 'wav'\), got 'mp3'"):
        corpus.export(tmp_path, format="mp3")
    with pytest.raises(ValueError, match="num_proc must be at least 1, or None for this process, got 0"):
        corpus.to_dataset(num_proc=0)
    with pytest.raises(ValueError, match="speaker must be 0 to 39, got 40"):
        corpus.speaker(40)
    with pytest.raises(IndexError, match="the corpus has 1 utterances"):
        corpus[1]


@pytest.mark.parametrize("package", ["espeakng_loader", "soxr", "datasets", "soundfile"])
def test_a_missing_package_is_named_with_its_extra(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)  # import raises ImportError
    corpus = SyntheticCorpus(num_utterances=1)
    with pytest.raises(ImportError, match=r'pip install "dinosr-hf\[demo\]"'):
        corpus.export(tmp_path) if package == "soundfile" else corpus.to_dataset()


def test_espeak_is_not_imported_before_it_is_used(tmp_path):
    code = 'corpus = SyntheticCorpus(num_utterances=1); print("espeakng_loader" in sys.modules)'
    assert run_script(tmp_path, code) == "False"
    assert run_script(tmp_path, code.replace("print", "corpus[0]; print")) == "True"


def test_library_already_in_use_is_refused(tmp_path):
    code = """
import ctypes, espeakng_loader
other = ctypes.CDLL(espeakng_loader.get_library_path())
try:
    SyntheticCorpus(num_utterances=1)[0]
except RuntimeError as error:
    print(error)
"""
    assert "is already in use in this process" in run_script(tmp_path, code)


def test_an_unknown_voice_is_an_error():
    with pytest.raises(RuntimeError, match=r"no voice 'xx\+m3'"):
        _espeak.synthesize("", voice="xx+m3", pitch=50, pitch_range=50, rate=160, volume=30, seed=0)


def test_several_texts_make_one_long_utterance():
    short = SyntheticCorpus(num_utterances=1, seed=5)[0]
    long = SyntheticCorpus(num_utterances=1, seed=5, num_texts=(4, 4))[0]
    assert long["num_samples"] > 2.5 * short["num_samples"]
    assert len(long["text"].split()) == len(long["words"]) >= 16
    phones = long["phones"]
    assert phones[0]["start"] == 0 and phones[-1]["end"] == pytest.approx(long["num_samples"] / SAMPLING_RATE)
    for before, after in itertools.pairwise(phones):
        assert before["end"] == after["start"]
        assert not before["label"] == after["label"] == SILENCE
    assert sum(p["label"] == SILENCE and p["end"] - p["start"] > 0.1 for p in phones[1:-1]) >= 3


@pytest.mark.parametrize("num_texts", [(0, 1), (2, 1), (1,)])
def test_impossible_numbers_of_texts_are_refused(num_texts):
    with pytest.raises(ValueError, match="num_texts must be the minimum and the maximum"):
        SyntheticCorpus(num_utterances=1, num_texts=num_texts)
