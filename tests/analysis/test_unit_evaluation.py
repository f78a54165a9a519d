"""Units of a corpus against its phones: counts, intervals, tables, peers, and the script."""

import csv
import io
import json

import numpy as np
import pytest
import soundfile
import torch
from transformers import Data2VecAudioConfig, Data2VecAudioModel, HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.analysis import Segment, UnitQuality
from dinosr_hf.analysis.segmentation import SegmentCounts
from dinosr_hf.analysis.speech import open_reference
from dinosr_hf.analysis.unit_evaluation import (
    HEADINGS,
    EvaluatedUnits,
    Reference,
    bootstrap_intervals,
    count_units,
    total,
    units_csv,
    units_curves,
    units_table,
)
from dinosr_hf.data import normalize_waveform, open_recordings
from dinosr_hf.units import BaselineExtractor, fit_kmeans, load_baseline
from dinosr_hf.utils.model_folder import save_folder
from scripts import load_script
from tiny import randomize, tiny_config
from tolerances import SAME_ARITHMETIC

# Frames of 20 ms whose centres are at 12.5, 32.5, ... ms.
CODES = [2, 2, 0, 0, 0, 1]
PHONES = [Segment("a", 0.0, 0.045), Segment("b", 0.045, 0.105), Segment("SIL", 0.105, 0.13)]


def one_recording(codes=CODES, labels=PHONES, **options):
    return count_units(codes, labels, ["SIL", "a", "b"], num_codes=4, **options)


def test_one_recording_by_hand():
    counts = one_recording()
    assert counts.table.tolist() == [[0, 1, 0, 0], [0, 0, 2, 0], [3, 0, 0, 0]]
    assert counts.runs.tolist() == [1, 1, 1, 0]
    assert counts.seconds == pytest.approx(0.12)
    # Units change at 42.5 and 102.5 ms, phones at 45 and 105.
    assert counts.segments == SegmentCounts(2, 2, 2)
    assert one_recording(tolerance=0.002).segments == SegmentCounts(0, 2, 2)
    figures = counts.figures()
    assert figures["phone_purity"] == figures["cluster_purity"] == figures["pnmi"] == figures["r_value"] == 1
    entropy = -(np.log2(1 / 2) / 2 + np.log2(1 / 3) / 3 + np.log2(1 / 6) / 6)
    assert figures["bitrate"] == pytest.approx(6 / 0.12 * entropy)
    assert figures["deduplicated_bitrate"] == pytest.approx(3 / 0.12 * np.log2(3))
    assert figures["active_codes"] == 3


def test_labels_one_a_step_are_the_same():
    steps = ["a"] * 4 + ["b"] * 6 + ["SIL"] * 3
    assert one_recording(labels=steps).table.tolist() == one_recording().table.tolist()
    doubled = one_recording(labels=steps[::2], step_seconds=0.02)
    assert doubled.table.tolist() == one_recording().table.tolist()


def test_a_corpus_is_the_sum_and_no_mean_of_means():
    parts = [one_recording(), one_recording([0, 0, 0, 1, 1, 1]), one_recording([3] * 6)]
    whole = total(parts)
    assert whole.seconds == pytest.approx(0.36)
    assert whole.segments == SegmentCounts(3, 3, 6)
    assert whole.figures()["phone_purity"] == UnitQuality.from_table(sum(part.table for part in parts)).phone_purity
    means = np.mean([part.figures()["pnmi"] for part in parts])
    assert abs(whole.figures()["pnmi"] - means) > 0.1
    with pytest.raises(ValueError, match="no counts to add up"):
        total([])


def speakers(*sizes, seed=0):
    """Counts of as many frames as said; how good units are differs from speaker to speaker."""
    generator = np.random.default_rng(seed)
    found = {}
    for number, size in enumerate(sizes):
        phones = generator.integers(0, 3, size)
        codes = np.where(generator.random(size) < generator.uniform(0.3, 0.9), phones, generator.integers(0, 4, size))
        names = np.array(["SIL", "a", "b"])[phones].tolist()
        found[f"s{number}"] = one_recording(codes, [name for name in names for _ in range(2)], step_seconds=0.01)
    return found


def test_intervals_hold_the_figure_and_depend_on_the_seed_alone():
    counts = speakers(300, 200, 400, 250, 300)
    figures = total(counts.values()).figures()
    intervals = bootstrap_intervals(counts, num_samples=300)
    assert intervals.keys() == figures.keys()
    for name, (low, high) in intervals.items():
        assert low <= figures[name] <= high, name
    assert intervals["pnmi"][1] - intervals["pnmi"][0] > 0.02
    assert intervals == bootstrap_intervals(dict(reversed(counts.items())), num_samples=300)
    assert intervals != bootstrap_intervals(counts, num_samples=300, seed=1)
    narrow = bootstrap_intervals(counts, num_samples=300, level=0.5)
    assert all(narrow[n][1] - narrow[n][0] <= intervals[n][1] - intervals[n][0] + 1e-12 for n in intervals)


def test_speakers_that_are_alike_leave_no_doubt():
    alike = dict.fromkeys(("a", "b", "c"), speakers(300)["s0"])
    for low, high in bootstrap_intervals(alike, num_samples=50).values():
        assert high - low == pytest.approx(0, abs=1e-9)


def test_intervals_that_cannot_be():
    with pytest.raises(ValueError, match="There are 1 speakers, but an interval over speakers needs at least 2"):
        bootstrap_intervals(speakers(10))
    with pytest.raises(ValueError, match=r"level=1.0 and num_samples=1000: level must be between 0 and 1"):
        bootstrap_intervals(speakers(10, 10), level=1.0)


# -- recordings


def reference(**options):
    labels = {"a": PHONES, "b": PHONES, "c": PHONES}
    return Reference(["x/a.wav", "b", "d"], labels, **options)


def test_recordings_are_judged_by_speaker():
    units = [("b", np.array([CODES, [0] * 6])), ("x/a.wav", np.array([CODES] * 2)), ("d", np.array([CODES] * 2))]
    ours = reference(speakers=["ann", "ann", None])
    assert ours.ids == ["x/a.wav", "b"]
    assert ours.phones == ["SIL", "a", "b"]
    first, second = ours.judge(units, num_codes=4)
    assert list(first) == list(second) == ["ann"]
    assert first["ann"].table.sum() == 12
    assert second["ann"].table.tolist() == [[1, 1, 0, 0], [2, 0, 2, 0], [3 + 3, 0, 0, 0]]
    apart, _ = reference().judge(units, num_codes=4)
    assert list(apart) == ["b", "x/a.wav"]


def test_references_that_cannot_be():
    with pytest.raises(ValueError, match="There are 2 speakers for 3 recordings"):
        reference(speakers=["ann", "bob"])
    with pytest.raises(ValueError, match=r"None of 1 recordings has labels. They are named like 'z'"):
        Reference(["z"], {"a": PHONES})
    with pytest.raises(ValueError, match="No recording with labels was judged"):
        reference().judge([("d", np.array([CODES]))], num_codes=4)
    with pytest.raises(ValueError, match="b: codes holds 2, but num_codes=2 allows 0 to 1"):
        reference().judge([("b", np.array([CODES]))], num_codes=2)


def rows():
    counts = speakers(300, 200)
    return [
        EvaluatedUnits.of("runs/a|b", 5, "student", counts, num_samples=50),
        EvaluatedUnits.of("runs/c", 6, "k-means", {"all": total(counts.values())}),
    ]


def test_tables_say_the_same():
    sure, unsure = rows()[1], rows()[0]
    assert unsure.intervals and not sure.intervals
    lines = units_table(rows()).splitlines()
    assert len(lines) == 4
    assert all(line.replace("\\|", "").count("|") == len(HEADINGS) + 4 for line in lines)
    low, high = unsure.intervals["pnmi"]
    assert f"| {unsure.figures['pnmi']:.3f} ({low:.3f} to {high:.3f}) |" in lines[2]
    assert lines[3].startswith("| runs/c | 6 | k-means | ")
    first, second = csv.DictReader(io.StringIO(units_csv(rows())))
    assert float(first["pnmi"]) == unsure.figures["pnmi"]
    assert float(first["pnmi_low"]) == low
    assert second["pnmi_low"] == ""
    assert unsure.to_dict()["intervals"]["pnmi"] == [low, high]
    assert unsure.to_dict()["num_frames"] == 500
    assert EvaluatedUnits.of("m", 1, "student", speakers(30, 30), num_samples=0).intervals == {}


# -- opened together


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Six recordings of three speakers at 16 kHz, and their labels of 10 ms."""
    folder = tmp_path_factory.mktemp("judged")
    generator = np.random.default_rng(0)
    (folder / "speech").mkdir()
    with (
        open(folder / "speech" / "metadata.csv", "w", encoding="utf-8") as table,
        open(folder / "phones.jsonl", "w", encoding="utf-8") as labels,
    ):
        table.write("file_name,transcription,speaker_id\n")
        for number in range(6):
            samples = generator.standard_normal(4_000 + 320 * number).cumsum() * 0.01
            soundfile.write(folder / "speech" / f"{number}.wav", np.clip(samples, -0.9, 0.9), 16_000)
            table.write(f"{number}.wav,no,s{number % 3}\n")
            phones = [["a", "b", "SIL"][(step // 5 + number) % 3] for step in range(-(-len(samples) // 160))]
            labels.write(json.dumps({"name": str(number), "phones": phones}) + "\n")
    return folder


def test_a_folder_with_a_table_has_its_speakers(corpus, caplog):
    source, ours = open_reference(corpus / "speech", labels=corpus / "phones.jsonl")
    assert len(source) == len(ours.ids) == 6
    assert caplog.text == ""
    with pytest.raises(ValueError, match=r"The speakers: .*reader"):
        open_reference(corpus / "speech", labels=corpus / "phones.jsonl", speaker_column="reader")
    with pytest.raises(ValueError, match=r"There are no labels. Give a file of phones"):
        open_reference(corpus / "speech")
    with pytest.raises(ValueError, match="the synthetic corpus has labels of its own"):
        open_reference("synthetic", labels="phones.jsonl")


def test_the_synthetic_corpus_brings_its_phones():
    source, ours = open_reference("synthetic", num_synthetic=2, seed=3)
    assert len(source) == len(ours.ids) == 2
    assert len(ours.phones) > 10


# -- peers


def peer(folder, kind):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 50,
        "conv_dim": [11, 13, 15],
        "conv_stride": [5, 2, 2],
        "conv_kernel": [10, 3, 3],
        "num_conv_pos_embedding_groups": 4,
        "num_conv_pos_embeddings": 3,
    }
    config, model = {"hubert": (HubertConfig, HubertModel), "data2vec": (Data2VecAudioConfig, Data2VecAudioModel)}[
        kind
    ]
    model = model(config(**sizes, conv_pos_kernel_size=5) if kind == "data2vec" else config(**sizes))
    model.eval().save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=kind == "data2vec").save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["hubert", "data2vec"])
def test_features_of_peers_are_their_hidden_states(tmp_path, corpus, kind):
    model = peer(tmp_path / kind, kind)
    extractor = load_baseline(tmp_path / kind, layers=[2, 1])
    recordings = open_recordings([corpus / "speech"])
    for name, features in extractor.features(recordings):
        samples, _ = soundfile.read(corpus / "speech" / name, dtype="float32")
        values = normalize_waveform(samples) if kind == "data2vec" else samples
        with torch.no_grad():
            hidden = model(torch.from_numpy(values)[None], output_hidden_states=True).hidden_states
        wanted = torch.stack([hidden[2][0], hidden[1][0]], dim=1)
        torch.testing.assert_close(torch.from_numpy(features), wanted, **SAME_ARITHMETIC)
    kmeans = fit_kmeans(BaselineExtractor(model, layers=[1]), recordings, 5)
    codes = [units.codes for units in BaselineExtractor(model, layers=[1]).units(recordings, kmeans=kmeans)]
    assert {code for row in codes for code in row[0].tolist()} <= set(range(5))


def test_peers_that_cannot_be(tmp_path):
    model = peer(tmp_path / "hubert", "hubert")
    with pytest.raises(ValueError, match=r"layers=\[3\]: this model has the layers 1 to 2"):
        BaselineExtractor(model, layers=[3])
    with pytest.raises(ValueError, match="dtype='int8' is unknown"):
        load_baseline(tmp_path / "hubert", layers=[1], dtype="int8")
    with pytest.raises(ValueError, match="cannot be opened"):
        load_baseline(tmp_path / "nothing", layers=[1])


# -- the script


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "ours"
    save_folder(randomize(DinoSRForPreTraining(tiny_config())), folder)
    return folder


def test_the_script_judges_ours_and_peers_in_one_table(corpus, trained, tmp_path, capsys):
    peer(tmp_path / "hubert", "hubert")
    script = load_script("examples/evaluate_units.py")
    words = [str(trained), str(tmp_path / "hubert"), "--data", str(corpus / "speech")]
    words += ["--labels", str(corpus / "phones.jsonl"), "--output_dir", str(tmp_path / "out"), "--num_samples", "20"]
    script.main([*words, "--kmeans_data", str(corpus / "speech"), "--kmeans_layers", "1", "--num_clusters", "4"])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "units.json").read_text(encoding="utf-8"))
    kinds = [(row["units"], row["layer"]) for row in found]
    ours = [("student", 2), ("student", 3), ("teacher", 2), ("teacher", 3), ("k-means", 1)]
    assert kinds == [*ours, ("k-means", 1)]
    assert {row["num_speakers"] for row in found} == {3}
    assert len({row["num_frames"] for row in found}) == 1
    assert (tmp_path / "out" / "units.md").read_text(encoding="utf-8") in printed
    assert len((tmp_path / "out" / "units.csv").read_text(encoding="utf-8").splitlines()) == 7
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".csv", ".json", ".md", ".pdf", ".png"]
    with pytest.raises(SystemExit, match=r"evaluate_units.py: .*hubert has no codebooks. Give --kmeans_data"):
        script.main([str(tmp_path / "hubert"), *words[2:]])
    with pytest.raises(SystemExit, match=r"evaluate_units.py: .*nothing is not here"):
        script.main([words[0], *words[2:4], "--labels", "nothing", *words[6:]])


def test_curves_have_the_layers_in_order_and_their_intervals():
    counts = {"ann": count_units([0, 0, 1], ["x", "x", "y"], ["x", "y"], num_codes=2, step_seconds=0.02)}
    both = {**counts, "bob": count_units([1, 1, 1], ["x", "x", "y"], ["x", "y"], num_codes=2, step_seconds=0.02)}
    rows = [EvaluatedUnits.of("m", layer, "teacher", both, num_samples=9) for layer in (3, 2)]
    rows.append(EvaluatedUnits.of("m", 1, "k-means", counts))
    teacher, kmeans = units_curves(rows)
    assert (teacher.name, list(teacher.layers)) == ("m, teacher", [2, 3])
    assert (kmeans.name, list(kmeans.layers), kmeans.intervals) == ("m, k-means", [1], {})
    assert teacher.metrics["PNMI"] == [rows[1].figures["pnmi"], rows[0].figures["pnmi"]]
    assert teacher.intervals["PNMI"] == [rows[1].intervals["pnmi"], rows[0].intervals["pnmi"]]
    assert kmeans.metrics["phone purity"] == [1.0] and "boundary recall" not in kmeans.metrics


def test_the_script_wants_both_options_of_kmeans(capsys):
    with pytest.raises(SystemExit):
        load_script("examples/evaluate_units.py").parse(
            ["m", "--data", "d", "--output_dir", "o", "--kmeans_layers", "1"]
        )
    assert "--kmeans_data and --kmeans_layers belong together" in capsys.readouterr().err
