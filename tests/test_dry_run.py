"""`--dry_run` of the commands that evaluate, cluster or tune: it says what a run would do, and computes nothing."""

import json
import shutil
import sys

import numpy as np
import pytest

from audio_files import write
from dinosr_hf.inference.windowed import WindowedInference
from dinosr_hf.units import LayerKMeans
from language_models import write_arpa
from recognisers import save_models
from scripts import load_command

COMMANDS = {
    "evaluate_units": "pretrained recogniser --data speech --labels phones.jsonl --output_dir out/new"
    " --kmeans_data speech --kmeans_layers 1 --num_clusters 4 --mfccs tuned",
    "evaluate_layers": "pretrained recogniser --data speech --labels phones.jsonl --output_dir out/new"
    " --sources student teacher --num_clusters 4",
    "evaluate_abx": "pretrained recogniser --data speech --labels phones.jsonl --output_dir out/new",
    "inspect_units": "pretrained speech --labels phones.jsonl --layer 2 --output out/new/page.html",
    "fit_kmeans": "pretrained speech --layer 1 --smooth --num_clusters 4 --output out/new/kmeans.safetensors",
    "tune_decoding": "recogniser speech lm.arpa --beam_size 20",
}
ALL = "To do: 6 recordings, 0.1 minutes of audio."
LABELLED = "To do: 5 recordings, 0.1 minutes of audio. Without labels: 1 recordings."
PLANS = {
    "evaluate_units": f"""\
model       pretrained: layers [2, 3] of the student; layers [2, 3] of the teacher; layers [1] by k-means, 4 clusters
model       recogniser: layers [1] by k-means, 4 clusters
MFCCs       tuned, by k-means, 4 clusters
recordings  {LABELLED}
k-means on  {ALL}
results     out/new
""",
    "evaluate_layers": f"""\
model       pretrained: layers [1, 2, 3] of the student and the teacher
model       recogniser: layers [1] of the encoder
recordings  {LABELLED}
speakers    1 to fit on, 2 others to evaluate on
results     out/new
""",
    "evaluate_abx": f"""\
model       pretrained: layers [3] of the student; 25 triphones
model       recogniser: layers [1] of the encoder; 25 triphones
distances   angular for features, identical for units of layers with a codebook
recordings  {LABELLED}
results     out/new
""",
    "inspect_units": f"""\
model       pretrained: layers [2] of the teacher
recordings  {ALL} Without labels: 1 recordings.
results     out/new/page.html
""",
    "fit_kmeans": f"""\
model       pretrained: layers [1] of the student, smoothed
recordings  {ALL}
clusters    4, fitted on 4,794 frames
results     out/new/kmeans.safetensors
""",
    "tune_decoding": f"""\
model       recogniser, with lm.arpa
recordings  {LABELLED}
trials      32 pairs of lm_weight and word_score, beam_size=20
results     recogniser/decoding.json
""",
}
ON_SPEECH = "pretrained --data speech --labels phones.jsonl --output_dir out/new"
# Further ways to run them: command, arguments and plan.
OTHERS = {
    "evaluate a file of k-means": (
        "evaluate_units",
        f"{ON_SPEECH} --sources teacher --kmeans kmeans.safetensors",
        f"""\
model       pretrained: layers [2, 3] of the teacher; layers [2] of the student by kmeans.safetensors
recordings  {LABELLED}
results     out/new
""",
    ),
    "evaluate on DiscoPhon": (
        "evaluate_units",
        "pretrained --discophon benchmark --layers 3 --sources student --output_dir out/new",
        """\
model       pretrained: layers [3] of the student
recordings  To do: 2 recordings, 0.0 minutes of audio. Without labels: 0 recordings.
results     out/new
""",
    ),
    "fit layers on other data": (
        "evaluate_layers",
        f"{ON_SPEECH} --layers 2 --num_clusters 4 --fit_data more",
        f"""\
model       pretrained: layers [2] of the student
recordings  {LABELLED}
fitted on   To do: 1 recordings, 0.0 minutes of audio. Without labels: 0 recordings.
speakers    1 to fit on, 3 others to evaluate on
results     out/new
""",
    ),
    "only items of ABX": (
        "evaluate_abx",
        f"{ON_SPEECH} --items_only",
        f"""\
model       pretrained; 25 triphones
recordings  {LABELLED}
results     out/new
""",
    ),
    "inspect without labels": (
        "inspect_units",
        "pretrained speech --output page.html",
        f"""\
model       pretrained: layers [3] of the teacher
recordings  {ALL} Without labels: 6 recordings.
results     page.html
""",
    ),
    "tune on a few": (
        "tune_decoding",
        "recogniser speech lm.arpa --max_utterances 2 --lm_weights 1 2 --word_scores 0 --output out/new/decoding.json",
        """\
model       recogniser, with lm.arpa
recordings  To do: 2 recordings, 0.0 minutes of audio. Without labels: 1 recordings.
trials      2 pairs of lm_weight and word_score, beam_size=100
results     out/new/decoding.json
""",
    ),
}
CASES = {name: (name, words, PLANS[name]) for name, words in COMMANDS.items()} | OTHERS


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Models, a language model, clusters, and recordings of three speakers; one has neither phones nor transcript."""
    folder = tmp_path_factory.mktemp("dry_run")
    save_models(folder)
    write_arpa(folder / "lm.arpa", ["AB A", "BA AB", "A"], order=2)
    LayerKMeans(np.eye(4, 36, dtype=np.float32), layer=2, source="student").save(folder / "kmeans.safetensors")
    LayerKMeans(np.eye(4, 35, dtype=np.float32), layer=2, source="student").save(folder / "other.safetensors")
    phones = [["a", "b", "c", "SIL"][step // 5 % 4] for step in range(100)]
    labels = [{"name": str(number), "phones": phones} for number in (0, 1, 2, 3, 4, 6)]
    (folder / "phones.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    for data, numbers in {"speech": range(6), "more": [6]}.items():
        rows = [f"{number}.wav,s{number % 3 if number < 6 else 9},{'AB' * (number != 5)}" for number in numbers]
        for number in numbers:
            write(folder / data / f"{number}.wav", 16_000)
        (folder / data / "metadata.csv").write_text("\n".join(["file_name,speaker_id,transcription", *rows]) + "\n")
    for name in ("d", "e"):
        write(folder / "benchmark" / "audio" / "eng" / "test" / f"{name}.wav", 16_000)
    (folder / "benchmark" / "alignment").mkdir()
    alignment = "#file onset offset #phone\nd 0.0 1.0 a\ne 0.0 1.0 b\n"
    (folder / "benchmark" / "alignment" / "alignment-eng-test.txt").write_text(alignment)
    return folder


@pytest.fixture
def work(prepared, tmp_path, monkeypatch):
    """A copy of what is prepared as the current folder, where nothing can be computed."""

    def compute(*args, **options):
        raise AssertionError("something was computed")

    monkeypatch.setattr(WindowedInference, "run", compute)
    monkeypatch.setattr("dinosr_hf.analysis.mfcc_units.mfcc", compute)
    # Both packages need Python 3.12.
    monkeypatch.setattr("dinosr_hf.commands.evaluate_abx.import_fastabx", lambda: None)
    monkeypatch.setattr("dinosr_hf.analysis.discophon.import_discophon", lambda *module: None)
    monkeypatch.chdir(shutil.copytree(prepared, tmp_path / "work"))
    return tmp_path / "work"


def contents(folder):
    """Return the content of each file in a folder, and None for folders, by path."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def run(script, words, *flags):
    load_command(script).main([*words.split(), "--device", "cpu", *flags])


def error_of(script, words, *flags):
    with pytest.raises(SystemExit) as end:
        run(script, words, *flags)
    return end.value.code


@pytest.mark.parametrize(("script", "words", "plan"), CASES.values(), ids=CASES)
def test_a_dry_run_says_what_would_be_computed_and_writes_nothing(work, capsys, script, words, plan):
    before = contents(work)
    run(script, words, "--dry_run")
    assert capsys.readouterr().out == f"{plan}Nothing was computed.\n"
    assert contents(work) == before


@pytest.mark.parametrize(("script", "words"), COMMANDS.items(), ids=COMMANDS)
def test_without_it_the_same_words_compute(work, script, words):
    with pytest.raises(AssertionError, match="something was computed"):
        run(script, words)


# What is replaced in the arguments of a command, and by what, and a part of the message.
UNUSABLE = [
    ("evaluate_units", "pretrained", "no/such/model", "no/such/model is neither a folder nor a model on the Hub"),
    ("evaluate_units", "--num_clusters 4", "--num_clusters 9999", "num_clusters=9999, but must be"),
    ("evaluate_units", "out/new", "phones.jsonl/new", "phones.jsonl/new/units.md cannot be written to: Not a dir"),
    ("evaluate_units", "out/new", f"out/{'x' * 300}", "cannot be written to: File name too long"),
    ("evaluate_layers", "--labels phones.jsonl", "--labels none.jsonl", "none.jsonl does not exist"),
    ("evaluate_layers", "--num_clusters 4", "--num_clusters 9999", "num_clusters=9999, but must be"),
    ("evaluate_abx", "--data speech", "--data speech --layers 9", "layer=9 does not exist"),
    ("evaluate_abx", "--data speech", "--data speech --silence a b SIL", "There is no triphone in 5 recordings"),
    ("inspect_units", "--layer 2", "--layer 1", "layer=1 has no codebook"),
    ("inspect_units", "--labels phones.jsonl", "--labels none.jsonl", "none.jsonl does not exist"),
    ("fit_kmeans", "--num_clusters 4", "--num_clusters 9999", "num_clusters=9999, but must be"),
    ("fit_kmeans", "pretrained", "recogniser", "recogniser has DinoSRForCTC, but units come from"),
    ("tune_decoding", "lm.arpa", "none.arpa", "none.arpa is not a file"),
]


@pytest.mark.parametrize(("script", "old", "new", "message"), UNUSABLE)
def test_a_dry_run_refuses_what_the_run_would(work, capsys, script, old, new, message):
    words, before = COMMANDS[script].replace(old, new, 1), contents(work)
    said = error_of(script, words, "--dry_run")
    assert message in said and "\n" not in said and capsys.readouterr().out == ""
    assert contents(work) == before
    assert error_of(script, words) == said


def test_a_dry_run_refuses_clusters_of_another_model(work):
    words = f"{ON_SPEECH} --kmeans kmeans.safetensors other.safetensors"
    said = error_of("evaluate_units", words, "--dry_run")
    assert "k-means is of layer 2 of the student with 35 dimensions" in said
    assert error_of("evaluate_units", words) == said


def test_a_dry_run_of_kmeans_needs_the_same_packages(work, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    said = error_of("fit_kmeans", COMMANDS["fit_kmeans"], "--dry_run")
    assert said == 'fit_kmeans.py: K-means needs sklearn.cluster: pip install "dinosr-hf[analysis]"'
    assert error_of("fit_kmeans", COMMANDS["fit_kmeans"]) == said
