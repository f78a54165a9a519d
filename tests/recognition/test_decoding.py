"""Decoding of CTC emissions: greedy search against the tokenizer, beam search against all paths, times, errors."""

import base64
import gzip
import itertools
import json
import logging
import math
import platform
import sys

import numpy as np
import pytest

from dinosr_hf.recognition import make_processor
from dinosr_hf.recognition.decoding import BeamSearchDecoder, DecodingOptions, GreedyDecoder
from dinosr_hf.recognition.language_models import read_lexicon
from emissions import LABELS, NAMED, PATH, TIMES, of_path, tokenizer_of
from language_models import ArpaScorer, write_arpa
from tiny import tiny_config

PHONES = {"blank_id": 1, "special_ids": [4]}
WORDS = ["a", "ab", "ba", "abb"]
SENTENCES = ["a ab", "ab ba a", "ba ab", "ab ab a ba", "a"]
WIDE = {"beam_size": 100_000, "beam_threshold": 1e6}


def emissions(num_frames, num_labels=5, seed=0, scale=2.0):
    logits = scale * np.random.default_rng(seed).standard_normal((num_frames, num_labels))
    return (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def word_model(tmp_path_factory):
    return str(write_arpa(tmp_path_factory.mktemp("words") / "words.arpa", SENTENCES, order=2))


@pytest.fixture(scope="module")
def label_model(tmp_path_factory):
    spelled = [" ".join(sentence.replace(" ", "|")) for sentence in SENTENCES]
    return str(write_arpa(tmp_path_factory.mktemp("labels") / "labels.arpa", spelled, order=3))


def slow_scores(log_probs, options, words=None, delimiter="|", labels=LABELS):
    """Score every text by enumerating all paths, whose scores are added or compared."""
    model = ArpaScorer(options.language_model) if options.language_model else None
    of_labels, log_probs = {}, log_probs.astype(np.float64)
    allowed = [index for index, label in enumerate(labels) if label != "<unk>"]
    add = np.logaddexp if options.log_add else max
    for path in itertools.product(allowed, repeat=len(log_probs)):
        score = sum(log_probs[frame, index] for frame, index in enumerate(path))
        score += options.silence_score * sum(labels[index] == delimiter for index in path)
        read = tuple(labels[index] for index, _ in itertools.groupby(path) if labels[index] != "<pad>")
        of_labels[read] = add(of_labels.get(read, -math.inf), score)
    scores = {}
    if words is not None:
        # Only the words count: delimiters at the ends and repeated ones make no difference.
        of_words = {}
        for read, score in of_labels.items():
            key = tuple("".join(read).replace(delimiter, " ").split())
            of_words[key] = add(of_words.get(key, -math.inf), score)
        for key, score in of_words.items():
            if set(key) <= set(words):
                language = model.sentence(key) if model else 0.0
                scores[" ".join(key)] = score + options.lm_weight * language + options.word_score * len(key)
        return scores
    for read, score in of_labels.items():
        text = " ".join("".join(read).replace(delimiter, " ").split()) if delimiter else " ".join(read)
        total = score + (options.lm_weight * model.sentence(read) if model else 0.0)
        scores[text] = add(scores.get(text, -math.inf), total)
    return scores


def assert_same(found, slow):
    """Compare the best texts and scores of the search, in order, with `slow_scores`."""
    expected = sorted(slow.items(), key=lambda item: -item[1])[: len(found)]
    assert [hypothesis.text for hypothesis in found] == [text for text, _ in expected]
    np.testing.assert_allclose([hypothesis.score for hypothesis in found], [s for _, s in expected], atol=1e-4)


@pytest.mark.parametrize("log_add", [True, False], ids=["sum", "best-path"])
@pytest.mark.parametrize("seed", range(4))
class TestAgainstAllPaths:
    def test_labels(self, seed, log_add):
        options = DecodingOptions(log_add=log_add, **WIDE)
        log_probs = emissions(5, seed=seed)
        found = BeamSearchDecoder(LABELS, options=options, **NAMED).decode(log_probs, num_best=7)
        assert len(found) == 7
        assert_same(found, slow_scores(log_probs, options))

    def test_labels_with_model(self, seed, log_add, label_model):
        options = DecodingOptions(label_model, lm_weight=0.7, log_add=log_add, **WIDE)
        log_probs = emissions(5, seed=seed)
        found = BeamSearchDecoder(LABELS, options=options, **NAMED).decode(log_probs, num_best=7)
        assert_same(found, slow_scores(log_probs, options))

    def test_words(self, seed, log_add):
        options = DecodingOptions(word_score=0.3, log_add=log_add, **WIDE)
        log_probs = emissions(6, seed=seed)
        found = BeamSearchDecoder(LABELS, options=options, words=WORDS, **NAMED).decode(log_probs, num_best=7)
        assert len(found) == 7
        assert_same(found, slow_scores(log_probs, options, WORDS))

    def test_words_with_model(self, seed, log_add, word_model):
        options = DecodingOptions(
            word_model, lm_weight=1.3, word_score=-0.4, silence_score=-0.2, log_add=log_add, **WIDE
        )
        log_probs = emissions(6, seed=seed)
        found = BeamSearchDecoder(LABELS, options=options, words=WORDS, **NAMED).decode(log_probs, num_best=7)
        assert_same(found, slow_scores(log_probs, options, WORDS))

    def test_phonemes(self, seed, log_add):
        options = DecodingOptions(log_add=log_add, **WIDE)
        log_probs = emissions(5, seed=seed)
        found = BeamSearchDecoder(LABELS, options=options, **PHONES).decode(log_probs, num_best=7)
        assert_same(found, slow_scores(log_probs, options, delimiter=None))


def test_slow_scores_depend_on_the_options(word_model):
    # Negative control: another base, weight or way of adding changes the best score by more than the tolerance.
    log_probs = emissions(6)
    options = DecodingOptions(word_model, lm_weight=1.3, word_score=-0.4, log_add=True, **WIDE)
    best = max(slow_scores(log_probs, options, WORDS).values())
    for lm_weight, word_score, log_add in [(1.3 * math.log(10), -0.4, True), (1.3, 0.4, True), (1.3, -0.4, False)]:
        other = DecodingOptions(word_model, lm_weight=lm_weight, word_score=word_score, log_add=log_add)
        assert abs(best - max(slow_scores(log_probs, other, WORDS).values())) > 0.01


CHARACTERS = ["<s>", "a", "</s>", "b", "|", "<unk>", "<pad>", "c", "d", "'"]
# Labels of several characters, of which the longest that fits is to be taken.
LONG = ["<pad>", "|", "a", "ab", "s", "sh", "t", "b", "<unk>"]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("do_lower_case", [False, True], ids=["as-is", "lower"])
def test_greedy_text_equals_the_tokenizer(tmp_path, seed, do_lower_case):
    labels = [label if "<" in label else label.upper() for label in CHARACTERS] if do_lower_case else CHARACTERS
    tokenizer = tokenizer_of(tmp_path, labels, do_lower_case=do_lower_case)
    config = tiny_config(vocab_size=len(labels), pad_token_id=6)
    decoder = GreedyDecoder.from_tokenizer(tokenizer, config)
    log_probs = emissions(37, len(labels), seed)
    log_probs[:, [0, 2, 5]] -= 20  # the tokenizer would output special labels
    log_probs -= np.logaddexp.reduce(log_probs, axis=1, keepdims=True)
    (found,) = decoder.decode(log_probs)
    # The tokenizer makes two spaces of a repeated delimiter.
    assert found.text == " ".join(tokenizer.batch_decode(log_probs.argmax(-1)[None])[0].split())
    assert len(found.text) > 5
    assert found.text == " ".join(word.word for word in found.words)
    assert found.score == pytest.approx(log_probs.max(axis=1).sum(), rel=1e-5)


def test_greedy_never_outputs_special_labels(tmp_path):
    tokenizer = tokenizer_of(tmp_path, CHARACTERS)
    decoder = GreedyDecoder.from_tokenizer(tokenizer, tiny_config(vocab_size=len(CHARACTERS), pad_token_id=6))
    log_probs = of_path(["a", "<unk>", "<s>", "b"], CHARACTERS)
    log_probs[1:3, 7] += 5  # the second best label is c
    log_probs -= np.logaddexp.reduce(log_probs, axis=1, keepdims=True)
    assert tokenizer.batch_decode(log_probs.argmax(-1)[None]) == ["a<unk><s>b"]
    assert decoder.decode(log_probs)[0].text == "acb"


def test_labels_of_several_characters(tmp_path):
    tokenizer = tokenizer_of(tmp_path, LONG)
    config = tiny_config(vocab_size=len(LONG), pad_token_id=0)
    words = ["tab", "shab", "ssh", "abba"]
    decoder = BeamSearchDecoder.from_tokenizer(tokenizer, config, words=[*words, "tax"])
    for word in words:
        indices = tokenizer(word).input_ids
        assert [LONG[index] for index in indices] == [LONG[index] for index in decoder._spell(word)]
        path = [label for index in indices for label in (LONG[index], "<pad>")]
        assert decoder.decode(of_path(path, LONG))[0].text == word
        assert GreedyDecoder.from_tokenizer(tokenizer, config).decode(of_path(path, LONG))[0].text == word
    assert decoder._spell("tax") is None


def test_lower_case_words_of_upper_case_labels(tmp_path):
    labels = ["<pad>", "|", "A", "B", "<unk>"]
    tokenizer = tokenizer_of(tmp_path, labels, do_lower_case=True)
    config = tiny_config(vocab_size=5, pad_token_id=0)
    log_probs = of_path(["A", "B", "|", "A"], labels)
    for words in (["ab", "a"], None):
        decoder = BeamSearchDecoder.from_tokenizer(tokenizer, config, words=words)
        assert decoder.decode(log_probs)[0].text == "ab a"


def test_without_delimiter_each_label_is_a_word(tmp_path):
    labels = ["<pad>", "h", "ə", "l", "oʊ", "<unk>"]
    config = tiny_config(vocab_size=6, pad_token_id=0)
    log_probs = of_path(["h", "ə", "l", "l", "<pad>", "l", "oʊ"], labels)
    phoneme_tokenizer = make_processor({label: index for index, label in enumerate(labels)}, "phonemes").tokenizer
    assert phoneme_tokenizer.batch_decode(log_probs.argmax(-1)[None]) == ["h ə l l oʊ"]
    for tokenizer in (phoneme_tokenizer, tokenizer_of(tmp_path, labels)):
        for decoder in (GreedyDecoder, BeamSearchDecoder):
            (found,) = decoder.from_tokenizer(tokenizer, config).decode(log_probs)
            assert found.text == "h ə l l oʊ"
            assert [word.word for word in found.words] == found.text.split()
    with pytest.raises(ValueError, match="needs a word delimiter among the labels"):
        BeamSearchDecoder.from_tokenizer(tokenizer, config, words=["hə"])
    with pytest.raises(ValueError, match=r"silence_score=1.* Leave it at 0"):
        BeamSearchDecoder.from_tokenizer(tokenizer, config, options=DecodingOptions(silence_score=1.0))


def test_tokenizer_of_another_model_raises(tmp_path):
    tokenizer = tokenizer_of(tmp_path, CHARACTERS)
    for changes in ({"vocab_size": 5, "pad_token_id": 4}, {"vocab_size": 10, "pad_token_id": 0}):
        with pytest.raises(ValueError, match="'<pad>' is label 6, but the model's blank is label"):
            GreedyDecoder.from_tokenizer(tokenizer, tiny_config(**changes))


def all_decoders(**options):
    yield GreedyDecoder(LABELS, **NAMED, **options)
    yield BeamSearchDecoder(LABELS, **NAMED, **options)
    yield BeamSearchDecoder(LABELS, words=WORDS, **NAMED, **options)


@pytest.mark.parametrize("search", [0, 1, 2], ids=["greedy", "labels", "words"])
def test_word_times(search):
    # The words are in frames 2 to 5 and 9, with centres at 52.5, 112.5 and 192.5 ms.
    def times(path, **options):
        (found,) = list(all_decoders(**TIMES, **options))[search].decode(of_path(path))
        assert found.text == "ab a"
        return [(round(start, 6), round(end, 6)) for _, start, end in found.words]

    assert times(PATH, lead_seconds=0, tail_seconds=0) == [(0.0525, 0.1125), (0.1925, 0.1925)]
    assert times(PATH, lead_seconds=0.03, tail_seconds=0.02) == [(0.0225, 0.1325), (0.1625, 0.2125)]
    # The first word ends where the next one starts, and both stay within the 245 ms that the frames see.
    assert times(PATH, lead_seconds=0.06, tail_seconds=0.06) == [(0.0, 0.1325), (0.1325, 0.245)]
    assert times([*PATH, *["<pad>"] * 5], lead_seconds=0.06, tail_seconds=0.06)[1] == (0.1325, 0.2525)
    # No word starts before the last label of the previous one.
    assert times(PATH, lead_seconds=0.1, tail_seconds=0) == [(0.0, 0.1125), (0.1125, 0.1925)]
    assert times(PATH[2:], lead_seconds=0.01, tail_seconds=0.01)[0] == (0.0025, 0.0825)


def test_times_follow_the_frames_of_the_model(tmp_path):
    tokenizer, config = tokenizer_of(tmp_path, LABELS), tiny_config(vocab_size=5, pad_token_id=1)
    (found,) = GreedyDecoder.from_tokenizer(tokenizer, config, lead_seconds=0, tail_seconds=0).decode(of_path(PATH))
    center = (2 * config.inputs_to_logits_ratio + config.receptive_field / 2) / 16_000
    assert found.words[0].start == pytest.approx(center)


def test_word_times_of_all_hypotheses():
    for decoder in all_decoders():
        if isinstance(decoder, GreedyDecoder):
            continue
        for found in decoder.decode(emissions(23), num_best=5):
            assert found.text == " ".join(word.word for word in found.words)
            times = [time for word in found.words for time in (word.start, word.end)]
            assert times == sorted(times)
            assert all(word.start < word.end for word in found.words)


@pytest.mark.parametrize("search", [0, 1, 2], ids=["greedy", "labels", "words"])
def test_batches_and_empty_utterances(search):
    decoder = list(all_decoders())[search]
    utterances = [emissions(7, seed=1), emissions(11, seed=2), emissions(0)]
    batch = np.full((3, 11, len(LABELS)), np.nan, dtype=np.float32)  # padding must be ignored
    for row, utterance in zip(batch, utterances, strict=True):
        row[: len(utterance)] = utterance
    found = decoder.decode_batch(batch, [7, 11, 0])
    assert found == [decoder.decode(utterance) for utterance in utterances]
    assert found[2] == [("", 0.0, [])]
    assert found[0] != found[1]
    for num_frames in ([7, 11], [7, 12, 0], [7, 11, -1]):
        with pytest.raises(ValueError, match=r"log_probs is \(3, 11, 5\) and num_frames is .* numbers from 0 to T"):
            decoder.decode_batch(batch, num_frames)


@pytest.mark.parametrize("search", [0, 1, 2], ids=["greedy", "labels", "words"])
def test_invalid_emissions_raise(search):
    decoder, log_probs = list(all_decoders())[search], emissions(4)
    with pytest.raises(ValueError, match=r"log_probs is \(4, 4\), but must be \(T, 5\)"):
        decoder.decode(log_probs[:, 1:])
    with pytest.raises(ValueError, match="contains NaN or infinity"):
        decoder.decode(np.where(log_probs == log_probs.max(), np.nan, log_probs))
    with pytest.raises(ValueError, match=r"add up to 2\.72 instead of 1\. Apply log_softmax"):
        decoder.decode(log_probs + 1)
    with pytest.raises(ValueError, match="num_best=0"):
        decoder.decode(log_probs, num_best=0)
    decoder.decode(log_probs.astype(np.float16))


def test_greedy_with_num_best_raises():
    with pytest.raises(ValueError, match=r"num_best=2, but greedy search has a single.* BeamSearchDecoder"):
        GreedyDecoder(LABELS, **NAMED).decode(emissions(4), num_best=2)


def test_invalid_labels_raise():
    with pytest.raises(ValueError, match="word_delimiter_id=5 is out of range: labels has 5 entries"):
        GreedyDecoder(LABELS, blank_id=1, word_delimiter_id=5)
    with pytest.raises(ValueError, match="labels has 'a' more than once"):
        GreedyDecoder(["a", "<pad>", "a"], blank_id=1)
    GreedyDecoder(["a", "<pad>", "a"], blank_id=1, special_ids=[2])


def test_only_words_of_the_lexicon_are_output():
    log_probs = of_path(["b", "b", "<pad>", "b", "|", "a"])
    assert GreedyDecoder(LABELS, **NAMED).decode(log_probs)[0].text == "bb a"
    (found,) = BeamSearchDecoder(LABELS, words=["ba", "a", "ab"], **NAMED).decode(log_probs)
    assert set(found.text.split()) <= {"ba", "a", "ab"}


def test_unfinished_word_is_left_out():
    log_probs = of_path(["a", "|", "b", "b"])
    decoder = BeamSearchDecoder(LABELS, words=["a", "ba"], options=DecodingOptions(beam_size=1), **NAMED)
    (found,) = decoder.decode(log_probs)
    assert (found.text, len(found.words)) == ("a", 1)
    assert -20 < found.score < 0


def test_language_model_weight_changes_the_text(tmp_path):
    # The emissions favour "ba", the language model "ab" after "a".
    model = str(write_arpa(tmp_path / "lm.arpa", ["a ab"] * 5 + ["ba"], order=2))
    log_probs = np.log(np.full((6, 5), 1e-4, dtype=np.float32))
    for frame, label in enumerate([[0], [3], [0, 2], [1], [2, 0], [1]]):
        log_probs[frame, label] = 0
    log_probs[2, 2] += 0.5
    log_probs -= np.logaddexp.reduce(log_probs, axis=1, keepdims=True)
    decoder = BeamSearchDecoder(LABELS, words=["a", "ab", "ba"], options=DecodingOptions(model), **NAMED)
    assert decoder.decode(log_probs)[0].text == "a ab"
    assert decoder.reweighted(0.0, 0.0).decode(log_probs)[0].text == "a ba"
    assert decoder.decode(log_probs)[0].text == "a ab", "reweighted changed the original decoder"


def test_word_score_changes_the_number_of_words():
    log_probs = of_path(["a", "<pad>", "b"])
    log_probs[1, 3] = log_probs[1, 1] - 1
    log_probs -= np.logaddexp.reduce(log_probs, axis=1, keepdims=True)
    decoder = BeamSearchDecoder(LABELS, words=["a", "b", "ab"], **NAMED)
    assert [decoder.reweighted(0.0, score).decode(log_probs)[0].text for score in (0.0, 3.0)] == ["ab", "a b"]


def test_narrow_beams_score_lower():
    # Negative control: beam_size, beam_size_token and beam_threshold each change the result.
    log_probs = emissions(40, scale=0.5, seed=3)

    def score(**options):
        return (
            BeamSearchDecoder(LABELS, options=DecodingOptions(log_add=True, **options), **NAMED)
            .decode(log_probs)[0]
            .score
        )

    full = score(beam_size=300)
    assert score(beam_size=2) < full
    assert score(beam_size=300, beam_size_token=2) < full
    assert score(beam_size=300, beam_threshold=0.5) < full
    assert score(beam_size=300, beam_size_token=99) == full


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beam_size": 0}, "beam_size=0 is out of range: it must be at least 1"),
        ({"beam_size_token": 0}, "beam_size_token=0 is out of range: it must be at least 1"),
        ({"beam_threshold": 0.0}, "beam_threshold=0.0 is out of range: it must be more than 0"),
        ({"lm_weight": math.nan}, "lm_weight=nan is out of range: it must be a finite number"),
        ({"word_score": -math.inf}, "word_score=-inf is out of range: it must be a finite number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_invalid_options_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        DecodingOptions(**changes)


def test_words_and_lexicon_together_raise(tmp_path):
    with pytest.raises(ValueError, match="Leave out one"):
        BeamSearchDecoder(LABELS, words=["a"], options=DecodingOptions(lexicon=str(tmp_path)), **NAMED)


def test_missing_flashlight_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashlight.lib.text.decoder", None)
    with pytest.raises(ImportError, match=r'pip install "dinosr-hf\[lm\]"'):
        BeamSearchDecoder(LABELS, **NAMED)
    GreedyDecoder(LABELS, **NAMED)


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("ab\n\nba\n", [("ab", None), ("ba", None)]),
        ("ab\ta b |\nab\tb |\n", [("ab", ["a", "b", "|"]), ("ab", ["b", "|"])]),
        ("ab a b\n", [("ab", ["a", "b"])]),
        ("a\u00a0b\n\u3000a\ta b\n", [("a\u00a0b", None), ("\u3000a", ["a", "b"])]),
    ],
    ids=["words", "flashlight", "spaces", "other spaces"],
)
def test_lexicon_files(tmp_path, text, entries):
    (tmp_path / "lexicon.txt").write_text(text)
    assert read_lexicon(tmp_path / "lexicon.txt") == entries
    (tmp_path / "lexicon.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert read_lexicon(tmp_path / "lexicon.txt.gz") == entries


def test_arpa_file_is_a_lexicon(word_model):
    assert sorted(read_lexicon(word_model)) == [("a", None), ("ab", None), ("ba", None)]
    decoder = BeamSearchDecoder(LABELS, options=DecodingOptions(word_model, word_model), **NAMED)
    assert decoder.decode(of_path(["a", "b", "|", "b", "a"]))[0].text == "ab ba"


def test_spellings_of_a_lexicon(tmp_path):
    # Two spellings of one word, two words of one spelling, and spellings with and without a delimiter at the end.
    (tmp_path / "lexicon.txt").write_text("one\ta b |\none\tb a\ntwo\tb a |\n")
    options = DecodingOptions(lexicon=str(tmp_path / "lexicon.txt"), word_score=0.0)
    decoder = BeamSearchDecoder(LABELS, options=options, **NAMED)
    assert decoder.decode(of_path(["a", "b"]))[0].text == "one"
    assert {found.text for found in decoder.decode(of_path(["b", "a", "|"]), num_best=2)} == {"one", "two"}


def test_words_of_a_lexicon_that_look_alike(tmp_path):
    text = "\u200eab\ufe0f\nbe\u0301\na\tbe\u0301 \u2060a\n"
    (tmp_path / "lexicon.txt").write_text(text, encoding="utf-8")
    labels = ["a", "<pad>", "bé", "|", "<unk>", "b"]
    decoder = BeamSearchDecoder(labels, options=DecodingOptions(lexicon=str(tmp_path / "lexicon.txt")), **NAMED)

    def read(*path):
        frames = np.full((2 * len(path), len(labels)), 0.02, dtype=np.float32)
        spoken = [labels.index(label) for name in path for label in (name, "<pad>")]
        frames[np.arange(len(spoken)), spoken] = 0.9
        return decoder.decode(np.log(frames))[0].text

    assert [read("a", "b"), read("bé"), read("bé", "a")] == ["ab", "bé", "a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a file. Give a file with one word"),
        ("\n", "is empty"),
        ("AB\nBA\n", r"None of the 2 words .*: AB, BA\. The labels are a b \|\. .* upper case against lower case"),
        ("".join(f"w{number}\ta b\n" for number in range(7)), "7 words of the lexicon have the same labels"),
        (b"\xff\xfe", "is not UTF-8"),
        (
            "\\data\\\nngram 1=2\n\n\\1-grams:\n-1\tab\n-1.",
            r"'-1\.' below .1-grams: has no word\. Is the file cut",
        ),
    ],
    ids=["missing", "empty", "upper-case", "crowded", "latin", "cut"],
)
def test_invalid_lexicons_raise(tmp_path, text, message):
    if text is not None:
        (tmp_path / "lexicon.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        BeamSearchDecoder(LABELS, options=DecodingOptions(lexicon=str(tmp_path / "lexicon.txt")), **NAMED)


def test_empty_list_of_words_raises():
    with pytest.raises(ValueError, match="The lexicon is empty"):
        BeamSearchDecoder(LABELS, words=[], **NAMED)


def test_words_that_cannot_be_spelled_are_reported(caplog):
    with caplog.at_level(logging.WARNING):
        decoder = BeamSearchDecoder(LABELS, words=["ab", "xa", "b", "a|b", "<s>"], **NAMED)
    assert "Skipped 3 words of the lexicon that the labels cannot spell: xa, a|b, <s>." in caplog.text
    assert decoder.decode(of_path(["b"]))[0].text == "b"


# A bigram of ab, b, <unk> over the sentence "ab b" (KenLM's build_binary trie), compressed with gzip.
BINARY = (
    "H4sICJQ/BmsCA2xtLnRyaWUuYmluAMvNTSxQyMlVyCgpKbDS18/OSE1My0zNSdFLzs/VT85PSVVIyy/KTSxRKEstKs7Mz1Mw5WJA"
    "gAZ7ILGfEUj8BwKQCCNUhglMHrBngoqBMCtUjhnJBBYoXVCnuNeyrZThx8Xgf5ta9yVx5Xz/WFv8INtcS2tS7Z/uVwgdB/aDLEbw"
    "jx2aNXPmPiQj958944PEbwCrh7nL2NgYKH9mLxMDKmBmwA4y09I+BRobX16elpYmjyxhU5qXbcdgU2zHkJjEYKMPpJMYADg/B3lN"
    "AQAA"
)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="KenLM's binary files depend on the architecture")
def test_kenlm_binary(tmp_path):
    binary = tmp_path / "lm.bin"
    binary.write_bytes(gzip.decompress(base64.b64decode(BINARY)))
    options = DecodingOptions(str(binary), lm_weight=1.0, word_score=0.0)
    (found,) = BeamSearchDecoder(LABELS, words=["ab", "b"], options=options, **NAMED).decode(
        of_path(["a", "b", "|", "b"])
    )
    # log10 P(ab | <s>) + log10 P(b | ab) + log10 P(</s> | b), and almost nothing for the labels.
    assert found.score == pytest.approx(-0.2 - 0.4 - 0.3, abs=0.01)
    with pytest.raises(ValueError, match=r"it knows 0 of the 2 words of the lexicon \(0%\), and not a, ba"):
        BeamSearchDecoder(LABELS, words=["a", "ba"], options=options, **NAMED)
    with pytest.raises(ValueError, match=r"is a KenLM binary, which lists no words\. Give a file"):
        read_lexicon(binary)
    binary.write_bytes(binary.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cannot be read as a language model. KenLM says: (?s:.*)size 200"):
        BeamSearchDecoder(LABELS, words=["ab"], options=options, **NAMED)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a file. Give an ARPA file or a KenLM binary"),
        (b"", "is not a language model: it begins neither with"),
        (b"ab ba\na ab\n", "is not a language model"),
        (bytes(range(256)) * 9, "is not a language model"),
        (b"\x1f\x8b\x08 not compressed", "is not a language model"),
        (b"\\data\\\nngram 1=5\n", "cannot be read as a language model. KenLM says: End of file"),
        (b"mmap lm http://kheafield.com/code format version 5\n\0", "cannot be read as a language model. KenLM says"),
    ],
    ids=["missing", "empty", "text", "bytes", "broken-gzip", "cut-arpa", "cut-binary"],
)
@pytest.mark.parametrize("words", [None, WORDS], ids=["labels", "words"])
def test_invalid_language_models_raise(tmp_path, content, message, words):
    if content is not None:
        (tmp_path / "lm").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        BeamSearchDecoder(LABELS, words=words, options=DecodingOptions(str(tmp_path / "lm")), **NAMED)


def test_compressed_language_model(tmp_path, word_model):
    with open(word_model, "rb") as file:
        (tmp_path / "lm.arpa.gz").write_bytes(gzip.compress(file.read()))
    log_probs, found = emissions(9), []
    for path in (word_model, str(tmp_path / "lm.arpa.gz")):
        found.append(BeamSearchDecoder(LABELS, options=DecodingOptions(path, path), **NAMED).decode(log_probs))
    assert found[0] == found[1]


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_byte_order_marks_of_lexicons_and_language_models(tmp_path, word_model, pack):
    marked = tmp_path / "marked"
    marked.write_bytes(pack("\ufeffab\ta b\r\nba\tb a\r\n".encode()))
    assert read_lexicon(marked) == [("ab", ["a", "b"]), ("ba", ["b", "a"])]
    log_probs, found = emissions(9), []
    for mark in (b"", b"\xef\xbb\xbf"):
        with open(word_model, "rb") as file:
            marked.write_bytes(pack(mark + file.read()))
        assert sorted(read_lexicon(marked)) == sorted(read_lexicon(word_model))
        options = DecodingOptions(str(marked), word_model)
        found.append(BeamSearchDecoder(LABELS, options=options, **NAMED).decode(log_probs))
    assert found[0] == found[1]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_other_encodings_of_lexicons_and_language_models_raise(tmp_path, encoding):
    model = write_arpa(tmp_path / "lm.arpa", ["ab é"])
    model.write_bytes(model.read_text(encoding="utf-8").encode(encoding))
    with pytest.raises(ValueError, match=r"lm\.arpa is not a language model: .*lm\.arpa.* is not UTF-8"):
        BeamSearchDecoder(LABELS, words=WORDS, options=DecodingOptions(str(model)), **NAMED)
    (tmp_path / "lexicon.txt").write_bytes("ab\né\n".encode(encoding))
    with pytest.raises(ValueError, match=r"lexicon\.txt.* is not UTF-8"):
        read_lexicon(tmp_path / "lexicon.txt")


def test_language_model_that_does_not_fit_raises(tmp_path, word_model, label_model, caplog):
    upper = str(write_arpa(tmp_path / "upper.arpa", [sentence.upper() for sentence in SENTENCES]))
    with pytest.raises(ValueError, match=r"knows 0 of the 4 words .* \(0%\), and not a, ab, ba, abb\. .* upper case"):
        BeamSearchDecoder(LABELS, words=WORDS, options=DecodingOptions(upper), **NAMED)
    with pytest.raises(ValueError, match=r"knows 1 of the 3 labels \(33%\), and not b, \|\. .* over labels"):
        BeamSearchDecoder(LABELS, options=DecodingOptions(word_model), **NAMED)
    with pytest.raises(ValueError, match=r"knows 0 of the \d labels \(0%\)"):
        BeamSearchDecoder(LABELS, options=DecodingOptions(upper), **NAMED)
    with caplog.at_level(logging.WARNING):
        BeamSearchDecoder(LABELS, words=WORDS, options=DecodingOptions(word_model), **NAMED)
    assert "knows 3 of the 4 words of the lexicon (75%), and not abb." in caplog.text
    BeamSearchDecoder(LABELS, options=DecodingOptions(label_model), **NAMED)


def test_options_survive_saving_and_moving(tmp_path, word_model):
    (tmp_path / "model" / "lm").mkdir(parents=True)
    inside = tmp_path / "model" / "lm" / "words.txt"
    inside.write_text("a\nab\n")
    options = DecodingOptions(word_model, str(inside), 1.5, -0.25, 77, 4, 30.0, 0.5, True)
    path = options.save(tmp_path / "model" / "decoding.json")
    assert DecodingOptions.load(path) == options
    assert json.loads(path.read_text())["lexicon"] == "lm/words.txt"
    assert json.loads(path.read_text())["language_model"] == word_model  # outside the folder
    (tmp_path / "model").rename(tmp_path / "moved")
    moved = DecodingOptions.load(tmp_path / "moved" / "decoding.json")
    assert moved.lexicon == str(tmp_path / "moved" / "lm" / "words.txt")
    found = BeamSearchDecoder(LABELS, options=moved, **NAMED).decode(of_path(["a", "b"]))
    assert found[0].text == "ab"
    assert DecodingOptions.load(DecodingOptions().save(tmp_path / "plain.json")) == DecodingOptions()
    (tmp_path / "marked.json").write_text("\ufeff{}", encoding="utf-8")
    assert DecodingOptions.load(tmp_path / "marked.json") == DecodingOptions()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a file"),
        ("{", "is not valid JSON"),
        ("[1]", "must contain an object of options, but contains a list"),
        ('{"lm_wieght": 1}', "lm_wieght is not a known option. The nearest is lm_weight"),
        ('{"beam_size": 0}', "beam_size=0 is out of range: it must be at least 1"),
        ('{"beam_size": "wide"}', r"decoding\.json: beam_size is 'wide', but must be of the type int\."),
        ('{"beam_size": 2.5}', r"decoding\.json: beam_size is 2\.5, but must be of the type int\."),
        ('{"lm_weight": true}', r"decoding\.json: lm_weight is True, but must be of the type float\."),
        ('{"log_add": "no"}', r"decoding\.json: log_add is 'no', but must be of the type bool\."),
        ('{"lexicon": 5}', r"decoding\.json: lexicon is 5, but must be of the type str \| null\."),
        ('{"beam_size": 2, "beam_size": 3}', r"decoding\.json: an object has the key 'beam_size' twice"),
        ("[" * 200_000, r"decoding\.json: its brackets are nested too deeply"),
    ],
    ids=[
        *("missing", "not-json", "list", "unknown", "out-of-range"),
        *("text", "fraction", "true", "no", "path", "twice", "deep"),
    ],
)
def test_invalid_files_of_options_raise(tmp_path, content, message):
    if content is not None:
        (tmp_path / "decoding.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        DecodingOptions.load(tmp_path / "decoding.json")


def test_arpa_probabilities_sum_to_one(tmp_path):
    # Of each context in the files that `write_arpa` writes for these tests.
    scorer = ArpaScorer(write_arpa(tmp_path / "lm.arpa", SENTENCES, order=3))
    words = [ngram[0] for ngram in scorer.probability if len(ngram) == 1 and ngram[0] != "<s>"]
    for context in [(), ("<s>",), ("a",), ("ab", "ba"), ("ba", "ba"), ("<s>", "a")]:
        assert sum(10 ** scorer.word(context, word) for word in words) == pytest.approx(1, abs=1e-5)
