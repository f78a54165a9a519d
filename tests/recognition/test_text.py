"""Transcripts to labels and back: normalisation, vocabulary, processors."""

import itertools
import json
import logging

import numpy as np
import pytest
from transformers import AutoProcessor, AutoTokenizer, Wav2Vec2CTCTokenizer

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
from dinosr_hf.utils.model_folder import FolderTokenizer, feature_extractor
from tiny import tiny_config


class Silence(SpeechSource):
    """Silent utterances of 0.1 s."""

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
    """Frames that spell labels: each label `repeats` times, then a blank."""
    return np.array([frame for label in labels for frame in [label] * repeats + [blank]], dtype=np.int64)


@pytest.mark.parametrize(
    ("text", "settings", "wanted"),
    [
        ("Hello,  World!", {}, "hello world"),
        ("don’t `stop´", {}, "don't 'stop'"),
        ("don't", {"keep": ""}, "dont"),
        ("don‘t donʻt donʼt don＇t ŉ", {}, "don't don't don't don't 'n"),
        ("don’t", {"keep": "’"}, "don't"),
        ("well-known well‐known well\u2011known −5 –", {"keep": "-"}, "well-known well-known well-known -5"),
        ("well-known well‐known well\u2011known", {}, "well known well known well known"),
        ("你好，世界？ 5，5", {"keep": ",?"}, "你好,世界? 5,5"),
        ("ok… 25℃ ❤️ 👋🏽! ™", {"keep": "…℃❤️👋"}, "ok… 25℃ ❤ 👋"),
        ("™ ™️ ㊙ ㊙️ ℹ ℹ️ Ⓜ Ⓜ️ ¨ ˜ ‗ か゛", {}, "か"),
        ("ሰላም፡ለዓለም བོད་སྐད། राम।श्याम a|b", {}, "ሰላም ለዓለም བོད སྐད राम श्याम a b"),
        ("well…maybe not...or‥so end!Next?no", {}, "well maybe not or so end next no"),
        ("ہے۔میں هل؟نعم؛لا ሰላም፧ለ 你好！世界。好", {}, "ہے میں هل نعم لا ሰላም ለ 你好 世界 好"),
        ("U.S.A. 3.5 a,b;c:d Ողջո՜ւյն", {}, "usa 35 abcd ողջույն"),
        ("a…b...c", {"keep": "."}, "a...b...c"),
        ("a…b...c", {"keep": "…"}, "a…b c"),
        ("ทำน้ำ ຄຳ ໜັງ ໝາ ⵜⴰⵎⴰⵣⵉⵖⵜⵯ kʷaˤ ㅋㅋㄱㅏ և", {}, "ทำน้ำ ຄຳ ໜັງ ໝາ ⵜⴰⵎⴰⵣⵉⵖⵜⵯ kʷaˤ ㅋㅋㄱㅏ և"),
        ("\u0e19\u0e4d\u0e32 \u0e84\u0ecd.\u0eb2", {}, "\u0e19\u0e33 \u0e84\u0eb3"),  # am of two signs
        ("צ׳ צה״ל կ՚ը", {}, "צ' צהל կ'ը"),
        ("ʰe\u0301 ﬁʰﬁ", {}, "ʰé fiʰfi"),
        ("I\u200e\u0307zmir", {"case": "lower_turkic"}, "izmir"),
        ("Well-known/old_name – really", {}, "well known old name really"),
        ("ﬁne ① Ｆ", {}, "fine 1 f"),
        ("5€ & more%", {"keep": "&"}, "5 & more"),
        ("Straße", {"case": "upper"}, "STRASSE"),
        ("Straße", {"case": "keep"}, "Straße"),
        ("\tone\n two\u00a0three ", {}, "one two three"),
        ("...", {}, ""),
        ("  AH0  B\tt̪ʰ | ", {"units": "phonemes"}, "AH0 B t̪ʰ |"),
        ("\ufeffa\u0303 ʰ\u200e \u200b ½", {"units": "phonemes"}, "ã ʰ ½"),  # NFC, not NFKC
        ("\u200fהלו\u200e co\u00adop\u2060s \ufeff!", {}, "הלו coops"),
        ("می\u200cروم؟ کتاب\u200c", {}, "می\u200cروم کتاب"),
        ("สวัสดี\u200bครับ", {}, "สวัสดี ครับ"),
        (
            "hi 👋🏽 👨\u200d👩\u200d👧 ❤\ufe0f 1\ufe0f\u20e3 ℹ\ufe0f ™\ufe0f 🈚 🏴\U000e0067\U000e007f ok",
            {},
            "hi 1 ok",
        ),
        ("naïve nai\u0308ve", {"case": "keep"}, "naïve naïve"),
        ("A\u200eB\ufe0f", {"case": "keep"}, "AB"),
        ("co\u00adop\u200e", {"keep": "'\u00ad"}, "co\u00adop"),
        ("ΐ", {"case": "upper"}, "Ϊ\u0301"),
        ("İSTANBUL ISPARTA ılık i\u0307zmir", {}, "istanbul isparta ılık izmir"),
        ("İSTANBUL I\u0307zmir ISPARTA ılık i\u0307yi", {"case": "lower_turkic"}, "istanbul izmir ısparta ılık iyi"),
        ("İstanbul Isparta i\u0307zmir", {"case": "keep"}, "İstanbul Isparta izmir"),
        ("i\u0307\u0301", {}, "i\u0307\u0301"),  # Lithuanian
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
def test_unknown_normalisation_raises(settings, message):
    with pytest.raises(ValueError, match=message):
        TextNormalization(**settings)


def test_normalisation_is_saved(tmp_path):
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
def test_invalid_normalisation_file_raises(tmp_path, content):
    (tmp_path / NORMALIZATION_FILE).write_text(content)
    with pytest.raises(ValueError, match=f"{NORMALIZATION_FILE} is not a text normalisation"):
        TextNormalization.load(tmp_path)


def test_vocabulary_has_the_characters_of_the_texts():
    wanted = ["<pad>", "<s>", "</s>", "<unk>", "|", "'", "a", "b", "ä"]
    assert list(build_vocabulary(["ab a", "bä'"])) == wanted
    assert list(build_vocabulary(["ab a", "bä'"]).values()) == list(range(9))


def test_vocabulary_of_phones():
    found = build_vocabulary(["AH B", "B |"], "phonemes")
    assert list(found) == ["<pad>", "<s>", "</s>", "<unk>", "AH", "B", "|"]


@pytest.mark.parametrize(
    ("texts", "units", "message"),
    [
        ([], "characters", "All transcripts are empty after normalisation"),
        (["", " "], "characters", "All transcripts are empty after normalisation"),
        (["a <s>"], "phonemes", "contain the special tokens <s>"),
    ],
)
def test_texts_without_vocabulary_raise(texts, units, message):
    with pytest.raises(ValueError, match=message):
        build_vocabulary(texts, units)


def test_vocabulary_comes_from_the_training_transcripts_only(caplog):
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


def test_training_transcripts_cause_no_warning(caplog):
    task = recognition("hello moon")
    task.targets(labelled("hello moon"))
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []


@pytest.mark.parametrize("delimiter", [" ", "|"])
def test_delimiter_and_labels_of_several_characters_are_the_tokenizer_s(tmp_path, delimiter):
    labels = ["<pad>", "<s>", "</s>", "<unk>", delimiter, "a", "b", "c", "h", "ch"]
    (tmp_path / "vocab.json").write_text(json.dumps({label: number for number, label in enumerate(labels)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), word_delimiter_token=delimiter)
    (found,), dropped = encode(["ab chab hc"], tokenizer)
    assert found.tolist() == [5, 6, 4, 9, 5, 6, 4, 8, 7] and not dropped
    assert tokenizer.decode(found, group_tokens=False) == "ab chab hc"
    # The reason why `encode` is not the tokenizer's own; when this fails, it can be.
    assert tokenizer("ab chab hc").input_ids != found.tolist()


def test_the_audio_settings_of_a_foreign_processor_are_not_taken(tmp_path):
    processor = make_processor(build_vocabulary(["hi"]))
    processor.feature_extractor.do_normalize = processor.feature_extractor.return_attention_mask = False
    processor.save_pretrained(tmp_path)
    task = recognition("hi", processor=str(tmp_path))
    task.save(tmp_path / "out")
    extractor = AutoProcessor.from_pretrained(tmp_path / "out").feature_extractor
    assert extractor.do_normalize and extractor.return_attention_mask


def test_characters_outside_the_vocabulary_count_as_errors(tmp_path):
    task = recognition("no oh")
    source = labelled("no", "zoo")
    targets = task.targets(source)
    predictions = [frames_of(target) for target in targets]
    assert task.report(source, predictions, tmp_path, "test") == {"wer": 0.5, "cer": 1 / 5}
    # The metric that selects the best checkpoint counts what the vocabulary can spell.
    prediction = type("P", (), {"predictions": predictions, "label_ids": targets})
    assert task.metrics(prediction) == {"wer": 0.0, "cer": 0.0, "ranking": 0.0}


@pytest.mark.parametrize("text", ["hello", "aa", "hello moon ooh", "o o", "don't", "a 'b' n't ."])
def test_spelled_frames_are_read_back(text):
    tokenizer = make_processor(build_vocabulary([text])).tokenizer
    (labels,), outside = encode([text], tokenizer)
    assert not outside
    assert texts_of([frames_of(labels)], tokenizer) == [text]
    assert tokenizer.decode(frames_of(labels)) == text  # as in the pipeline


def test_transformers_loses_double_letters_when_skipping_special_tokens():
    # The reason why `texts_of` does not use `skip_special_tokens`; when this test fails, it can.
    tokenizer = make_processor(build_vocabulary(["hello"])).tokenizer
    (labels,), _ = encode(["hello"], tokenizer)
    assert tokenizer.decode(frames_of(labels), skip_special_tokens=True) == "helo"


def test_spelled_phones_are_read_back(tmp_path):
    text = "HH AH L L OW"
    processor = make_processor(build_vocabulary([text], "phonemes"), "phonemes")
    processor.save_pretrained(tmp_path)
    for tokenizer in (processor.tokenizer, AutoProcessor.from_pretrained(tmp_path).tokenizer):
        assert units_of(tokenizer) == "phonemes"
        (labels,), outside = encode([f"{text} ZZ"], tokenizer)
        assert outside == {"ZZ": 1}
        assert texts_of([frames_of(labels)], tokenizer) == [text]


def test_special_labels_and_unread_utterances_are_empty():
    tokenizer = make_processor(build_vocabulary(["ab"])).tokenizer
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    frames = [np.array([1, a, 3, 2, b, b, 0, 0]), None, np.zeros(0, dtype=np.int64), np.zeros(3, dtype=np.int64)]
    assert texts_of(frames, tokenizer) == ["ab", "", "", ""]


def naive_text(frames, tokenizer):
    """Merge repetitions, drop blanks and special tokens, and spell, frame by frame."""
    text, before = "", None
    for frame in frames.tolist():
        token = tokenizer.convert_ids_to_tokens(frame)
        if frame != before and token not in ("<pad>", "<s>", "</s>", "<unk>"):
            text += " " if token == "|" else token
        before = frame
    return " ".join(text.split())


def test_texts_of_equal_naive_text():
    tokenizer = make_processor(build_vocabulary(["abc"])).tokenizer
    generator = np.random.default_rng(0)
    frames = [generator.integers(0, len(tokenizer), size) for size in (1, 2, 7, 30, 101)]
    found = [" ".join(text.split()) for text in texts_of(frames, tokenizer)]
    assert found == [naive_text(row, tokenizer) for row in frames]
    assert found[-1] != naive_text(frames[-1][::-1], tokenizer)


@pytest.mark.parametrize(("labels", "needed"), [([], 0), ([5], 1), ([5, 6, 5], 3), ([5, 5], 3), ([5, 5, 5, 6, 6], 8)])
def test_frames_needed(labels, needed):
    assert frames_needed(np.array(labels, dtype=np.int64)) == needed


def test_transcripts_that_look_alike_have_the_same_labels():
    plain = recognition("می\u200cروم é", "oh no")
    marked = recognition("\u200fمی\u200c\u200cروم\u200e e\u0301", "\ufeffoh\u2060 \u200bno")
    assert marked.processor.tokenizer.get_vocab() == plain.processor.tokenizer.get_vocab()
    (wanted,), (found,) = (plain.targets(labelled(text)) for text in ("oh no", "o\u200eh n\ufe0fo"))
    assert wanted.tolist() == found.tolist() != []


def test_a_vocabulary_of_decomposed_phones_stays_usable(tmp_path):
    make_processor(build_vocabulary(["a\u0303 t b\u200e"], "phonemes"), "phonemes").save_pretrained(tmp_path)
    TextNormalization("phonemes").save(tmp_path)
    task = recognition("t", processor=str(tmp_path))
    source = labelled("ã t", "a\u0303 b")
    targets = task.targets(source)
    assert [len(target) for target in targets] == [2, 2]
    assert task.report(source, [frames_of(target) for target in targets], tmp_path, "test") == {"wer": 0.0, "cer": 0.0}


def test_predictions_are_normalised_like_references(tmp_path):
    make_processor(build_vocabulary(["haʻi"])).save_pretrained(tmp_path)  # of an older release
    task = recognition("hi", processor=str(tmp_path))
    (frames,), _ = encode(["haʻi"], task.processor.tokenizer)
    assert task.report(labelled("haʻi"), [frames_of(frames)], tmp_path, "test") == {"wer": 0.0, "cer": 0.0}


@pytest.mark.parametrize("case", ["lower", "upper", "keep", "lower_turkic"])
def test_normalised_texts_stay_as_they_are(case):
    normalize = TextNormalization(case=case, keep="'-…")
    signs = [*"aİIßΣ’´ŉ‐….!（ﬁ¨\u200d\u200eก\u0e4d\u0e32\u200b\u0307", "क्"]
    for text in map("".join, itertools.product(signs, repeat=3)):
        assert normalize(normalize(text)) == normalize(text)


def test_utterances_excluded_from_training():
    task = recognition("hello")
    (target,) = task.targets(labelled("hello"))
    assert task.exclusion_reason(target, 6) is None
    assert task.exclusion_reason(target, 5) == "too short for their transcript"
    assert task.exclusion_reason(np.zeros(0, dtype=np.int64), 9) == "with an empty transcript"


def test_a_transcript_without_any_known_label_is_empty():
    task = recognition("hello moon")
    targets = task.targets(labelled("zz zz", "zz moon"))
    assert [len(target) for target in targets] == [0, len("|moon")]
    assert task.exclusion_reason(targets[0], 9) == "with an empty transcript"


def test_transformers_loads_the_processor(tmp_path):
    make_processor(build_vocabulary(["hello moon"])).save_pretrained(tmp_path)
    processor, normalize = load_processor(tmp_path)
    assert normalize is None
    assert processor.tokenizer.get_vocab() == build_vocabulary(["hello moon"])
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(build_vocabulary(["hello moon"]))
    assert processor.feature_extractor.do_normalize
    assert processor.feature_extractor.return_attention_mask


def test_transformers_finds_a_bare_vocabulary_in_a_subfolder(tmp_path):
    tiny_config().save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "vocab.json").write_text(json.dumps(build_vocabulary(["hello moon"])))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, subfolder="bare")
    assert tokenizer.get_vocab() == build_vocabulary(["hello moon"])
    with pytest.raises(ValueError, match=r"has no tokenizer: vocab\.json is not there"):
        FolderTokenizer.from_pretrained(tmp_path)


def saved(folder, *labels, **arguments):
    recognition(*labels, **arguments).save(folder)
    return str(folder)


def test_existing_processor_sets_vocabulary_and_normalisation(tmp_path):
    name = saved(tmp_path, "HELLO MOON", case="upper")
    task = recognition("other hello", processor=name)
    assert task.processor.tokenizer.get_vocab() == build_vocabulary(["HELLO MOON"])
    assert task.normalization == TextNormalization(case="upper")
    assert task.config_changes()["vocab_size"] == len(build_vocabulary(["HELLO MOON"]))
    (target,) = task.targets(labelled("hello"))
    assert texts_of([frames_of(target)], task.processor.tokenizer) == ["HELLO"]
    task.save(tmp_path)
    assert TextNormalization.load(tmp_path) == task.normalization


def test_normalisation_that_differs_from_the_processor_raises(tmp_path):
    name = saved(tmp_path, "hello", keep_punctuation="'-")
    assert recognition("hello", processor=name, keep_punctuation="'-").normalization.keep == "'-"
    with pytest.raises(ArgumentError, match=r"has units=characters, case=lower.* but the arguments are.*case=upper"):
        recognition("x", processor=name, case="upper")


def test_processor_without_normalisation_takes_the_arguments(tmp_path):
    make_processor(build_vocabulary(["A B"], "phonemes"), "phonemes").save_pretrained(tmp_path)
    assert recognition("B", processor=str(tmp_path)).normalization.units == "phonemes"
    make_processor(build_vocabulary(["HI"])).save_pretrained(tmp_path / "letters")
    assert recognition("hi", processor=str(tmp_path / "letters"), case="upper").normalization.case == "upper"
    with pytest.raises(ArgumentError, match=r"lacks most labels of .*, such as h i\. .* \| H I\. .*case .*lower"):
        recognition("hi hi", processor=str(tmp_path / "letters"))
    with pytest.raises(ArgumentError, match=r"has units=characters.*arguments are units=phonemes"):
        recognition("x", processor=str(tmp_path / "letters"), units="phonemes")


def test_folders_without_a_tokenizer_raise(tmp_path):
    with pytest.raises(ArgumentError, match=r"processor=.*nowhere is neither a folder nor a model"):
        recognition("x", processor=str(tmp_path / "nowhere"))
    feature_extractor().save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=r"has a feature extractor but no tokenizer"):
        recognition("x", processor=str(tmp_path))
