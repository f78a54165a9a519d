"""Units of a corpus against its phones: counts, intervals, tables, baselines, and the script."""

import csv
import io
import json

import numpy as np
import pytest
import soundfile
import torch
from transformers import Data2VecAudioConfig, Data2VecAudioModel, HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from audio_files import datasets, flac, write
from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.analysis import Segment, UnitQuality, mfcc_units
from dinosr_hf.analysis.segmentation import SegmentCounts
from dinosr_hf.analysis.speech import open_reference
from dinosr_hf.analysis.unit_evaluation import (
    REPORT,
    Reference,
    bootstrap_intervals,
    count_units,
    evaluate_units,
    total,
)
from dinosr_hf.commands._evaluation import open_labelled_speech
from dinosr_hf.commands._shared import dataset_options
from dinosr_hf.data import normalize_waveform, open_recordings
from dinosr_hf.inference.windowed import WindowedInference
from dinosr_hf.units import BaselineExtractor, LayerKMeans, UnitExtractor, fit_layer_kmeans, load_baseline, load_model
from dinosr_hf.utils.model_folder import save_folder
from scripts import load_command
from tiny import randomize, tiny_config
from tolerances import SAME_ARITHMETIC

pytestmark = pytest.mark.usefixtures("no_pictures")

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


def test_counts_take_memory_for_what_is_counted():
    counts = count_units(CODES, PHONES, ["SIL", "a", "b"], num_codes=1_000_000)
    assert counts.cells.shape == (3, 1_000_000) and counts.cells.nnz == 3
    assert total([counts, counts]).cells.nnz == 3


def test_fixed_rate_labels_give_the_same_counts():
    steps = ["a"] * 4 + ["b"] * 6 + ["SIL"] * 3
    assert one_recording(labels=steps).table.tolist() == one_recording().table.tolist()
    doubled = one_recording(labels=steps[::2], step_seconds=0.02)
    assert doubled.table.tolist() == one_recording().table.tolist()


def test_corpus_metrics_are_not_means_of_means():
    parts = [one_recording(), one_recording([0, 0, 0, 1, 1, 1]), one_recording([3] * 6)]
    whole = total(parts)
    assert whole.seconds == pytest.approx(0.36)
    assert whole.segments == SegmentCounts(3, 3, 6)
    assert whole.figures()["phone_purity"] == UnitQuality.from_table(sum(part.table for part in parts)).phone_purity
    means = np.mean([part.figures()["pnmi"] for part in parts])
    assert abs(whole.figures()["pnmi"] - means) > 0.1


def speakers(*sizes, seed=0):
    """Counts of so many frames of each speaker; the quality of units differs between speakers."""
    generator = np.random.default_rng(seed)
    found = {}
    for number, size in enumerate(sizes):
        phones = generator.integers(0, 3, size)
        codes = np.where(generator.random(size) < generator.uniform(0.3, 0.9), phones, generator.integers(0, 4, size))
        names = np.array(["SIL", "a", "b"])[phones].tolist()
        found[f"s{number}"] = one_recording(codes, [name for name in names for _ in range(2)], step_seconds=0.01)
    return found


def test_intervals_contain_the_metric_and_depend_only_on_the_seed():
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


def test_identical_speakers_have_empty_intervals():
    alike = dict.fromkeys(("a", "b", "c"), speakers(300)["s0"])
    for low, high in bootstrap_intervals(alike, num_samples=50).values():
        assert high - low == pytest.approx(0, abs=1e-9)


def test_bootstrap_intervals_refuses():
    with pytest.raises(ValueError, match="There are 1 speakers, but an interval over speakers needs at least 2"):
        bootstrap_intervals(speakers(10))
    with pytest.raises(ValueError, match=r"level=1.0 is out of range: it must be between 0 and 1"):
        bootstrap_intervals(speakers(10, 10), level=1.0)
    with pytest.raises(ValueError, match=r"num_samples=0 is out of range: it must be at least 1"):
        bootstrap_intervals(speakers(10, 10), num_samples=0)


# -- recordings


def reference(**options):
    labels = {"a": PHONES, "b": PHONES, "c": PHONES}
    return Reference(["x/a.wav", "b", "d"], labels, **options)


def test_recordings_are_counted_by_speaker():
    units = [("b", np.array([CODES, [0] * 6])), ("x/a.wav", np.array([CODES] * 2)), ("d", np.array([CODES] * 2))]
    ours = reference(speakers=["ann", "ann", None])
    assert list(ours.labels) == ["x/a.wav", "b"]
    assert ours.phones == ["SIL", "a", "b"]
    first, second = ours.count_by_speaker(units, num_codes=4)
    assert list(first) == list(second) == ["ann"]
    assert first["ann"].table.sum() == 12
    assert second["ann"].table.tolist() == [[1, 1, 0, 0], [2, 0, 2, 0], [3 + 3, 0, 0, 0]]
    apart, _ = reference().count_by_speaker(units, num_codes=4)
    assert list(apart) == ["b", "x/a.wav"]


def test_labels_belong_to_one_recording():
    ids = ["ann/1.wav", "ann/2.wav", "bob/1.wav"]
    ours = Reference(ids, {"ann/1": PHONES, "ann/2": PHONES})
    assert list(ours.labels) == ["ann/1.wav", "ann/2.wav"]
    with pytest.raises(ValueError, match=r"labels of '1' fit two recordings, 'ann/1\.wav' and 'bob/1\.wav'"):
        Reference(ids, {"1": PHONES})
    # A recording that cannot be read has a name, too.
    assert list(Reference(ids[1:], {"1": PHONES}).labels) == ["bob/1.wav"]
    with pytest.raises(ValueError, match=r"labels of '1' fit two recordings, 'bob/1\.wav' and 'ann/1\.wav'"):
        Reference(ids[1:], {"1": PHONES}, others=ids[:1])


def test_names_phones_and_speakers_that_look_alike_are_one():
    labels = {"e\u0301": [Segment("a\u0303\u200e", 0, 0.1), Segment("ã", 0.1, 0.2)], "b": ["ã\ufeff", "a\u0303"]}
    ours = Reference(["é.wav", "b"], labels, speakers=["zoë", "zoe\u0308\u200b"])
    assert ours.phones == ["SIL", "ã"]
    assert ours.labels["b"] == ["ã", "ã"] and {label.label for label in ours.labels["é.wav"]} == {"ã"}
    assert set(ours.speakers.values()) == {"zoë"}


def test_reference_refuses():
    with pytest.raises(ValueError, match="There are 2 speakers for 3 recordings"):
        reference(speakers=["ann", "bob"])
    with pytest.raises(ValueError, match=r"None of 1 recordings has labels. They are named like 'z'"):
        Reference(["z"], {"a": PHONES})
    with pytest.raises(ValueError, match="No recording with labels was evaluated"):
        reference().count_by_speaker([("d", np.array([CODES]))], num_codes=4)
    with pytest.raises(ValueError, match="b: codes holds 2, but num_codes=2 allows 0 to 1"):
        reference().count_by_speaker([("b", np.array([CODES]))], num_codes=2)


def rows():
    counts = speakers(300, 200)
    return [
        evaluate_units("runs/a|b", 5, "student", counts, num_samples=50),
        evaluate_units("runs/c", 6, "k-means", {"all": total(counts.values())}),
    ]


def test_markdown_csv_and_json_agree(tmp_path):
    with_intervals, without = rows()
    assert with_intervals["intervals"] and not without["intervals"]
    lines = REPORT.markdown(rows()).splitlines()
    assert len(lines) == 4
    assert all(line.replace("\\|", "").count("|") == len(REPORT.metrics) + 4 for line in lines)
    low, high = with_intervals["intervals"]["pnmi"]
    assert f"| {with_intervals['pnmi']:.3f} ({low:.3f} to {high:.3f}) |" in lines[2]
    assert lines[3].startswith("| runs/c | 6 | k-means | ")
    first, second = csv.DictReader(io.StringIO(REPORT.csv(rows())))
    assert float(first["pnmi"]) == with_intervals["pnmi"]
    assert float(first["pnmi_low"]) == low
    assert second["pnmi_low"] == ""
    REPORT.write(tmp_path, "units", rows())
    record, _ = json.loads((tmp_path / "units.json").read_text(encoding="utf-8"))
    assert record["intervals"]["pnmi"] == [low, high]
    assert (record["num_units"], record["num_frames"]) == (4, 500)
    assert evaluate_units("m", 1, "student", speakers(30, 30), num_samples=0)["intervals"] == {}


# -- opened together


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Six recordings of three speakers at 16 kHz, and their labels of 10 ms."""
    folder = tmp_path_factory.mktemp("evaluated")
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
    assert len(source) == len(ours.labels) == 6
    assert caplog.text == ""
    with pytest.raises(ValueError, match=r"The speakers: .*reader"):
        open_reference(corpus / "speech", labels=corpus / "phones.jsonl", speaker_column="reader")
    with pytest.raises(ValueError, match=r"--labels is missing, and only .* has its own: give a file of phones"):
        open_reference(corpus / "speech")
    with open(corpus / "none.jsonl", "w") as file:
        file.write('{"name": "a", "phones": []}\n')
    with pytest.raises(ValueError, match=r"none\.jsonl has no phones"):
        open_reference(corpus / "speech", labels=corpus / "none.jsonl")
    with pytest.raises(ValueError, match="the synthetic corpus has labels of its own"):
        open_reference("synthetic", labels="phones.jsonl")
    for given in ({"speaker_column": "folder"}, {"tier": "MAU"}, {"config_name": "de"}, {"audio_column": "raw"}):
        with pytest.raises(ValueError, match=r"=.* has no effect on the synthetic corpus\. Leave \w+ out"):
            open_reference("synthetic", **given)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("metadata.csv", "a|In being, comparatively modern.|In being, comparatively modern.\nb|no|no\n"),
        ("metadata.csv", "id,text\na,no\n"),
        ("metadata.jsonl", '{"id": "a", "text": "path"}\n'),
    ],
    ids=["LJSpeech", "id", "lines"],
)
def test_a_table_without_paths_is_not_used(tmp_path, caplog, name, table):
    write(tmp_path / "wavs" / "a.wav", 900)
    (tmp_path / name).write_text(table)
    (tmp_path / "phones.jsonl").write_text('{"name": "a", "phones": ["t"]}\n')
    source, ours = open_reference(tmp_path, labels=tmp_path / "phones.jsonl")
    assert [utterance.id for utterance in source.utterances] == list(ours.labels) == ["wavs/a.wav"]
    assert f"{tmp_path / name} is not used: its first line names none of path, " in caplog.text


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("metadata.csv", 'sep=;\n"speaker_id";"path"\ns;a.wav\n'),
        ("metadata.csv", "\ufeffaudio\tspeaker_id\na.wav\ts\n"),
        ("metadata.jsonl", '\n{"speaker_id": "s", "file_name": "a.wav"}\n'),
    ],
    ids=["semicolons", "tabs", "lines"],
)
def test_recordings_that_a_table_leaves_out_are_said(tmp_path, caplog, name, table):
    for recording in "ab":
        write(tmp_path / f"{recording}.wav", 900)
    (tmp_path / name).write_text(table, encoding="utf-8")
    (tmp_path / "phones.jsonl").write_text('{"name": "a", "phones": ["t"]}\n{"name": "b", "phones": ["t"]}\n')
    source, ours = open_reference(tmp_path, labels=tmp_path / "phones.jsonl")
    assert list(ours.labels) == ["a.wav"] and ours.speakers == {"a.wav": "s"}
    assert source.left_out == {"b.wav": "no label"}
    assert "1 audio files beside it are not in the table and are left out, for example b.wav." in caplog.text


@pytest.mark.parametrize("script", ["evaluate_units", "evaluate_layers", "evaluate_abx"])
def test_the_scripts_take_the_column_of_the_audio(tmp_path, script):
    data, labels = tmp_path / "data", tmp_path / "phones.jsonl"
    datasets.Dataset.from_dict({"id": ["a"], "speech": [flac(900)]}).save_to_disk(data)
    labels.write_text('{"name": "a", "phones": ["t"]}\n')
    words = ["model", "--data", str(data), "--labels", str(labels), "--output_dir", str(tmp_path)]
    parse = load_command(script).parse
    with pytest.raises(ValueError, match="audio_column='audio' is not a column of the dataset, which has id, speech"):
        open_labelled_speech(data, parse(words))
    source, _ = open_labelled_speech(data, parse([*words, "--audio_column", "speech"]))
    assert source.utterances == [("a", 900)]


@pytest.mark.parametrize("script", ["evaluate_units", "evaluate_layers", "evaluate_abx"])
@pytest.mark.parametrize("kind", ["dataset", "table"])
def test_the_scripts_take_a_split(tmp_path, script, kind):
    data, labels = tmp_path / "data", tmp_path / "phones.jsonl"
    splits = {name: datasets.Dataset.from_dict({"id": [name], "audio": [flac(900)]}) for name in ("dev", "test")}
    if kind == "dataset":
        datasets.DatasetDict(splits).save_to_disk(data)
    else:
        for name in splits:
            (data / name).mkdir(parents=True)
            (data / name / "test.wav").write_bytes(flac(900))
            (data / name / "metadata.csv").write_text("file_name\ntest.wav\n")
    labels.write_text('{"name": "test", "phones": ["t"]}\n')
    words = ["model", "--data", str(data), "--labels", str(labels), "--output_dir", str(tmp_path), "--split", "test"]
    options = load_command(script).parse(words)
    source, reference = open_labelled_speech(data, options, options.split)
    assert len(source) == len(reference.labels) == 1
    with pytest.raises(ValueError, match="split='train'"):
        open_labelled_speech(data, options, "train")


@pytest.fixture
def librispeech(tmp_path):
    """Two recordings in the folders of their speakers, and labels as the Montreal Forced Aligner writes them."""
    for name in ("84/121/84-121-0", "85/122/85-122-0"):
        write(tmp_path / "speech" / f"{name}.flac", 16_000)
    phones = ["sil"] * 20 + ["AH0"] * 20 + ["AH1"] * 20 + ["sp"] * 20 + ["T"] * 20
    rows = [{"name": name, "phones": phones} for name in ("84-121-0", "85-122-0")]
    (tmp_path / "phones.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "speech", tmp_path / "phones.jsonl"


def test_the_first_folder_may_be_the_speaker(librispeech, tmp_path, caplog):
    data, labels = librispeech
    _, unknown = open_reference(data, labels=labels)
    assert not unknown.has_speakers and "Give --speakers: the column that has them, or folder" in caplog.text
    _, known = open_reference(data, labels=labels, speaker_column="folder")
    assert known.has_speakers and [*known.speakers.values()] == ["84", "85"]
    write(data / "loose.wav", 900)
    with pytest.raises(ValueError, match=r"The speakers: .* first folder of a path, but loose\.wav begins with none"):
        open_reference(data, labels=labels, speaker_column="folder")


@pytest.mark.parametrize(
    ("script", "flags"), [("evaluate_units", ["--abx"]), ("evaluate_layers", []), ("evaluate_abx", [])]
)
def test_what_compares_speakers_needs_them(librispeech, tmp_path, monkeypatch, script, flags):
    data, labels = librispeech
    module = load_command(script)
    monkeypatch.setattr(module, "import_fastabx", lambda: None, raising=False)
    words = [str(tmp_path / "nothing"), "--data", str(data), "--labels", str(labels), "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"needs speakers, but the data names none\. Give --speakers: .*, or folder"):
        module.main([*words, *flags])
    with pytest.raises(SystemExit, match="nothing is neither a folder nor a model"):  # which is what comes next
        module.main([*words, *flags, "--speakers", "folder"])


@pytest.mark.parametrize(
    ("flags", "phones"),
    [([], ["AH0", "AH1", "SIL", "T", "sil", "sp"]), (["--fold_stress"], ["AH", "SIL", "T"])],
    ids=["as they are", "folded"],
)
def test_phones_may_be_folded(librispeech, tmp_path, flags, phones):
    data, labels = librispeech
    words = ["model", "--data", str(data), "--labels", str(labels), "--output_dir", str(tmp_path)]
    _, ours = open_labelled_speech(data, load_command("evaluate_units").parse([*words, *flags]))
    assert ours.phones == phones


def test_the_synthetic_corpus_has_its_own_phones():
    source, ours = open_reference("synthetic", num_synthetic=2)
    assert len(source) == len(ours.labels) == 2
    assert len(ours.phones) > 10


# -- baselines


def save_baseline(folder, kind):
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
def test_features_of_baselines_equal_their_hidden_states(tmp_path, corpus, kind):
    model = save_baseline(tmp_path / kind, kind)
    extractor = load_baseline(tmp_path / kind, layers=[2, 1])
    recordings = open_recordings([corpus / "speech"])
    for name, features in extractor.features(recordings):
        samples, _ = soundfile.read(corpus / "speech" / name, dtype="float32")
        values = normalize_waveform(samples) if kind == "data2vec" else samples
        with torch.no_grad():
            hidden = model(torch.from_numpy(values)[None], output_hidden_states=True).hidden_states
        wanted = torch.stack([hidden[2][0], hidden[1][0]], dim=1)
        torch.testing.assert_close(torch.from_numpy(features), wanted, **SAME_ARITHMETIC)
    kmeans = fit_layer_kmeans(BaselineExtractor(model, layers=[1]), recordings, 5)
    codes = [units.codes for units in BaselineExtractor(model, layers=[1]).units(recordings, kmeans=kmeans)]
    assert {code for row in codes for code in row[0].tolist()} <= set(range(5))


def test_load_baseline_refuses(tmp_path):
    model = save_baseline(tmp_path / "hubert", "hubert")
    with pytest.raises(ValueError, match=r"layer=3 does not exist\. Layers of this model: 1, 2"):
        BaselineExtractor(model, layers=[3])
    with pytest.raises(ValueError, match="dtype='int8' is unknown"):
        load_baseline(tmp_path / "hubert", layers=[1], dtype="int8")
    with pytest.raises(ValueError, match="is neither a folder nor a model on the Hub"):
        load_baseline(tmp_path / "nothing", layers=[1])


# -- the script


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "ours"
    save_folder(randomize(DinoSRForPreTraining(tiny_config())), folder)
    return folder


@pytest.fixture(scope="module")
def anchored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "anchored"
    save_folder(randomize(DinoSRForPreTraining(tiny_config(num_anchor_labels=5))), folder)
    return folder


def words_for(corpus, *models):
    labels = ["--labels", str(corpus / "phones.jsonl"), "--num_samples", "0"]
    return [*map(str, models), "--data", str(corpus / "speech"), *labels]


def test_the_script_evaluates_the_anchor(corpus, trained, anchored, tmp_path):
    script = load_command("evaluate_units")
    words = [*words_for(corpus, anchored), "--output_dir", str(tmp_path)]
    script.main([*words, "--layers", "2"])
    rows = json.loads((tmp_path / "units.json").read_text(encoding="utf-8"))
    assert [(row["units"], row["layer"]) for row in rows] == [("student", 2), ("teacher", 2), ("anchor", 3)]
    assert rows[2]["active_codes"] <= 5 and len({row["num_frames"] for row in rows}) == 1
    script.main([*words, "--sources", "anchor"])
    assert json.loads((tmp_path / "units.json").read_text(encoding="utf-8")) == rows[2:]
    with pytest.raises(SystemExit, match=r"evaluate_units.py: \S+: source=.anchor.*num_anchor_labels=0"):
        script.main([str(trained), *words[1:], "--sources", "anchor"])


def test_the_script_evaluates_mfccs(corpus, trained, tmp_path, capsys):
    words = [*words_for(corpus, trained), "--output_dir", str(tmp_path), "--sources", "student", "--layers", "2"]
    more = ["--kmeans_data", str(corpus / "speech"), "--mfccs", "textbook", "tuned", "--num_clusters", "6"]
    load_command("evaluate_units").main([*words, *more])
    rows = json.loads((tmp_path / "units.json").read_text(encoding="utf-8"))
    kinds = ["student", "k-means on textbook MFCCs", "k-means on tuned MFCCs"]
    assert [(row["units"], row["layer"]) for row in rows] == list(zip(kinds, [2, 0, 0], strict=True))
    assert rows[1]["active_codes"] == rows[2]["active_codes"] == 6
    assert rows[1]["pnmi"] != rows[2]["pnmi"]
    # 4,000 to 5,600 samples with a frame of 400 every 320
    assert rows[1]["num_frames"] == rows[2]["num_frames"] == sum(range(12, 18))
    assert f"| none | 0 | {kinds[1]} | 6 | 87 | " in capsys.readouterr().out


def test_a_configuration_is_of_the_evaluated_data_alone(corpus, trained, tmp_path):
    """Recordings to fit on are other data, which need not have it."""
    words = [*words_for(corpus, trained), "--output_dir", str(tmp_path), "--data_config", "de"]
    with pytest.raises(SystemExit, match=r"config_name='de' is for a dataset with configurations"):
        load_command("evaluate_units").main(words)
    options = load_command("evaluate_units").parse([*words, "--kmeans_data", "d", "--mfccs", "tuned"])
    assert dataset_options(options, options.data)["config_name"] == dataset_options(options)["config_name"] == "de"
    assert dataset_options(options, "d")["config_name"] is None


def test_the_script_evaluates_a_file_of_kmeans(corpus, trained, anchored, tmp_path):
    file, script = tmp_path / "kmeans.safetensors", load_command("evaluate_units")
    words = [str(trained), str(corpus / "speech"), "--output", str(file), "--layer", "1", "--num_clusters", "4"]
    load_command("fit_kmeans").main([*words, "--smooth"])
    more = ["--output_dir", str(tmp_path), "--sources", "student", "--layers", "2", "--kmeans", str(file)]
    script.main([*words_for(corpus, trained), *more])
    rows = json.loads((tmp_path / "units.json").read_text(encoding="utf-8"))
    kinds = [("student", 2, 7), (f"k-means of {file}", 1, 4)]
    assert [(row["units"], row["layer"], row["num_units"]) for row in rows] == kinds
    source, ours = open_reference(corpus / "speech", labels=corpus / "phones.jsonl")
    extractor = UnitExtractor(load_model(trained), layers=[1], is_smoothed=True)
    frames = {"stride": extractor.config.inputs_to_logits_ratio, "field": extractor.config.receptive_field}
    units = extractor.units(source, kmeans=LayerKMeans.load(file))
    (counts,) = ours.count_by_speaker(units, num_codes=4, **frames)
    assert total(counts.values()).figures()["pnmi"] == rows[1]["pnmi"]
    with pytest.raises(SystemExit, match=r"k-means was fitted on another model: .*anchored is [0-9a-f]{16}\. Use it"):
        script.main([*words_for(corpus, anchored), *more])
    with pytest.raises(SystemExit, match="--kmeans has clusters of one model, but there are several"):
        script.main([*words_for(corpus, trained, anchored), *more])


def test_the_script_evaluates_models_and_baselines_in_one_table(corpus, trained, tmp_path, capsys):
    save_baseline(tmp_path / "hubert", "hubert")
    script = load_command("evaluate_units")
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
    with pytest.raises(SystemExit, match=r"evaluate_units.py: .*nothing does not exist"):
        script.main([words[0], *words[2:4], "--labels", "nothing", *words[6:]])


@pytest.mark.parametrize(
    ("script", "flag", "value"),
    [
        ("evaluate_units", "layers", "1"),
        ("evaluate_units", "sources", "teacher"),
        ("evaluate_layers", "sources", "teacher"),
        ("evaluate_abx", "sources", "teacher"),
    ],
)
def test_options_of_a_dinosr_are_refused_without_one(corpus, tmp_path, monkeypatch, script, flag, value):
    save_baseline(tmp_path / "hubert", "hubert")
    words = words_for(corpus, tmp_path / "hubert")[:-2]
    words += ["--output_dir", str(tmp_path / "out"), f"--{flag}", value]
    module = load_command(script)
    monkeypatch.setattr(module, "import_fastabx", lambda: None, raising=False)
    with pytest.raises(SystemExit, match=rf"{script}\.py: {flag}=.*{value}.* is set, but no model is a DinoSR"):
        module.main(words)


def test_curves_have_layers_in_order_and_their_intervals():
    counts = {"ann": count_units([0, 0, 1], ["x", "x", "y"], ["x", "y"], num_codes=2, step_seconds=0.02)}
    both = {**counts, "bob": count_units([1, 1, 1], ["x", "x", "y"], ["x", "y"], num_codes=2, step_seconds=0.02)}
    rows = [evaluate_units("m", layer, "teacher", both, num_samples=9) for layer in (3, 2)]
    rows.append(evaluate_units("m", 1, "k-means", counts))
    teacher, kmeans = REPORT.curves(rows)
    assert (teacher.name, list(teacher.layers)) == ("m, teacher", [2, 3])
    assert (kmeans.name, list(kmeans.layers), kmeans.intervals) == ("m, k-means", [1], {})
    assert teacher.metrics["PNMI"] == [rows[1]["pnmi"], rows[0]["pnmi"]]
    assert teacher.intervals["PNMI"] == [row["intervals"]["pnmi"] for row in rows[1::-1]]
    assert kmeans.metrics["phone purity"] == [1.0] and "boundary recall" not in kmeans.metrics


@pytest.mark.parametrize(
    "words", [["--kmeans_layers", "1"], ["--mfccs", "tuned"], ["--kmeans_data", "d"]], ids=" ".join
)
def test_the_script_requires_both_options_of_kmeans(words):
    message = r"^evaluate_units\.py: --kmeans_data belongs to --kmeans_layers and --mfccs"
    with pytest.raises(SystemExit, match=message):
        load_command("evaluate_units").main(["m", "--data", "d", "--output_dir", "o", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_clusters", "5"], r"num_clusters=5 is set, but there is no k-means\. .* or give --kmeans_data"),
        (["--smooth"], r"smooth=True is set, but no layer is clustered\. .* or give --kmeans_layers"),
        (["--smooth", "--kmeans_data", "d", "--mfccs", "tuned"], "smooth=True is set, but no layer is clustered"),
    ],
)
def test_the_script_refuses_options_of_kmeans_without_it(words, message):
    with pytest.raises(SystemExit, match=rf"^evaluate_units\.py: {message}"):
        load_command("evaluate_units").main(["m", "--data", "d", "--output_dir", "o", *words])


LATER_PROBLEMS = [
    ("evaluate_units", ["no/such/model"], [], "no/such/model is neither a folder nor a model on the Hub"),
    ("evaluate_units", [], ["--kmeans_data", "d", "--kmeans_layers", "9"], r"layer=9 does not exist\."),
    ("evaluate_units", [], ["--layers", "1"], r"layer=1 has no codebook\."),
    ("evaluate_units", [], ["--step_seconds", "0.2"], r"0\.wav: "),
    (
        "evaluate_units",
        [],
        ["--kmeans_data", "SPEECH", "--kmeans_layers", "1", "--num_clusters", "9999"],
        "num_clusters=9999, but must be",
    ),
    (
        "evaluate_units",
        [],
        ["--kmeans_data", "SPEECH", "--mfccs", "tuned", "--num_clusters", "999"],
        "num_clusters=999, but must be",
    ),
    ("evaluate_units", ["BARE"], ["--kmeans_data", "SPEECH", "--kmeans_layers", "1"], r"\S+bare cannot be opened"),
    ("evaluate_layers", ["BARE"], [], r"\S+bare cannot be opened"),
    ("evaluate_layers", [], ["--num_clusters", "999"], "num_clusters=999, but must be"),
    ("evaluate_layers", ["no/such/model"], [], "no/such/model is neither a folder nor a model on the Hub"),
    ("evaluate_layers", [], ["--layers", "9"], r"layer=9 does not exist\."),
    ("evaluate_layers", [], ["--step_seconds", "0.2"], r"\d.wav: "),
]


@pytest.mark.parametrize(("script", "models", "flags", "message"), LATER_PROBLEMS)
def test_what_would_stop_it_later_stops_it_before_the_first_recording(
    corpus, trained, tmp_path, monkeypatch, script, models, flags, message
):
    def run(*args, **kwargs):
        raise AssertionError("a recording was read")

    monkeypatch.setattr(WindowedInference, "run", run)
    save_baseline(tmp_path / "bare", "hubert")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    words = [*words_for(corpus, trained, *models), "--output_dir", str(tmp_path), *flags]
    places = {"SPEECH": str(corpus / "speech"), "BARE": str(tmp_path / "bare")}
    words = [places.get(word, word) for word in words]
    if script == "evaluate_layers":
        words = [word for word in words if word not in ("--num_samples", "0")]
    with pytest.raises(SystemExit, match=rf"^{script}\.py: (\S+: )?{message}"):
        load_command(script).main(words)


def test_recordings_without_labels_are_not_evaluated(corpus, tmp_path):
    lines = (corpus / "phones.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "phones.jsonl").write_text("".join(lines[1:3]))
    words = ["model", "--data", str(corpus / "speech"), "--labels", str(tmp_path / "phones.jsonl")]
    options = load_command("evaluate_units").parse([*words, "--output_dir", str(tmp_path)])
    source, reference = open_labelled_speech(options.data, options)
    assert source.ids == ["1.wav", "2.wav"] and len(reference.speakers) == 6


def test_of_much_speech_mfccs_are_clustered_on_a_share_of_the_frames(corpus, monkeypatch):
    recordings = open_recordings([str(corpus / "speech")])
    sizes = []
    monkeypatch.setattr(mfcc_units, "fit_kmeans", lambda rows, *args: sizes.append(len(rows)))
    mfcc_units.fit_mfcc_kmeans(recordings, 3, "tuned")
    monkeypatch.setattr(mfcc_units, "MAX_FRAMES_IN_MEMORY", 40)
    mfcc_units.fit_mfcc_kmeans(recordings, 3, "tuned")
    assert sizes[0] == 87 and 25 < sizes[1] < 55


def test_recordings_without_labels_are_counted_and_said(tmp_path, caplog):
    for name in "abc":
        write(tmp_path / f"{name}.wav", 900)
    (tmp_path / "phones.jsonl").write_text('{"name": "b", "phones": ["t"]}\n')
    _, ours = open_reference(tmp_path, labels=tmp_path / "phones.jsonl")
    assert list(ours.labels) == ["b.wav"]
    assert "2 of 3 recordings have no labels, for example a.wav." in caplog.text


def test_speakers_that_are_missing_or_no_text(tmp_path, caplog):
    write(tmp_path / "a.wav", 900)
    (tmp_path / "phones.jsonl").write_text('{"name": "a", "phones": ["t"]}\n')
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.wav", "speaker_id": null}\n')
    open_reference(tmp_path, labels=tmp_path / "phones.jsonl")
    assert "1 of 1 recordings have no speaker, and each of them counts as" in caplog.text
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.wav", "speaker_id": ["s"]}\n')
    with pytest.raises(ValueError, match=r"The speakers: .*metadata\.jsonl, line 1, speaker_id: a label must be text"):
        open_reference(tmp_path, labels=tmp_path / "phones.jsonl")
