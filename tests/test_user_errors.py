"""Errors that users make, through each script: one line with the name that they typed, and no traceback."""

import json
import re
import shutil
import sys
import warnings

import pytest
from safetensors.torch import load_file, save_file

from audio_files import write
from disk import POINTER
from pretraining_runs import write_config
from recognisers import MODEL_SCRIPTS, save_models
from scripts import load_command


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Make a folder with models, and with a short recording in `data`."""
    folder = tmp_path_factory.mktemp("work")
    save_models(folder)
    write(folder / "data" / "a.wav", 8_000)
    return folder


def last_words(monkeypatch, script, *argv):
    """Run a script, which must end with a message; return it without the script's name."""
    module, words = load_command(script), [str(word) for word in argv]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SystemExit) as error:
            module.main(words)
    message = str(error.value.code)
    assert message.startswith(f"{script}.py: ") and "\n" not in message
    return message.removeprefix(f"{script}.py: ")


def damaged(work, tmp_path, kind, name, damage):
    """Copy a model and damage one of its files."""
    folder = tmp_path / kind
    shutil.copytree(work / kind, folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(damage(content))
    return folder


def with_sizes(**sizes):
    return lambda content: json.dumps(json.loads(content) | sizes).encode()


def run_on_model(monkeypatch, work, script, folder, out):
    words = [word.format(data=work / "data", out=out) for word in MODEL_SCRIPTS[script][1].split()]
    return last_words(monkeypatch, script, folder, *words)


@pytest.mark.parametrize("script", MODEL_SCRIPTS)
@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", lambda _: POINTER.encode(), "model.safetensors is a Git LFS pointer of 66 bytes"),
        (
            "model.safetensors",
            lambda content: content[:-100],
            r"model.safetensors is damaged: .* \([\d,]+ bytes\)\. Download it again",
        ),
        ("model.safetensors", lambda _: b"", r"model.safetensors is empty \(0 bytes\)"),
        ("config.json", lambda _: POINTER.encode(), "config.json is (a Git LFS pointer|not valid JSON|not a config)"),
        ("config.json", lambda content: content[:90], "config.json(: | is not).* JSON"),
        ("config.json", with_sizes(num_hidden_layers=10**7), "num_hidden_layers=10000000 .* at most 1000"),
        ("config.json", with_sizes(num_hidden_layers=100), "config.json describes an encoder of .* weights, but"),
        ("config.json", with_sizes(num_hidden_layers=4), "(config.json describes|lacks 32 weights of a DinoSRForPre)"),
    ],
    ids=[
        "pointer",
        "cut",
        "empty",
        "configuration pointer",
        "cut configuration",
        "10^7 layers",
        "100",
        "one layer more",
    ],
)
def test_a_damaged_model_is_one_line(work, tmp_path, monkeypatch, script, name, damage, message):
    folder = damaged(work, tmp_path, MODEL_SCRIPTS[script][0], name, damage)
    found = run_on_model(monkeypatch, work, script, folder, tmp_path / "out")
    assert re.search(message, found), found
    assert str(folder) in found


@pytest.mark.parametrize("script", ["transcribe", "tune_decoding", "export_onnx"])
@pytest.mark.parametrize("name", ["vocab.json", "tokenizer_config.json", "processor_config.json"])
def test_a_damaged_processor_is_one_line(work, tmp_path, monkeypatch, script, name):
    folder = damaged(work, tmp_path, "recogniser", name, lambda _: POINTER.encode())
    assert run_on_model(monkeypatch, work, script, folder, tmp_path / "out").startswith(
        f"{folder / name} is a Git LFS pointer of 66 bytes, not the file itself."
    )


@pytest.mark.parametrize("script", ["extract_units", "transcribe"])
def test_a_missing_shard_is_named(work, tmp_path, monkeypatch, script):
    folder = tmp_path / "model"
    shutil.copytree(work / MODEL_SCRIPTS[script][0], folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {key: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, key in enumerate(sorted(weights))}
    for file in set(places.values()):
        part = {key: tensor for key, tensor in weights.items() if places[key] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "model-00002-of-00002.safetensors").unlink()
    found = run_on_model(monkeypatch, work, script, folder, tmp_path / "out")
    assert found == (
        f"{folder} lacks model-00002-of-00002.safetensors, one of 2 files that model.safetensors.index.json names."
        " Download it."
    )


def finetune(monkeypatch, work, tmp_path, *flags):
    (tmp_path / "nothing.yaml").write_text("")
    rows = ["file_name,transcription", *(f"{number}.wav,a b" for number in range(3))]
    for number in range(3):
        write(tmp_path / "corpus" / f"{number}.wav", 1_500)
    (tmp_path / "corpus" / "metadata.csv").write_text("\n".join(rows))
    fixed = ["--train_data", tmp_path / "corpus", "--eval_strategy", "no", "--use_cpu", "true", "--max_steps", "1"]
    fixed = [tmp_path / "nothing.yaml", *fixed, "--output_dir", tmp_path / "out"]
    return last_words(monkeypatch, "finetune_ctc", *fixed, *flags)


def test_fine_tuning_names_the_damaged_model(work, tmp_path, monkeypatch):
    folder = damaged(work, tmp_path, "pretrained", "model.safetensors", lambda _: POINTER.encode())
    message = f"model={folder}/model.safetensors is a Git LFS pointer of 66 bytes"
    assert finetune(monkeypatch, work, tmp_path, "--model", folder).startswith(message)


def test_fine_tuning_refuses_a_network_that_would_be_random(work, tmp_path, monkeypatch):
    folder = damaged(work, tmp_path, "pretrained", "config.json", with_sizes(num_hidden_layers=4))
    message = f"model={folder} lacks 16 weights of a DinoSRForCTC, or has them in another shape, such as dinosr.enc"
    assert finetune(monkeypatch, work, tmp_path, "--model", folder).startswith(message)


def test_fine_tuning_says_why_nothing_is_left(work, tmp_path, monkeypatch):
    found = finetune(monkeypatch, work, tmp_path, "--model", work / "pretrained", "--min_seconds", 0.2)
    assert found.endswith(
        "none of 3 utterances can be trained on: 3 too short (e.g. 0.wav). Check min_seconds=0.2, max_seconds=40 and"
        " the labels."
    )


def pretrain(monkeypatch, tmp_path, *flags, **changes):
    path = write_config(tmp_path, output_dir=str(tmp_path / "out"), **{"mixed_precision": "no", **changes})
    return last_words(monkeypatch, "pretrain", path, *flags)


def test_pre_training_names_min_seconds_where_all_is_shorter(work, tmp_path, monkeypatch):
    for number in range(3):
        write(tmp_path / "short" / f"{number}.wav", 800)
    write(tmp_path / "long" / "a.wav", 16_000)
    short, long = tmp_path / "short", tmp_path / "long"
    assert pretrain(monkeypatch, tmp_path, "--data", short) == (
        "No recording is at least min_seconds=0.3 long (the longest has 0.05 s). Lower --min_seconds."
    )
    assert pretrain(monkeypatch, tmp_path, "--data", long, short) == (
        f"No recording of {short} is at least min_seconds=0.3 long (the longest has 0.05 s). Lower --min_seconds."
    )
    found = pretrain(monkeypatch, tmp_path, "--data", long, "--eval_data", short)
    assert found.startswith(f"eval_data={short}: None of 3 held-out recordings is at least 0.0")
    assert "mask_length=4 needs; the longest has 0.05 s" in found and "samples" not in found


def test_a_stream_of_short_recordings_ends(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # it sleeps 5 s at the end of a stream
    rows = [{"array": [0.0, 0.1] * 400, "sampling_rate": 16_000}] * 3
    datasets.Dataset.from_dict({"audio": rows}).to_parquet(tmp_path / "short.parquet")
    found = pretrain(monkeypatch, tmp_path, "--data", tmp_path / "short.parquet", "--streaming", "true")
    assert (
        found
        == "No recording of the stream is at least min_seconds=0.3 long (the longest has 0.05 s). Lower --min_seconds."
    )


@pytest.mark.parametrize("damage", [lambda _: POINTER.encode(), lambda content: content[: len(content) // 2]])
def test_pre_training_names_the_damaged_base_model(work, tmp_path, monkeypatch, damage):
    folder = damaged(work, tmp_path, "pretrained", "model.safetensors", damage)
    path = tmp_path / "run.yaml"
    path.write_text("num_workers: 0\nmin_seconds: 0.1\nmax_seconds: 2\nstep_seconds: 4\nmicro_seconds: 4\n")
    argv = [path, "--data", work / "data", "--output_dir", tmp_path / "out", "--base_model", folder]
    assert last_words(monkeypatch, "pretrain", *argv).startswith(f"base_model={folder}/model.safetensors ")


@pytest.mark.parametrize("name", ["a.wav", "a.tar", "a.parquet", "a.csv", "a.tsv"])
@pytest.mark.parametrize("script", ["extract_units", "transcribe", "pretrain"])
def test_data_that_is_a_pointer_is_named(work, tmp_path, monkeypatch, name, script):
    file = tmp_path / name
    file.write_text(POINTER)
    if script == "pretrain":
        found = pretrain(monkeypatch, tmp_path, "--data", file)
    elif script == "transcribe":
        found = last_words(monkeypatch, script, work / "recogniser", file)
    else:
        found = last_words(monkeypatch, script, work / "pretrained", file, "--output_dir", tmp_path / "out")
    assert f"{file} is a Git LFS pointer of 66 bytes, not the file itself. Run `git lfs pull`" in found


@pytest.mark.parametrize("script", ["extract_units", "fit_kmeans", "inspect_units", "transcribe"])
def test_split_and_column_that_an_error_asks_for_can_be_given(work, tmp_path, monkeypatch, script):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"speech": [{"array": [0.0, 0.1] * 4_000, "sampling_rate": 16_000}]})
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "data")
    kind, words = MODEL_SCRIPTS[script]
    argv = [str(work / kind), *words.format(data=tmp_path / "data", out=tmp_path / "out").split()]
    argv += ["--num_clusters", "2"] if script == "fit_kmeans" else []
    assert "has the splits train, test. Choose one of them." in last_words(monkeypatch, script, *argv)
    argv += ["--split", "test"]
    message = "audio_column='audio' is not a column of the dataset, which has speech. Name the one that has the audio."
    assert last_words(monkeypatch, script, *argv) == message
    load_command(script).main([*argv, "--audio_column", "speech"])


@pytest.mark.parametrize("script", ["pretrain", "finetune_ctc"])
def test_data_of_no_value_is_named(work, tmp_path, monkeypatch, script):
    option = "data" if script == "pretrain" else "train_data"
    model = "" if script == "pretrain" else f"model: {work}/pretrained\n"
    (tmp_path / "empty.yaml").write_text(f"{option}:\n{model}")
    found = last_words(monkeypatch, script, tmp_path / "empty.yaml", "--output_dir", tmp_path / "out")
    assert found.startswith(f"{option} is empty. Give at least one folder, ")


@pytest.mark.parametrize("kind", ["eval_data", "base_model", "eval_labels"])
def test_a_dry_run_opens_what_the_run_would(work, tmp_path, monkeypatch, kind):
    write(tmp_path / "data" / "a.wav", 16_000)
    (tmp_path / "empty.csv").touch()
    flags = ["--data", tmp_path / "data", "--dry_run", "true", f"--{kind}", tmp_path / "empty.csv"]
    if kind == "eval_labels":
        flags += ["--eval_data", tmp_path / "data"]
    assert f"{tmp_path}/empty.csv " in pretrain(monkeypatch, tmp_path, *flags)


def test_a_stream_of_an_empty_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "speech.parquet").mkdir()
    found = pretrain(monkeypatch, tmp_path, "--data", tmp_path / "speech.parquet", "--streaming", "true")
    assert f"{tmp_path}/speech.parquet is not one" in found


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e308"])
@pytest.mark.parametrize(
    ("script", "option"),
    [
        ("extract_units", "window_seconds"),
        ("extract_units", "shard_seconds"),
        ("transcribe", "pause_seconds"),
        ("transcribe", "batch_seconds"),
        ("fit_kmeans", "batch_seconds"),
        ("inspect_units", "max_megabytes"),
        ("tune_decoding", "beam_threshold"),
    ],
)
def test_numbers_that_are_none_are_refused(monkeypatch, script, option, value):
    module = load_command(script)
    required = {
        "fit_kmeans": ["--output", "x"],
        "inspect_units": ["--output", "x"],
        "extract_units": ["--output_dir", "x"],
    }
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    with pytest.raises(SystemExit) as error:
        module.main(
            [
                "model",
                "data",
                *(["lm"] if script == "tune_decoding" else []),
                *required.get(script, []),
                f"--{option}={value}",
            ]
        )
    assert (
        error.value.code
        == f"{script}.py: {option}={float(value)} is out of range: it must be a finite number up to 1e+15."
    )


@pytest.mark.parametrize("name", ["step_seconds", "max_seconds", "learning_rate", "weight_decay", "eval_seconds"])
@pytest.mark.parametrize("value", ["nan", "inf", "1e308"])
def test_numbers_of_a_run_that_are_none_are_refused(tmp_path, monkeypatch, name, value):
    assert f"{name}={float(value)} is out of range" in pretrain(monkeypatch, tmp_path, f"--{name}", value)


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    [
        (
            "fit_kmeans",
            ["--output", "x", "--seed", "-1"],
            "seed=-1 is out of range: it must be at least 0 and less than",
        ),
        ("fit_kmeans", ["--output", "x", "--max_frames", "0"], "max_frames=0 is out of range: it must be at least 1"),
        ("inspect_units", ["--output", "x", "--layer", "0"], "layer=0 is out of range: it must be at least 1"),
        (
            "tune_decoding",
            ["lm", "--max_utterances", "-1"],
            "max_utterances=-1 is out of range: it must be at least 1",
        ),
        ("extract_units", ["--output_dir", "x", "--num_threads", "-1"], "num_threads=-1 is out of range"),
    ],
)
def test_counts_out_of_range_are_refused(monkeypatch, script, argv, message):
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    with pytest.raises(SystemExit, match=message):
        load_command(script).main(["model", "data", *argv])


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        ("fit_kmeans", ["none", "data", "--output", "taken.safetensors"]),
        ("inspect_units", ["none", "data", "--output", "taken.safetensors"]),
        ("tune_decoding", ["none", "data", "lm.arpa", "--output", "taken.safetensors"]),
        ("evaluate_units", ["none", "--data", "data", "--output_dir", "file"]),
        ("evaluate_layers", ["none", "--data", "data", "--output_dir", "file"]),
        ("make_manifest", ["none", "file/new.csv"]),
    ],
)
def test_a_result_that_cannot_be_written_is_refused_before_the_work(monkeypatch, tmp_path, script, argv):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.safetensors").mkdir()
    (tmp_path / "file").touch()
    found = last_words(monkeypatch, script, *argv)
    assert re.match(r"(taken|file)\S+ cannot be written to: (Is a|File ex|Not a) ?\w+\. Give another name\.", found)


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        ("transcribe", ["model", "data", "--output_dir", ""]),
        ("extract_units", ["model", "data", "--output_dir="]),
        ("fit_kmeans", ["model", "data", "--output", ""]),
        ("pretrain", ["--data", "data", "--output_dir="]),
        ("finetune_ctc", ["--train_data", "data", "--output_dir="]),
    ],
)
def test_an_output_without_a_name_is_not_this_folder(monkeypatch, tmp_path, script, argv):
    monkeypatch.chdir(tmp_path)
    assert re.match(r"output(_dir)? is empty, as a shell variable is that", last_words(monkeypatch, script, *argv))
    assert list(tmp_path.iterdir()) == []


def test_tuning_a_model_on_the_hub_needs_a_file_to_write(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = last_words(monkeypatch, "tune_decoding", "someone/model", "data", "lm.arpa")
    assert found == "someone/model is not a folder here, which could take the result. Give --output."
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["extract_units", "transcribe", "fit_kmeans", "inspect_units"])
def test_a_device_that_is_not_there_is_named(work, tmp_path, monkeypatch, script):
    words = [word.format(data=work / "data", out=tmp_path / "out") for word in MODEL_SCRIPTS[script][1].split()]
    found = last_words(monkeypatch, script, work / MODEL_SCRIPTS[script][0], *words, "--device", "gpu")
    assert found.startswith("device=gpu cannot be used: Expected one of cpu")


def test_a_dry_run_says_what_is_left_out(tmp_path, capsys):
    for number in range(4):
        write(tmp_path / "data" / f"{number}.wav", 8_000)
    write(tmp_path / "data" / "short.wav", 1_000)
    for name in ("junk.wav", "phone.m4a", "._0.wav"):
        (tmp_path / "data" / name).write_bytes(b"no audio")
    path = write_config(tmp_path, output_dir=str(tmp_path / "out"), mixed_precision="no", dry_run=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a step with all recordings
        load_command("pretrain").main([str(path), "--data", str(tmp_path / "data")])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("left out"))
    for part in (
        "1 shorter than min_seconds=0.3 (such as short.wav)",
        "1 unreadable (such as junk.wav)",
        "1 unsupported .m4a (such as phone.m4a)",
        "1 hidden (such as ._0.wav)",
    ):
        assert part in line
