"""A corpus of units on disk: the script, shards, several processes, errors."""

import json
import os
import re
from collections import Counter

import numpy as np
import pytest
import torch

import forks
from audio_files import noise, sf
from dinosr_hf import DinoSRConfig, DinoSRForPreTraining
from dinosr_hf.analysis.segmentation import find_runs
from dinosr_hf.data import open_recordings
from dinosr_hf.units import LayerKMeans, UnitCorpus, UnitExtractor, load_units
from dinosr_hf.units.corpus import shards_of, share_of
from dinosr_hf.utils import files
from dinosr_hf.utils.model_folder import save_folder
from scripts import ROOT, load_command
from tiny import randomize, tiny_config, vary_anchor

SCRIPT = ROOT / "examples" / "extract_units.py"
NUM_RECORDINGS = 23


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    torch.manual_seed(0)
    model = randomize(DinoSRForPreTraining(tiny_config(num_hidden_layers=3))).eval()
    return save_folder(model, tmp_path_factory.mktemp("model") / "pretrained")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("recordings")
    for number in range(NUM_RECORDINGS):
        sf.write(path / f"{number:02}.wav", noise(800 + 37 * number, number), 16_000)
    return path


@pytest.fixture(scope="module")
def script():
    return load_command("extract_units")


# Features have no shards, so those of `command` are taken back.
FEATURES = ("--features", "npy", "--shard_seconds", "3600")


@pytest.fixture
def command(model_folder, folder, tmp_path):
    """Arguments for layer 2, with a shard for about every second recording."""
    out = str(tmp_path / "units")
    flags = ["--output_dir", out, "--layers", "2", "--shard_seconds", "0.1", "--device", "cpu"]
    return [str(model_folder), str(folder), *flags, "--batch_seconds", "0.1", "--num_threads", "1"]


def rows_of(out):
    """id -> row; every line is complete, and no id is duplicated."""
    found = [json.loads(line) for shard in shards_of(out) for line in shard.read_text().splitlines()]
    counts = Counter(row["id"] for row in found)
    assert not counts or max(counts.values()) == 1
    return {row["id"]: row for row in found}


def expected_rows(model_folder, folder, layers=(2,), source="student"):
    model = DinoSRForPreTraining.from_pretrained(model_folder)
    found = UnitExtractor(model, layers=layers, source=source).units(open_recordings([folder]))
    return {units.id: units.codes.tolist() for units in found}


@pytest.mark.parametrize(
    ("codes", "units", "durations"),
    [([3, 3, 1, 3], [3, 1, 3], [2, 1, 1]), ([0], [0], [1]), ([], [], []), ([5, 5], [5], [2])],
    ids=str,
)
def test_runs_of_a_unit_are_merged(codes, units, durations):
    codes = np.array(codes, dtype=np.int64)
    starts, lasting = find_runs(codes)
    assert codes[starts].tolist() == units and lasting.tolist() == durations
    np.testing.assert_array_equal(np.repeat(codes[starts], lasting), codes)


@pytest.mark.parametrize("num_processes", [1, 2, 3, 5, 30])
def test_each_recording_belongs_to_one_process(folder, num_processes):
    recordings = open_recordings([folder])
    shares = [share_of(recordings, process, num_processes) for process in range(num_processes)]
    assert sorted(index for share in shares for index in share) == list(range(NUM_RECORDINGS))
    seconds = [sum(recordings.utterances[index].num_samples for index in share) for share in shares]
    longest = max(utterance.num_samples for utterance in recordings.utterances)
    assert max(seconds) - min(seconds) <= longest


def test_the_script_writes_units(script, command, model_folder, folder, tmp_path, capsys):
    script.main(command)
    out = tmp_path / "units"
    expected = expected_rows(model_folder, folder)
    assert {name: [row["units"]] for name, row in rows_of(out).items()} == expected
    summary = json.loads((out / "summary.json").read_text())
    assert summary["num_recordings"] == NUM_RECORDINGS and summary["num_units"] == 7 and summary["left_out"] == {}
    assert summary["files"] == [shard.name for shard in shards_of(out)] and len(summary["files"]) > 5
    assert re.search(r"23 recordings, 0.00 hours, .* s of audio, [\d,.]+ times real time", capsys.readouterr().out)
    before = {path: path.stat().st_mtime_ns for path in shards_of(out)}
    script.main(command)  # nothing to do
    assert {path: path.stat().st_mtime_ns for path in shards_of(out)} == before


def test_the_script_writes_units_of_the_anchor(script, folder, tmp_path):
    torch.manual_seed(0)
    model = vary_anchor(randomize(DinoSRForPreTraining(tiny_config(num_hidden_layers=3, num_anchor_labels=6))))
    model_folder = save_folder(model.eval(), tmp_path / "anchored")
    words = [str(model_folder), str(folder), "--output_dir", str(tmp_path / "units"), "--device", "cpu"]
    script.main([*words, "--source", "anchor", "--num_threads", "1"])
    rows = rows_of(tmp_path / "units")
    assert {name: [row["units"]] for name, row in rows.items()} == expected_rows(model_folder, folder, (3,), "anchor")
    assert len({unit for row in rows.values() for unit in row["units"]}) > 3
    assert json.loads((tmp_path / "units" / "summary.json").read_text())["num_units"] == 6


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_units_load_as_a_dataset(script, command, model_folder, folder, tmp_path, form):
    script.main([*command, "--format", form, "--deduplicate", "--source", "teacher"])
    dataset = load_units(tmp_path / "units")
    assert set(dataset.column_names) == {"id", "units", "durations"} and len(dataset) == NUM_RECORDINGS
    expected = expected_rows(model_folder, folder, source="teacher")
    for row in dataset:
        assert np.repeat(row["units"], row["durations"]).tolist() == expected[row["id"]][0]
    assert any(max(row["durations"]) > 1 for row in dataset)


def test_several_layers_are_columns(script, command, model_folder, folder, tmp_path):
    script.main([*command, "--layers", "3", "2", "--deduplicate"])
    expected = expected_rows(model_folder, folder, (3, 2))
    for name, row in rows_of(tmp_path / "units").items():
        assert list(row) == ["id", "units_3", "durations_3", "units_2", "durations_2"]
        for layer, codes in zip((3, 2), expected[name], strict=True):
            assert np.repeat(row[f"units_{layer}"], row[f"durations_{layer}"]).tolist() == codes


def test_half_written_shards_do_not_count(script, command, model_folder, folder, tmp_path, monkeypatch):
    out, flushed = tmp_path / "units", []

    def flush(path):
        flushed.append(path)
        if len(flushed) == 7:  # settings.json and each shard are flushed twice: file and folder
            raise OSError("the disk is full")
        original(path)

    original = files.flush_to_disk
    monkeypatch.setattr(files, "flush_to_disk", flush)
    with pytest.raises(SystemExit, match=r"extract_units\.py: the disk is full"):
        script.main(command)
    monkeypatch.undo()
    assert 0 < len(rows_of(out)) < NUM_RECORDINGS
    (out / f"{files.TEMPORARY_PREFIX}0123456789ab").write_text('{"id": "of a killed proc')
    script.main(command)
    assert {name: [row["units"]] for name, row in rows_of(out).items()} == expected_rows(model_folder, folder)
    assert not list(out.glob(".unfinished-*"))


def test_units_so_far_are_written_when_interrupted(model_folder, folder, tmp_path):
    recordings = open_recordings([folder])
    extractor = UnitExtractor(DinoSRForPreTraining.from_pretrained(model_folder), layers=[2], batch_seconds=0.1)
    seconds = []

    def interrupt(amount):
        seconds.append(amount)
        if len(seconds) == 5:
            raise KeyboardInterrupt

    with UnitCorpus(tmp_path, extractor, recordings) as units, pytest.raises(KeyboardInterrupt):
        units.write(on_progress=interrupt)
    assert len(shards_of(tmp_path)) == 1 and 0 < len(rows_of(tmp_path)) < NUM_RECORDINGS


@pytest.mark.slow
def test_two_processes_write_the_same_as_one(script, command, model_folder, folder, tmp_path):
    words = [word for word in command if word not in ("--device", "cpu")]  # ACCELERATE_USE_CPU stands for it
    done = forks.run_in_processes(2, [SCRIPT, *words])
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "units"
    assert {name: [row["units"]] for name, row in rows_of(out).items()} == expected_rows(model_folder, folder)
    assert {shard.name[:9] for shard in shards_of(out)} == {"units-000", "units-001"}
    assert done.stdout.count("23 recordings") == 1


def test_processes_that_are_not_connected_are_refused(script, command, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets it; without a GPU, Accelerate takes no notice
    with pytest.raises(SystemExit, match=r"2 processes were started, but .* set ACCELERATE_USE_CPU=true\.$"):
        script.main([word for word in command if word not in ("--device", "cpu")])
    assert not (tmp_path / "units").exists()


def test_process_uses_its_share_of_the_cores(script, command, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script.main(command)
    assert torch.get_num_threads() == 1
    script.main([*command, "--num_threads", "0"])
    assert torch.get_num_threads() == len(os.sched_getaffinity(0))


def test_split_of_a_folder(script, command, folder, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train", "test"):
        (tmp_path / "data" / name).symlink_to(folder, target_is_directory=True)
    script.main([command[0], str(tmp_path / "data"), *command[2:], "--split", "test"])
    assert len(rows_of(tmp_path / "units")) == NUM_RECORDINGS


def test_resume_with_another_number_of_processes(model_folder, folder, tmp_path):
    recordings = open_recordings([folder])
    extractor = UnitExtractor(DinoSRForPreTraining.from_pretrained(model_folder), layers=[2])
    main = UnitCorpus(tmp_path, extractor, recordings, num_processes=3)
    with main, UnitCorpus(tmp_path, extractor, recordings, process=1, num_processes=3) as units:
        assert units.write() == len(rows_of(tmp_path)) == 8
    for process in range(2):
        with UnitCorpus(tmp_path, extractor, recordings, process=process, num_processes=2) as units:
            units.write()
    assert len(rows_of(tmp_path)) == NUM_RECORDINGS


def test_unreadable_recordings_are_listed(script, model_folder, tmp_path, capsys, monkeypatch):
    for name in ("good", "bad", "worse"):
        sf.write(tmp_path / f"{name}.wav", noise(900), 16_000)
    (tmp_path / "worse.wav").write_bytes(b"no audio")

    def open_then_damage(*arguments, **options):
        source = open_recordings(*arguments, **options)
        (tmp_path / "bad.wav").write_bytes(b"gone")
        return source

    monkeypatch.setattr("dinosr_hf.commands._shared.open_recordings", open_then_damage)
    words = [str(model_folder), str(tmp_path), "--layers", "2", "--device", "cpu", "--output_dir"]
    script.main([*words, str(tmp_path / "units")])
    summary = json.loads((tmp_path / "units" / "summary.json").read_text())
    assert summary["left_out"]["worse.wav"] == "unreadable" and "cannot be read" in summary["left_out"]["bad.wav"]
    assert "2 recordings could not be read" in capsys.readouterr().err
    sf.write(tmp_path / "bad.wav", noise(900), 16_000)
    monkeypatch.undo()
    script.main([*words, str(tmp_path / "units")])  # it is readable again
    assert set(rows_of(tmp_path / "units")) == {"good.wav", "bad.wav"}
    assert list(json.loads((tmp_path / "units" / "summary.json").read_text())["left_out"]) == ["worse.wav"]


@pytest.mark.parametrize("features", [(), FEATURES], ids=["units", "features"])
def test_audio_that_cannot_be_read_is_listed_by_kind(script, model_folder, tmp_path, capsys, features):
    folder, out = tmp_path / "corpus [v2]", tmp_path / "units [v2]"
    folder.mkdir()
    sf.write(folder / "good.aiff", noise(900), 16_000)
    (folder / "talk.m4a").write_bytes(b"\0\0\0\x20ftypM4A ")
    (folder / "._good.aiff").write_bytes(b"hidden")
    words = [str(model_folder), str(folder), "--layers", "2", "--device", "cpu", "--output_dir", str(out)]
    script.main([*words, *features])
    assert "extract_units.py: 1 recordings could not be read" in capsys.readouterr().err
    assert json.loads((out / "left_out-000.json").read_text()) == {"talk.m4a": "unsupported .m4a"}
    if not features:
        assert json.loads((out / "summary.json").read_text())["left_out"] == {"talk.m4a": "unsupported .m4a"}
        assert load_units(out)["id"] == ["good.aiff"]


def test_layers_by_default(script, command, capsys):
    base, small = DinoSRConfig(), DinoSRConfig(num_hidden_layers=4, num_codebooks=2)
    assert (base.default_layer("student"), base.default_layer("anchor")) == (5, 12)
    assert small.default_layer("teacher") == 4
    layers = command.index("--layers")
    script.main([*command[:layers], *command[layers + 2 :], "--dry_run"])  # of a model with three layers
    assert "of layers [3] of the student" in capsys.readouterr().out


def test_the_script_writes_features(script, command, tmp_path, capsys):
    script.main([*command, *FEATURES, "--layers", "1", "3"])
    said = f"{NUM_RECORDINGS} recordings, with 2 file(s) each, are in {tmp_path / 'units'}"
    assert said in capsys.readouterr().out
    script.main([*command, *FEATURES, "--layers", "1", "3"])  # where nothing is to do
    assert said in capsys.readouterr().out
    files = sorted(path.relative_to(tmp_path / "units").as_posix() for path in (tmp_path / "units").rglob("*.npy"))
    assert len(files) == 2 * NUM_RECORDINGS and files[0] == "layer-1/00.npy"


@pytest.mark.parametrize(
    ("source", "is_smoothed"), [("teacher", False), ("student", True), ("student_feed_forward", False)]
)
def test_scripts_fit_and_use_kmeans(script, command, model_folder, folder, tmp_path, capsys, source, is_smoothed):
    file = str(tmp_path / "kmeans.safetensors")
    fit = load_command("fit_kmeans")
    words = [str(model_folder), str(folder), "--output", file, "--num_clusters", "11", "--device", "cpu"]
    fit.main([*words, "--layer", "1", "--source", source, *(["--smooth"] if is_smoothed else [])])
    assert capsys.readouterr().out.strip() == file
    command += ["--layers", "1", "--kmeans", file]
    script.main(command)
    found = rows_of(tmp_path / "units")
    model, options = DinoSRForPreTraining.from_pretrained(model_folder), {"is_smoothed": is_smoothed}
    extractor = UnitExtractor(model, layers=[1], source=source, **options)
    expected = extractor.units(open_recordings([folder]), kmeans=LayerKMeans.load(file))
    assert {name: row["units"] for name, row in found.items()} == {u.id: u.codes[0].tolist() for u in expected}
    assert json.loads((tmp_path / "units" / "summary.json").read_text())["num_units"] == 11
    layer_and_source = rf"{file} is of layer 1 of the {source}\. Leave"
    with pytest.raises(SystemExit, match=rf"layers=\[2\] is set, but {layer_and_source} layers out"):
        script.main([*command, "--layers", "2"])
    with pytest.raises(SystemExit, match=rf"source=anchor is set, but {layer_and_source} source out"):
        script.main([*command, "--source", "anchor"])
    with pytest.raises(SystemExit, match=r"^fit_kmeans.py: --output must end in \.safetensors\.$"):
        fit.main(["nowhere", "nothing.wav", "--output", "k.bin"])
    fit.main([*words, "--source", source])  # without a layer: the last of three
    assert LayerKMeans.load(file).layer == 3
    with pytest.raises(SystemExit, match=r"fit_kmeans.py: num_clusters=9999"):
        fit.main([*words, "--num_clusters", "9999", "--layer", "1"])
    with pytest.raises(SystemExit, match=r"fit_kmeans.py: --smooth is for the student: the teacher's features"):
        fit.main([*words, "--layer", "1", "--source", "teacher", "--smooth"])


def test_invalid_arguments_raise(script, command, model_folder, folder, tmp_path):
    extractor = UnitExtractor(DinoSRForPreTraining.from_pretrained(model_folder), layers=[2])
    recordings = open_recordings([folder])
    with pytest.raises(ValueError, match=r"form='csv' is unknown. Choose one of jsonl, parquet"):
        UnitCorpus(tmp_path, extractor, recordings, form="csv")
    with pytest.raises(ValueError, match="shard_seconds=0 must be more than 0"):
        UnitCorpus(tmp_path, extractor, recordings, shard_seconds=0)
    with pytest.raises(ValueError, match="process=2 must be at least 0 and below num_processes=2"):
        UnitCorpus(tmp_path, extractor, recordings, process=2, num_processes=2)
    with pytest.raises(ValueError, match="has no units"):
        load_units(tmp_path)
    with pytest.raises(SystemExit, match="split='train' needs a single input, but there are 2"):
        script.main([command[0], command[1], *command[1:], "--split", "train"])
    for words, given in (
        (["--deduplicate"], "deduplicate=True"),
        (["--format", "parquet"], "format=parquet"),
        (["--shard_seconds", "9"], "shard_seconds=9.0"),
    ):
        with pytest.raises(SystemExit, match=f"{given} is set, but --features writes no units. Leave"):
            script.main([*command, *FEATURES, *words])
    with pytest.raises(SystemExit, match=r"extract_units.py: layer=1 has no codebook"):
        script.main([*command, "--layers", "1"])
    with pytest.raises(SystemExit, match="source=student_feed_forward has features and no units of its own"):
        script.main([*command, "--source", "student_feed_forward"])


def test_a_wrong_layer_does_not_claim_the_folder(script, command, tmp_path):
    words = [*command, "--output_dir", str(tmp_path / "units")]
    with pytest.raises(SystemExit, match="layer=1 has no codebook"):
        script.main([*words, "--layers", "1"])
    script.main([*words, "--layers", "2"])


def test_ids_that_repeat_are_all_written(script, command, folder, tmp_path):
    """Ids `a, a, a#2, b`: four rows, once, also in a folder that is continued, and four files of features."""
    table = tmp_path / "t.csv"
    rows = [f"{folder}/{number:02}.wav,{name}" for number, name in enumerate(["a", "a", "a#2", "b"])]
    table.write_text("\n".join(["path,id", *rows, ""]))
    words = [command[0], str(table), *command[2:]]
    script.main(words)
    out = tmp_path / "units"
    assert set(rows_of(out)) == {"a", "a#2", "a#3", "b"}
    shards_of(out)[-1].unlink()  # as if killed before it
    script.main(words)
    found = rows_of(out)
    alone = {path: row["units"] for path, row in expected_units(command, folder, tmp_path).items()}
    assert {name: found[name]["units"] for name in ("a", "a#3", "a#2", "b")} == {
        name: alone[f"{number:02}.wav"] for number, name in enumerate(["a", "a#3", "a#2", "b"])
    }
    script.main([*words, *FEATURES, "--output_dir", str(tmp_path / "features")])
    names = {path.name for path in (tmp_path / "features").rglob("*.npy")}
    assert names == {"a.npy", "a#2.npy", "a#3.npy", "b.npy"}


def expected_units(command, folder, tmp_path):
    """Return the rows of the whole folder, by file."""
    load_command("extract_units").main(
        [command[0], str(folder), *command[2:], "--output_dir", str(tmp_path / "whole")]
    )
    return rows_of(tmp_path / "whole")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_names_that_are_not_utf8_are_escaped(script, command, folder, tmp_path, form):
    speech = tmp_path / "speech"
    speech.mkdir()
    for number, name in enumerate(["caf\udce9.wav", "a\nb.wav", "plain.wav", "bad\udcff.wav"]):
        (speech / name).write_bytes((folder / f"{number:02}.wav").read_bytes() if number < 3 else b"no audio")
    words = [command[0], str(speech), *command[2:], "--format", form]
    script.main(words)
    before = {path: path.stat().st_mtime_ns for path in shards_of(tmp_path / "units")}
    ids = {r"caf\xe9.wav", r"a\nb.wav", "plain.wav"}
    assert set(load_units(tmp_path / "units")["id"]) == ids and len(load_units(tmp_path / "units")) == 3
    script.main(words)  # nothing to do
    assert {path: path.stat().st_mtime_ns for path in shards_of(tmp_path / "units")} == before
    summary = json.loads((tmp_path / "units" / "summary.json").read_text("utf-8"))
    assert summary["num_recordings"] == 3 and list(summary["left_out"]) == [r"bad\xff.wav"]
    for _ in range(2):  # to a folder whose name is not UTF-8
        script.main([*words, "--output_dir", str(tmp_path / "\udce9")])
    assert set(load_units(tmp_path / "\udce9")["id"]) == ids
    script.main([*command[:1], str(speech), *command[2:], *FEATURES, "--output_dir", str(tmp_path / "f")])
    names = {path.name for path in (tmp_path / "f" / "layer-2").iterdir()}
    assert names == {r"caf\xe9.npy", r"a\nb.npy", "plain.npy"}


def test_features_of_absolute_paths_stay_in_the_folder(script, command, folder, tmp_path, caplog):
    (tmp_path / "lists").mkdir()
    table = tmp_path / "lists" / "t.jsonl"
    paths = [str(folder / "00.wav"), os.path.relpath(folder / "01.wav", table.parent)]
    table.write_text("".join(json.dumps({"audio_filepath": path}) + "\n" for path in paths))
    script.main([command[0], str(table), *command[2:], *FEATURES, "--layers", "1", "2"])
    out = tmp_path / "units"
    found = {path.relative_to(out).as_posix() for path in out.rglob("*.npy")}
    up = paths[1].removesuffix(".wav").replace("..", "_up")
    assert found == {f"layer-{layer}/{name}.npy" for layer in (1, 2) for name in (f"{folder}/00"[1:], up)}
    assert caplog.text.count("2 of 2 recordings have names that are no possible names below") == 1
