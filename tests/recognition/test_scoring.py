"""Error rates, checked by hand and by a plain dynamic programme; tables; the metric of `evaluate`."""

import json
import socket
import sys

import numpy as np
import pytest

from dinosr_hf.recognition import score, speech_errors_metric

pytest.importorskip("jiwer")

# One substitution; two errors; a correct one; all wrong, with more words than the reference.
REFERENCES = ["the ship sails", "a b", "moon", "oh"]
PREDICTIONS = ["the sheep sails", "b c", "moon", "no no no"]


def edits(reference, prediction):
    """Levenshtein distance, cell by cell."""
    table = np.zeros((len(reference) + 1, len(prediction) + 1), dtype=int)
    table[:, 0], table[0] = range(len(reference) + 1), range(len(prediction) + 1)
    for row, left in enumerate(reference, 1):
        for column, right in enumerate(prediction, 1):
            replaced = table[row - 1, column - 1] + (left != right)
            table[row, column] = min(replaced, table[row - 1, column] + 1, table[row, column - 1] + 1)
    return int(table[-1, -1])


def test_rates_are_of_summed_edits():
    report = score(REFERENCES, PREDICTIONS)
    assert [row.word_errors for row in report.utterances] == [1, 2, 0, 3]
    assert report.wer == 6 / 7
    # Negative control: the mean over utterances differs.
    means = [row.word_errors / row.num_words for row in report.utterances]
    assert np.mean(means) == pytest.approx(4.3333 / 4, abs=1e-3)
    assert report.wer != pytest.approx(np.mean(means))


def test_edits_equal_a_plain_dynamic_programme():
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(["a", "bc", "d"], size)) for size in (1, 2, 3, 5, 8, 13)]
    references, predictions = texts * 6, [text for text in [*texts[:5], ""] for _ in range(6)]
    report = score(references, predictions)
    for row in report.utterances:
        assert row.word_errors == edits(row.reference.split(), row.prediction.split())
        assert row.character_errors == edits(row.reference, row.prediction)
        assert (row.num_words, row.num_characters) == (len(row.reference.split()), len(row.reference))
    characters = sum(map(len, references))
    assert report.cer == sum(map(edits, references, predictions)) / characters


@pytest.mark.parametrize(
    ("reference", "prediction"),
    [
        ("é a", "e\u0301 a"),
        ("\u200fשלום עולם\u200e", "שלום עולם"),
        ("\ufeffone two", "one\u200b t\u00adwo\u2060"),
        ("می\u200cروم", "می\u200c\u200eروم"),
        ("สวัสดี\u200bครับ", "สวัสดี ครับ"),
        ("a b", "a \u00a0 b"),
    ],
)
def test_texts_that_look_alike_have_no_errors(reference, prediction):
    for pair in ((reference, prediction), (prediction, reference)):
        report = score([pair[0]], [pair[1]])
        assert (report.wer, report.cer) == (0.0, 0.0)
    assert score(["می\u200cروم"], ["میروم"]).wer == 1.0  # they do not look alike


def test_empty_texts():
    report = score(["", "a b", ""], ["oh no", "", ""], ["x", "y", "z"])
    assert [(row.id, row.word_errors, row.character_errors) for row in report.utterances] == [
        ("x", 2, 5),
        ("y", 2, 3),
        ("z", 0, 0),
    ]
    assert (report.wer, report.cer) == (4 / 2, 8 / 3)
    assert report.confusions == {("", "oh"): 1, ("", "no"): 1, ("a", ""): 1, ("b", ""): 1}


def test_ranking():
    said = ["a b c", "ax b c", "axxx b c", f"a{'x' * 99} b c", "x y c"]  # 0, 1, 1, 1 and 2 word errors
    rankings = [score(["a b c", "d e f"], [first, "d e f"]).ranking for first in said]
    assert rankings == sorted(rankings) and len(set(rankings)) == len(said)
    unspaced = ["你好世界", "再见"]
    blank, some = score(unspaced, ["", ""]), score(unspaced, ["你好", "见"])
    assert blank.wer == some.wer == 1.0 and (blank.ranking, some.ranking) == (1.0, 0.5)
    clauses = ["今天天气很好 我们去公园", "สวัสดีครับ ยินดีที่ได้รู้จัก"]
    assert all(score([text], [text[:-1]]).ranking < 0.1 for text in clauses)  # by characters, of several "words"
    assert score(["오늘 날씨가 좋다"], ["오늘 날씨가 좋"]).ranking > 0.3


def test_confusions_are_pairs_of_words():
    report = score(REFERENCES, PREDICTIONS)
    assert report.confusions[("ship", "sheep")] == 1
    assert sum(report.confusions.values()) == 6
    substitutions = score(["a b c"] * 3, ["a x c", "a x y", "a b"])
    assert substitutions.confusions == {("b", "x"): 2, ("c", "y"): 1, ("c", ""): 1}


@pytest.mark.parametrize(
    ("references", "predictions", "ids", "message"),
    [
        (["a"], ["a", "b"], None, "1 references, 2 predictions and 1 ids. Give one of each per utterance"),
        (["a"], ["a"], ["x", "y"], "1 references, 1 predictions and 2 ids"),
        (["", ""], ["a", "b"], None, "None of the references has a word"),
        ([], [], None, "None of the references has a word"),
    ],
)
def test_invalid_texts_raise(references, predictions, ids, message):
    with pytest.raises(ValueError, match=message):
        score(references, predictions, ids)


def test_files_of_predictions_and_errors(tmp_path):
    score(REFERENCES, PREDICTIONS, ["p", "q", "r", "ß"]).save(tmp_path, "test")
    lines = [json.loads(line) for line in (tmp_path / "predictions-test.jsonl").read_text("utf-8").splitlines()]
    assert [line["id"] for line in lines] == ["ß", "q", "p", "r"]  # worst first
    assert lines[2] == {
        "id": "p",
        "reference": "the ship sails",
        "prediction": "the sheep sails",
        "word_errors": 1,
        "num_words": 3,
        "character_errors": 2,
        "num_characters": 14,
    }
    table = (tmp_path / "errors-test.md").read_text("utf-8")
    assert "# Errors on test" in table
    assert "| 4 | 7 | 6 | 85.71% |" in table
    assert "| 2 | (nothing) | no |" in table
    assert "| 1 | a | b |" in table


def test_tables_list_the_most_frequent_confusions():
    report = score(["a", "a", "b"], ["x", "x", "y"])
    table = report.to_markdown("dev", num_confusions=1)
    assert "| 2 | a | x |" in table
    assert "| b | y |" not in table


def test_bars_are_escaped_in_tables():
    table = score(["a|b"], ["c"]).to_markdown("dev")
    assert "| 1 | a\\|b | c |" in table


def test_metric_sums_over_batches():
    whole = speech_errors_metric().compute(references=REFERENCES, predictions=PREDICTIONS)
    report = score(REFERENCES, PREDICTIONS)
    assert (whole["wer"], whole["cer"]) == (report.wer, report.cer)
    assert (whole["word_errors"], whole["num_words"]) == (6, 7)
    assert whole["num_characters"] == sum(map(len, REFERENCES))
    metric = speech_errors_metric()
    for first, last in ((0, 1), (1, 4)):
        metric.add_batch(references=REFERENCES[first:last], predictions=PREDICTIONS[first:last])
    assert metric.compute() == whole
    means = [score(REFERENCES[:1], PREDICTIONS[:1]).wer, score(REFERENCES[1:], PREDICTIONS[1:]).wer]
    assert whole["wer"] != pytest.approx(np.mean(means))


def test_metric_needs_no_network(monkeypatch):
    import evaluate

    def refuse(*args, **kwargs):
        raise AssertionError("the metric connects to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    metric = speech_errors_metric()
    assert metric.name == "speech_errors" and isinstance(metric, evaluate.Metric)
    assert metric.compute(references=["a b"], predictions=["a c"])["wer"] == 0.5
    assert metric.compute(references=["a"], predictions=["a"])["wer"] == 0.0  # it can be used again


def test_missing_evaluate_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ImportError, match=r'Scoring needs evaluate: pip install "dinosr-hf\[asr\]"'):
        speech_errors_metric()
