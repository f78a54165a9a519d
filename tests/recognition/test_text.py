"""From transcripts to labels and back: what is written down of it, what is counted, and what survives."""

import json
import logging

import numpy as np
import pytest
from transformers import AutoProcessor, AutoTokenizer

from dinosr_hf.data import LabelledSource, SpeechSource, Utterance
from dinosr_hf.finetuning import Recognition, RecognitionArguments
from dinosr_hf.recognition import (
    TextNormalization,
    build_vocabulary,
    load_processor,
    make_processor,
    texts_of,
)
from dinosr_hf.recognition.text import NORMALIZATION_FILE, encode, frames_needed, units_of
from dinosr_hf.utils.command_line import ArgumentError
from dinosr_hf.utils.model_folder import feature_extractor


class Silence(SpeechSource):
    """Utterances of so many samples."""

    def __init__(self, num_utterances):
        self.utterances = [Utterance(f"u{number}", 1_600) for number in range(num_utterances)]
        self.skipped = {}

    def load(self, index, start=0, num_samples=None):
        return np.zeros(1_600, dtype=np.float32)


def labelled(*labels):
    return LabelledSource(Silence(len(labels)), labels, name="some data")


def recognition(*labels, **arguments):
    task = Recognition(RecognitionArguments(**arguments))
    task.prepare(labelled(*labels))
    return task


def frames_of(labels, blank=0, repeats=2):
    """Frames that spell labels: each several times, a blank after each."""
    return np.array([frame for label in labels for frame in [label] * repeats + [blank]], dtype=np.int64)


# -- normalisation


@pytest.mark.parametrize(
    ("text", "settings", "wanted"),
    [
        ("Hello,  World!", {}, "hello world"),
        ("don’t `stop´", {}, "don't 'stop'"),
        ("don't", {"keep": ""}, "dont"),
        ("Well-known/old_name – really", {}, "well known old name really"),
        ("ﬁne ① Ｆ", {}, "fine 1 f"),
        ("5€ & more%", {"keep": "&"}, "5 & more"),
        ("Straße", {"case": "upper"}, "STRASSE"),
        ("Straße", {"case": "keep"}, "Straße"),
        ("\tone\n two\u00a0three ", {}, "one two three"),
        ("...", {}, ""),
        ("  AH0  B\tt̪ʰ | ", {"units": "phonemes"}, "AH0 B t̪ʰ |"),
    ],
)
def test_normalisation(text, settings, wanted):
    normalize = TextNormalization(**settings)
    assert normalize(text) == wanted
    assert normalize(wanted) == wanted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"case": "title"}, "case='title' is unknown. Choose one of lower, upper, keep"),
        ({"units": "words"}, "units='words' is unknown. Choose one of characters, phonemes"),
    ],
)
def test_unknown_normalisations(settings, message):
    with pytest.raises(ValueError, match=message):
        TextNormalization(**settings)


def test_normalisation_is_written_down(tmp_path):
    assert TextNormalization.load(tmp_path) is None
    normalize = TextNormalization(case="upper", keep="'&")
    normalize.save(tmp_path)
    assert json.loads((tmp_path / NORMALIZATION_FILE).read_text()) == {
        "units": "characters",
        "case": "upper",
        "keep": "'&",
    }
    assert TextNormalization.load(tmp_path) == normalize


@pytest.mark.parametrize("content", ['{"case": "title"}', '{"casing": "lower"}', "[", "3"])
def test_a_file_that_is_no_normalisation_is_refused(tmp_path, content):
    (tmp_path / NORMALIZATION_FILE).write_text(content)
    with pytest.raises(ValueError, match=f"{NORMALIZATION_FILE} is no text normalisation"):
        TextNormalization.load(tmp_path)


# -- vocabulary


def test_vocabulary_is_that_of_the_texts():
    wanted = ["<pad>", "<s>", "</s>", "<unk>", "|", "'", "a", "b", "ä"]
    assert list(build_vocabulary(["ab a", "bä'"])) == wanted
    assert list(build_vocabulary(["ab a", "bä'"]).values()) == list(range(9))


def test_vocabulary_of_phones():
    found = build_vocabulary(["AH B", "B |"], "phonemes")
    assert list(found) == ["<pad>", "<s>", "</s>", "<unk>", "AH", "B", "|"]


@pytest.mark.parametrize(
    ("texts", "units", "message"),
    [
        ([], "characters", "No transcript has a label in it"),
        (["", " "], "characters", "No transcript has a label in it"),
        (["a <s>"], "phonemes", "have <s>, which are special tokens"),
    ],
)
def test_texts_that_make_no_vocabulary(texts, units, message):
    with pytest.raises(ValueError, match=message):
        build_vocabulary(texts, units)


def test_vocabulary_comes_from_the_training_transcripts_alone(caplog):
    task = recognition("Hello, moon", "No?")
    tokenizer = task.processor.tokenizer
    assert set(tokenizer.get_vocab()) == {"<pad>", "<s>", "</s>", "<unk>", *"|helomn"}
    with caplog.at_level(logging.WARNING, "dinosr_hf"):
        targets = task.targets(labelled("moon", "Zoom zz", "ßß"))
    letters = tokenizer.get_vocab()
    assert [target.tolist() for target in targets] == [
        [letters[letter] for letter in "moon"],
        [letters[letter] for letter in "oom|"],
        [],
    ]
    assert "some data: 5 labels are not in the vocabulary: 'z' 3 times, 'ß' 2 times." in caplog.text


def test_nothing_is_reported_of_the_training_transcripts(caplog):
    task = recognition("hello moon")
    task.targets(labelled("hello moon"))
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []


def test_characters_outside_of_the_vocabulary_are_errors(tmp_path):
    task = recognition("no oh")
    source = labelled("no", "zoo")
    targets = task.targets(source)
    predictions = [frames_of(target) for target in targets]
    assert task.report(source, predictions, tmp_path, "test") == {"wer": 0.5, "cer": 1 / 5}
    # The best checkpoint is chosen by what can be spelt.
    prediction = type("P", (), {"predictions": predictions, "label_ids": targets})
    assert task.metrics(prediction) == {"wer": 0.0, "cer": 0.0}


# -- labels and back


@pytest.mark.parametrize("text", ["hello", "aa", "hello moon ooh", "o o", "don't", "a 'b' n't ."])
def test_what_is_spelt_frame_by_frame_is_read_back(text):
    tokenizer = make_processor(build_vocabulary([text])).tokenizer
    (labels,), outside = encode([text], tokenizer)
    assert not outside
    assert texts_of([frames_of(labels)], tokenizer) == [text]
    assert tokenizer.decode(frames_of(labels)) == text  # as the pipeline does


def test_transformers_loses_double_letters_where_special_tokens_are_skipped():
    # Why `texts_of` does not leave it to the tokenizer; when this fails, it can.
    tokenizer = make_processor(build_vocabulary(["hello"])).tokenizer
    (labels,), _ = encode(["hello"], tokenizer)
    assert tokenizer.decode(frames_of(labels), skip_special_tokens=True) == "helo"


def test_phones_are_spelt_and_read_back(tmp_path):
    text = "HH AH L L OW"
    processor = make_processor(build_vocabulary([text], "phonemes"), "phonemes")
    processor.save_pretrained(tmp_path)
    for tokenizer in (processor.tokenizer, AutoProcessor.from_pretrained(tmp_path).tokenizer):
        assert units_of(tokenizer) == "phonemes"
        (labels,), outside = encode([f"{text} ZZ"], tokenizer)
        assert outside == {"ZZ": 1}
        assert texts_of([frames_of(labels)], tokenizer) == [text]


def test_special_labels_and_unread_utterances_are_nothing():
    tokenizer = make_processor(build_vocabulary(["ab"])).tokenizer
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    frames = [np.array([1, a, 3, 2, b, b, 0, 0]), None, np.zeros(0, dtype=np.int64), np.zeros(3, dtype=np.int64)]
    assert texts_of(frames, tokenizer) == ["ab", "", "", ""]


def naive_text(frames, tokenizer):
    """Join repeats, drop blanks and special tokens, spell: one frame after the other."""
    text, before = "", None
    for frame in frames.tolist():
        token = tokenizer.convert_ids_to_tokens(frame)
        if frame != before and token not in ("<pad>", "<s>", "</s>", "<unk>"):
            text += " " if token == "|" else token
        before = frame
    return " ".join(text.split())


def test_any_frames_read_as_one_by_one():
    tokenizer = make_processor(build_vocabulary(["abc"])).tokenizer
    generator = np.random.default_rng(0)
    frames = [generator.integers(0, len(tokenizer), size) for size in (1, 2, 7, 30, 101)]
    found = [" ".join(text.split()) for text in texts_of(frames, tokenizer)]
    assert found == [naive_text(row, tokenizer) for row in frames]
    assert found[-1] != naive_text(frames[-1][::-1], tokenizer)


@pytest.mark.parametrize(("labels", "needed"), [([], 0), ([5], 1), ([5, 6, 5], 3), ([5, 5], 3), ([5, 5, 5, 6, 6], 8)])
def test_frames_needed(labels, needed):
    assert frames_needed(np.array(labels, dtype=np.int64)) == needed


def test_what_cannot_be_trained_on():
    task = recognition("hello")
    (target,) = task.targets(labelled("hello"))
    assert task.unusable(target, 6) is None
    assert task.unusable(target, 5) == "too short for their transcript"
    assert task.unusable(np.zeros(0, dtype=np.int64), 9) == "with an empty transcript"


# -- processors


def test_a_processor_is_what_transformers_opens(tmp_path):
    make_processor(build_vocabulary(["hello moon"])).save_pretrained(tmp_path)
    processor, normalize = load_processor(tmp_path)
    assert normalize is None
    assert processor.tokenizer.get_vocab() == build_vocabulary(["hello moon"])
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(build_vocabulary(["hello moon"]))
    assert processor.feature_extractor.do_normalize
    assert processor.feature_extractor.return_attention_mask


def saved(folder, *labels, **arguments):
    recognition(*labels, **arguments).save(folder)
    return str(folder)


def test_an_existing_processor_brings_vocabulary_and_normalisation(tmp_path):
    name = saved(tmp_path, "HELLO MOON", case="upper")
    task = recognition("other letters", processor=name)
    assert task.processor.tokenizer.get_vocab() == build_vocabulary(["HELLO MOON"])
    assert task.normalization == TextNormalization(case="upper")
    assert task.config_changes()["vocab_size"] == len(build_vocabulary(["HELLO MOON"]))
    (target,) = task.targets(labelled("hello"))
    assert texts_of([frames_of(target)], task.processor.tokenizer) == ["HELLO"]
    task.save(tmp_path)
    assert TextNormalization.load(tmp_path) == task.normalization


def test_another_normalisation_than_the_processor_s_is_refused(tmp_path):
    name = saved(tmp_path, "hello", keep_punctuation="'-")
    assert recognition("x", processor=name, keep_punctuation="'-").normalization.keep == "'-"
    with pytest.raises(ArgumentError, match=r"has units=characters, case=lower.* but this run was told.*case=upper"):
        recognition("x", processor=name, case="upper")


def test_a_processor_without_normalisation_takes_the_run_s(tmp_path):
    make_processor(build_vocabulary(["A B"], "phonemes"), "phonemes").save_pretrained(tmp_path)
    assert recognition("x", processor=str(tmp_path)).normalization.units == "phonemes"
    make_processor(build_vocabulary(["HI"])).save_pretrained(tmp_path / "letters")
    assert recognition("x", processor=str(tmp_path / "letters"), case="upper").normalization.case == "upper"
    with pytest.raises(ArgumentError, match=r"has units=characters.*was told units=phonemes"):
        recognition("x", processor=str(tmp_path / "letters"), units="phonemes")


def test_folders_without_a_tokenizer_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"processor=.*nowhere has no processor with a tokenizer"):
        recognition("x", processor=str(tmp_path / "nowhere"))
    feature_extractor().save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=r"has a feature extractor, but no tokenizer|no processor with"):
        recognition("x", processor=str(tmp_path))
