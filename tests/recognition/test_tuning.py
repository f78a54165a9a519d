"""Tuning of decoding: the pairs, the counts of errors, and the script that writes decoding.json."""

import csv
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch

from dinosr_hf import DinoSRForCTC
from dinosr_hf.recognition import Transcriber, make_processor
from dinosr_hf.recognition.decoding import BeamSearchDecoder, DecodingOptions
from dinosr_hf.recognition.tuning import Trial, random_pairs, tune
from language_models import write_arpa
from scripts import load_command
from tiny import deterministic_config

LABELS = ["<pad>", "|", "a", "b"]
NAMED = {"blank_id": 0, "word_delimiter_id": 1}


def emissions(text, doubt=0.0):
    """Emissions of a text with a blank after each label; `doubt` is the logit of the other letter, b for a."""
    logits = np.full((2 * len(text), len(LABELS)), -9.0)
    logits[1::2, 0] = 0
    for frame, label in enumerate(text.replace(" ", "|")):
        logits[2 * frame, LABELS.index(label)] = 0
        if label in "ab":
            logits[2 * frame, 5 - LABELS.index(label)] = doubt
    return (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)


def test_random_pairs():
    pairs = random_pairs(200, lm_weights=(1.0, 3.0), word_scores=(-2.0, 0.0), seed=3)
    weights, scores = np.transpose(pairs)
    assert 1 <= weights.min() < 1.2 and 2.8 < weights.max() <= 3
    assert -2 <= scores.min() < -1.8 and -0.2 < scores.max() <= 0
    assert random_pairs(7, lm_weights=(1.0, 3.0), word_scores=(-2.0, 0.0), seed=3) == pairs[:7]
    assert random_pairs(7, lm_weights=(1.0, 3.0), word_scores=(-2.0, 0.0), seed=4) != pairs[:7]
    with pytest.raises(ValueError, match=r"lm_weights=\(3, 1\) must be the minimum and the maximum"):
        random_pairs(7, lm_weights=(3, 1))
    with pytest.raises(ValueError, match="num_pairs=0 must be at least 1"):
        random_pairs(0)


class EchoDecoder:
    """A decoder that returns its input if lm_weight is 2, else \"a x\"."""

    def __init__(self, lm_weight, word_score):
        self.right = lm_weight == 2.0

    def decode(self, text):
        return [type("Said", (), {"text": text if self.right else "a x"})]


def test_errors_are_summed_over_utterances():
    # "a x" has 2 word errors and 3 character errors against each of "a b a", "b" and "": 6 errors in 4 words; the mean
    # of rates differs.
    seen = []
    said = ["A b a", "b", ""]
    trials = tune(EchoDecoder, said, ["a b A", "b", ""], [(1.0, 0.5), (2.0, 0.0), (3.0, 0.0)], normalize=str.lower)
    assert trials == [Trial(2.0, 0.0, 0, 4, 0, 6), Trial(1.0, 0.5, 6, 4, 9, 6), Trial(3.0, 0.0, 6, 4, 9, 6)]
    assert trials[1].word_error_rate == trials[1].character_error_rate == 1.5
    trials = tune(EchoDecoder, said, ["a b A", "b", ""], [(2.0, 0.0)], on_trial=seen.append)
    assert seen == trials == [Trial(2.0, 0.0, 2, 4, 2, 6)], "without normalisation, A differs from a"


def test_an_utterance_may_be_decoded_in_another_way():
    (trial,) = tune(EchoDecoder, ["a b"], ["a"], [(2.0, 0.0)], decode=lambda decoder, text: text[:1])
    assert trial.word_errors == 0


def test_trials_with_as_many_word_errors_are_ranked_by_characters():
    def make_decoder(lm_weight, word_score):
        said = type("Said", (), {"text": {0.0: "", 1.0: "你好", 2.0: "你"}[lm_weight]})
        return type("Decoder", (), {"decode": lambda self, frames: [said]})()

    trials = tune(make_decoder, [None], ["你好吗"], [(0.0, 0.0), (1.0, 0.0), (2.0, 0.0)])
    assert [(trial.lm_weight, trial.word_errors, trial.character_errors) for trial in trials] == [
        (1.0, 1, 1),
        (2.0, 1, 2),
        (0.0, 1, 3),
    ]


@pytest.mark.parametrize(
    ("said", "references", "pairs", "message"),
    [
        (["a"], ["a", "b"], [(1.0, 0.0)], "2 references, 1 predictions"),
        (["a"], ["a"], [], "no pairs of weights"),
        (["a"], [""], [(1.0, 0.0)], "None of the references has a word"),
    ],
    ids=["numbers", "pairs", "words"],
)
def test_invalid_arguments_raise(said, references, pairs, message):
    with pytest.raises(ValueError, match=message):
        tune(EchoDecoder, said, references, pairs)


def test_tuning_finds_the_better_weight(tmp_path):
    # The emissions favour b over a; the language model has never seen b.
    texts = ["a aa", "aa a aa", "a"]
    model = str(write_arpa(tmp_path / "lm.arpa", texts * 3, order=2))
    rows = [emissions(text, doubt=0.2) for text in texts]
    decoder = BeamSearchDecoder(LABELS, words=["a", "aa", "b", "bb"], options=DecodingOptions(model), **NAMED)
    trials = tune(decoder.reweighted, rows, texts, [(0.0, 0.0), (1.0, 0.0)])
    assert [trial[:2] for trial in trials] == [(1.0, 0.0), (0.0, 0.0)]
    assert trials[0].word_errors == 0 < trials[1].word_errors
    assert trials == tune(decoder.reweighted, rows, texts, [(0.0, 0.0), (1.0, 0.0)])


@pytest.fixture(scope="module")
def script():
    return load_command("tune_decoding")


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory):
    """A folder with a model, another with recordings and transcripts, and a language model."""
    folder = tmp_path_factory.mktemp("recogniser")
    labels = ["<pad>", "<s>", "</s>", "<unk>", "|", "a", "b"]
    processor = make_processor({label: index for index, label in enumerate(labels)})
    torch.manual_seed(0)
    config = deterministic_config(vocab_size=len(labels), pad_token_id=0)
    DinoSRForCTC(config).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    (folder / "dev").mkdir()
    generator = np.random.default_rng(0)
    with open(folder / "dev" / "metadata.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "text"])
        for number, text in enumerate(["ab a", "b ab", "a"]):
            soundfile.write(
                folder / "dev" / f"{number}.wav", 0.1 * generator.standard_normal(900 - 130 * number), 16_000
            )
            rows.writerow([f"{number}.wav", text])
    write_arpa(folder / "model" / "lm.arpa", ["ab a", "b ab", "a b"], order=2)
    write_arpa(folder / "labels.arpa", ["a b | a", "b | a b"], order=2)
    return folder


def test_script_writes_the_best_trial(recogniser, script, capsys):
    arguments = [str(recogniser / name) for name in ("model", "dev", "model/lm.arpa")]
    script.main([*arguments, "--lm_weights", "0", "1", "--word_scores", "-9", "9", "--batch_seconds", "0.1"])
    printed = capsys.readouterr().out
    options = DecodingOptions.load(recogniser / "model" / "decoding.json")
    assert options.language_model == options.lexicon == arguments[2]
    assert json.loads((recogniser / "model" / "decoding.json").read_text())["language_model"] == "lm.arpa"
    assert (options.lm_weight, options.word_score) in {(0, -9), (0, 9), (1, -9), (1, 9)}
    table = [line.split() for line in printed.splitlines() if line.endswith("%") and "search" not in line]
    assert len(table) == 4
    assert [float(value) for value in table[0][:2]] == [options.lm_weight, options.word_score]
    rates = [float(value.rstrip("%")) for *_, value in table]  # of characters: there are less than two words each
    assert rates == sorted(rates) and rates[0] < rates[-1]


def test_script_without_a_lexicon(recogniser, script, tmp_path):
    arguments = [str(recogniser / name) for name in ("model", "dev", "labels.arpa")]
    script.main(
        [*arguments, "--no_lexicon", "--trials", "3", "--max_utterances", "2", "--output", str(tmp_path / "d.json")]
    )
    assert DecodingOptions.load(tmp_path / "d.json").lexicon is None
    assert DecodingOptions.load(tmp_path / "d.json").word_score == 0


def test_emissions_do_not_depend_on_the_batch(recogniser, script):
    from dinosr_hf.data import open_labelled

    data = open_labelled(recogniser / "dev")
    found = []
    for seconds in (0.003, 1.0):
        transcriber = Transcriber.from_folder(recogniser / "model", greedy=True, batch_seconds=seconds)
        emissions, references = script.compute_emissions(transcriber, data, 2)
        assert references == data.labels[:2]
        found.append(emissions)
    num_frames = transcriber.model.config.num_frames
    assert [len(rows) for rows in found[0]] == [num_frames(length) for length in data.num_samples[:2]]
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_emissions_are_those_of_transcription(recogniser, script, tmp_path):
    """A recording longer than a window goes through the model in windows; one that cannot be read is left out."""
    from dinosr_hf.data import open_labelled

    dev = shutil.copytree(recogniser / "dev", tmp_path / "dev")
    data = open_labelled(dev)
    (dev / "1.wav").write_bytes((dev / "1.wav").read_bytes()[:100])
    windows = {"window_seconds": 0.02, "context_seconds": 0.002}
    transcriber = Transcriber.from_folder(recogniser / "model", greedy=True, **windows)
    emissions, references = script.compute_emissions(transcriber, data, None)
    assert references == [data.labels[0], data.labels[2]]
    transcripts = {transcript.id: transcript.text for transcript in transcriber.transcribe(data.source)}
    texts = [transcriber.decoder.decode(rows)[0].text for rows in emissions]
    assert texts == [transcripts[data.ids[0]], transcripts[data.ids[2]]]
    whole = Transcriber.from_folder(recogniser / "model", greedy=True)
    (first, _), _ = script.compute_emissions(whole, data, None)
    assert first.shape == emissions[0].shape and np.abs(first - emissions[0]).max() > 1e-3


def test_script_reports_errors(recogniser, script):
    arguments = [str(recogniser / name) for name in ("model", "dev")]
    with pytest.raises(SystemExit, match=r"tune_decoding\.py: The language model .* is not a file"):
        script.main([*arguments, str(recogniser / "nothing.arpa")])
    with pytest.raises(SystemExit, match="does not fit: it knows"):
        script.main([*arguments, str(recogniser / "model" / "lm.arpa"), "--no_lexicon"])
    for options, message in (
        (
            ["--no_lexicon", "--lexicon", "words.txt"],
            r"lexicon=words\.txt is set, but a search over labels has no words",
        ),
        (["--no_lexicon", "--word_scores", "1", "2"], r"word_scores=\[1\.0, 2\.0\] is set, but a search over labels"),
        (["--lm_weights", "1", "--trials", "3"], "trials=3 is set, but the pairs of lm_weights and word_scores are"),
    ):
        with pytest.raises(SystemExit, match=message):
            script.main([*arguments, str(recogniser / "model" / "lm.arpa"), *options])
