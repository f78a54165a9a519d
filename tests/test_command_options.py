"""Options of commands reach what they are for: the call of the library, the file that is written, the speech."""

import inspect
import operator
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile

from dinosr_cli import COMMANDS
from dinosr_hf.data.synthetic import SyntheticCorpus
from dinosr_hf.finetuning import splits
from dinosr_hf.finetuning.finetuning_arguments import LabelledDataArguments
from dinosr_hf.pretraining import open_data, open_held_out, parse_arguments, runner
from dinosr_hf.recognition.decoding import DecodingOptions
from dinosr_hf.recognition.tuning import random_pairs
from dinosr_hf.utils.recipes import recipes
from language_models import write_arpa
from recognisers import save_recogniser
from scripts import load_command


class ReachedError(Exception):
    """Ends a command at the call that a test is about; has the call's arguments."""


def call_of(monkeypatch, command, function, words):
    """Run a command until it calls a function of its module; return the arguments of that call by name."""
    module = load_command(command)
    signature = inspect.signature(operator.attrgetter(function)(module))

    def record(*positional, **named):
        signature.bind(*positional, **named)
        raise ReachedError(dict(zip(signature.parameters, positional, strict=False)) | named)

    monkeypatch.setattr(f"{module.__name__}.{function}", record)
    with pytest.raises(ReachedError) as reached:
        module.main(list(map(str, words)))
    return reached.value.args[0]


# What each command needs besides the option.
WORDS = {
    "app": "model",
    "convert_checkpoint": "a.ckpt converted",
    "evaluate_abx": "model --data speech --output_dir abx",
    "export_onnx": "model onnx --int8 int8",
    "prepare_for_hub": "run hub",
    "transcribe": "model talk.wav",
}
# What functions that would open models and data return instead, on the way to the call.
RESULTS = {
    "app": {"import_extra": None},
    "evaluate_abx": {
        "import_fastabx": None,
        "open_labelled_speech": (None, None),
        "require_speakers": None,
        "check_inputs": None,
        "check_sources": None,
        "baseline_config": None,
        "triphone_items": [],
        "write_representations": [("student", 1, "angular", "layer-1")],
        "frame_rate": 50,
    },
    "export_onnx": {"export_onnx": "onnx"},
    "prepare_for_hub": {"read_provenance": (None, None)},
    "transcribe": {"open_inputs": None},
}
CASES = [
    ("app", "--greedy", "Listener", "greedy", True),
    ("app", "--max_seconds 12.5", "Listener", "max_seconds", 12.5),
    ("convert_checkpoint", "--as ctc", "convert", "as_", "ctc"),
    ("convert_checkpoint", "--dictionary dict.txt", "convert", "dictionary", "dict.txt"),
    ("convert_checkpoint", "--config config.json", "convert", "config", "config.json"),
    ("convert_checkpoint", "--num_attention_heads 3", "convert", "num_attention_heads", 3),
    ("convert_checkpoint", "--objective spidr", "convert", "objective", "spidr"),
    ("convert_checkpoint", "--license mit", "convert", "license", "mit"),
    ("evaluate_abx", "--silence SIL spn", "triphone_items", "silence", ["SIL", "spn"]),
    ("evaluate_abx", "--silence SIL spn --dry_run", "triphone_items", "silence", ["SIL", "spn"]),
    ("evaluate_abx", "--max_size_group 3", "abx_errors", "max_size_group", 3),
    ("evaluate_abx", "--max_x_across 2", "abx_errors", "max_x_across", 2),
    ("export_onnx", "--overwrite", "export_onnx", "overwrite", True),
    ("export_onnx", "--overwrite", "quantize_onnx", "overwrite", True),
    ("prepare_for_hub", "--include a.txt b.txt", "prepare", "include", ["a.txt", "b.txt"]),
    ("transcribe", "--decoding own.json", "Transcriber.from_folder", "decoding", "own.json"),
]


@pytest.mark.parametrize(
    ("command", "flags", "function", "name", "value"), CASES, ids=[f"{case[0]} {case[1]} {case[2]}" for case in CASES]
)
def test_an_option_reaches_the_library(monkeypatch, tmp_path, command, flags, function, name, value):
    monkeypatch.chdir(tmp_path)
    for stub, result in RESULTS.get(command, {}).items():
        if stub != function:
            monkeypatch.setattr(load_command(command), stub, Mock(return_value=result))
    assert call_of(monkeypatch, command, function, [*WORDS[command].split(), *flags.split()])[name] == value


def test_layers_open_each_data_with_its_split(monkeypatch, tmp_path):
    script = load_command("evaluate_layers")
    monkeypatch.setattr(script, "open_labelled_speech", lambda name, options, split=None: (name, split))
    monkeypatch.setattr(script, "Recordings", SimpleNamespace(with_labels=lambda *labelled: labelled))
    for name in ("check_inputs", "check_sources"):
        monkeypatch.setattr(script, name, Mock())
    words = ["model", "--data", "a", "--split", "dev", "--fit_data", "b", "--fit_split", "train"]
    opened = call_of(
        monkeypatch, "evaluate_layers", "check_disjoint_speakers", [*words, "--output_dir", tmp_path / "out"]
    )
    assert opened == {"fit": ("b", "train"), "test": ("a", "dev")}


@pytest.mark.parametrize(("flags", "max_steps"), [([], 800), (["--steps", "7"], 7)], ids=["recipe", "flag"])
def test_the_demo_trains_for_the_steps_of_the_flag(monkeypatch, tmp_path, flags, max_steps):
    words = ["--output_dir", tmp_path / "out", "--dry_run", "true", *flags]
    assert call_of(monkeypatch, "demo", "run", words)["arguments"].run.max_steps == max_steps


def test_conversion_says_that_verify_was_ignored(monkeypatch, capsys):
    script = load_command("convert_checkpoint")
    monkeypatch.setattr(script, "audio_info", Mock())
    monkeypatch.setattr(script, "convert", lambda *paths, **options: object())
    script.main(["a.ckpt", "out"])
    assert capsys.readouterr().out == "Written: out, a object\n"
    script.main(["a.ckpt", "out", "--verify", "speech.wav"])
    ignored = "--verify was ignored: it needs codebooks, and this model has none."
    assert capsys.readouterr().out.splitlines() == ["Written: out, a object", ignored]


@pytest.fixture(scope="module")
def tuning(tmp_path_factory):
    """A folder with a recogniser, a language model, a lexicon, and a recording with two columns of transcripts."""
    folder = tmp_path_factory.mktemp("tuning")
    save_recogniser(folder / "model")
    write_arpa(folder / "lm.arpa", ["ab ba", "ba"], order=2)
    (folder / "words.txt").write_text("ab\nba\n")
    (folder / "dev").mkdir()
    soundfile.write(folder / "dev" / "0.wav", 0.1 * np.random.default_rng(0).standard_normal(900), 16_000)
    (folder / "dev" / "metadata.csv").write_text("file_name,text,said\n0.wav,ab ba,ba\n")
    return folder


def tune_words(folder, *flags):
    return [str(folder / name) for name in ("model", "dev", "lm.arpa")] + list(map(str, flags))


@pytest.mark.parametrize(("flags", "transcript"), [([], "ab ba"), (["--column", "said"], "ba")], ids=["usual", "flag"])
def test_tuning_compares_with_the_column_of_transcripts(monkeypatch, tmp_path, tuning, flags, transcript):
    words = tune_words(tuning, "--output", tmp_path / "decoding.json", *flags)
    assert call_of(monkeypatch, "tune_decoding", "tune", words)["references"] == [transcript]


def test_tuning_writes_lexicon_and_beam_to_decoding_json(tmp_path, tuning):
    flags = ["--lexicon", tuning / "words.txt", "--beam_size", 7, "--beam_threshold", 3.5]
    flags += ["--lm_weights", 0.5, "--word_scores", 1.5, "--output", tmp_path / "decoding.json"]
    load_command("tune_decoding").main(tune_words(tuning, *flags))
    assert DecodingOptions.load(tmp_path / "decoding.json") == DecodingOptions(
        str(tuning / "lm.arpa"), str(tuning / "words.txt"), 0.5, 1.5, beam_size=7, beam_threshold=3.5
    )


@pytest.mark.parametrize(
    ("flags", "pairs"),
    [
        ("--lm_weights 1 3", [(1.0, DecodingOptions.word_score), (3.0, DecodingOptions.word_score)]),
        ("--word_scores 0 2", [(DecodingOptions.lm_weight, 0.0), (DecodingOptions.lm_weight, 2.0)]),
        ("--lm_weights 1 3 --word_scores 0 2", [(1.0, 0.0), (1.0, 2.0), (3.0, 0.0), (3.0, 2.0)]),
        ("--trials 3 --seed 5", random_pairs(3, seed=5)),
        ("--seed 5", random_pairs(32, seed=5)),
    ],
    ids=["weights", "scores", "both", "random", "seed"],
)
def test_tuning_tries_the_pairs_that_are_asked_for(flags, pairs):
    script = load_command("tune_decoding")
    assert script.pairs_of(script.parse(["model", "dev", "lm.arpa", *flags.split()])) == pairs


@pytest.mark.parametrize("noise", [False, True], ids=["clean", "noisy"])
def test_synthetic_speech_for_fine_tuning_is_as_the_arguments_say(monkeypatch, noise):
    monkeypatch.setattr(SyntheticCorpus, "to_dataset", lambda corpus: corpus)
    monkeypatch.setattr(splits, "DatasetSource", lambda corpus: SimpleNamespace(corpus=corpus, labels=Mock()))
    monkeypatch.setattr(splits, "LabelledSource", lambda source, labels, **names: source.corpus)
    arguments = LabelledDataArguments(
        synthetic_utterances=7,
        synthetic_eval_utterances=3,
        synthetic_speakers=5,
        synthetic_text="digits",
        synthetic_languages=["de", "fr"],
        synthetic_noise=noise,
    )
    shared = {"seed": 4, "text": "digits", "languages": ["de", "fr"], "noise": noise}
    assert splits.open_splits(arguments, seed=4) == (
        SyntheticCorpus(7, num_speakers=5, split="train", **shared),
        SyntheticCorpus(3, num_speakers=40, split="validation", **shared),
        SyntheticCorpus(3, num_speakers=40, split="test", **shared),
    )


def open_training(arguments):
    return open_data(arguments.data, arguments.run.seed)


@pytest.mark.parametrize("noise", [False, True], ids=["clean", "noisy"])
@pytest.mark.parametrize(("texts", "num_texts"), [("2 5", (2, 5)), ("3", (3, 3))], ids=["range", "number"])
@pytest.mark.parametrize(("split", "open_speech"), [("train", open_training), ("validation", open_held_out)])
def test_synthetic_speech_for_pre_training_is_as_the_flags_say(
    monkeypatch, split, open_speech, texts, num_texts, noise
):
    def reach(corpus):
        raise ReachedError(corpus)

    monkeypatch.setattr(SyntheticCorpus, "to_dataset", lambda corpus, **options: corpus)
    monkeypatch.setattr(runner, "DatasetSource", reach)
    flags = "--data synthetic --eval_data synthetic --synthetic_utterances 3 --eval_seconds 24 --seed 4"
    flags += f" --synthetic_languages de fr --synthetic_texts {texts} --synthetic_noise {noise}"
    with pytest.raises(ReachedError) as reached:
        open_speech(parse_arguments(flags.split()))
    assert reached.value.args[0] == SyntheticCorpus(
        3, seed=4, languages=["de", "fr"], split=split, noise=noise, text="mixed", num_texts=num_texts
    )


def test_completion_for_tcsh_knows_commands_flags_choices_and_recipes(capsys):
    pytest.importorskip("shtab")
    load_command("print_completion").main(["tcsh"])
    script = capsys.readouterr().out
    patterns = (
        f"'p/1/({' '.join(COMMANDS)})/'",
        f"'n/pretrain/({' '.join(recipes())})/'",
        "'n/--to/(fairseq spidr)/'",
        "'n/--dictionary/f/'",
        "complete dinosr ",
        " window_seconds ",
    )
    assert [pattern for pattern in patterns if pattern not in script] == []
    assert "no_overwrite" not in script and "_dinosr_" not in script


def test_completion_without_shtab_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    message = r'print_completion\.py: Completion needs shtab: pip install "dinosr-hf\[train\]"'
    with pytest.raises(SystemExit, match=message):
        load_command("print_completion").main(["bash"])
