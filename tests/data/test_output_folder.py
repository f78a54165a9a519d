"""Folders of units, features and transcripts: a run continues only what it made, whatever stopped it."""

import errno
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import forks
from audio_files import noise, sf
from dinosr_hf import DinoSRForCTC, DinoSRForPreTraining
from dinosr_hf.units import LayerKMeans, load_units
from dinosr_hf.utils import files
from dinosr_hf.utils.files import TEMPORARY_PREFIX, lock_folder
from recognisers import save_models
from scripts import load_command
from tiny import randomize

LENGTHS = {"a": 1_000, "b": 2_345, "c": 3_100, "deep/d": 700}
FEATURES = ["--layers", "2", "--num_threads", "1"]
UNITS = [*FEATURES, "--shard_seconds", "0.05"]
# What a script writes, by a name -> (script, model, flags).
KINDS = {
    "jsonl": ("extract_units", "pretrained", UNITS),
    "parquet": ("extract_units", "pretrained", [*UNITS, "--format", "parquet", "--deduplicate"]),
    "npy": ("extract_units", "pretrained", [*FEATURES, "--features", "npy"]),
    "safetensors": ("extract_units", "pretrained", [*FEATURES, "--features", "safetensors", "--source", "teacher"]),
    "txt": ("transcribe", "recogniser", []),
    "json": ("transcribe", "recogniser", ["--format", "json"]),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_script = pytest.mark.parametrize("kind", ["jsonl", "npy", "txt"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def scripts():
    return {name: load_command(name) for name in ("extract_units", "transcribe")}


def write_recordings(folder: Path, seed: int = 0, **lengths: int) -> Path:
    for number, (name, length) in enumerate({**LENGTHS, **lengths}.items()):
        path = folder / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, noise(length, number + 100 * seed), 16_000)
    return folder


@pytest.fixture
def speech(tmp_path):
    return write_recordings(tmp_path / "speech")


@pytest.fixture(scope="module")
def undisturbed(scripts, models, tmp_path_factory) -> Callable[[str], Path]:
    """Return the folder with what an undisturbed run of a kind writes of the usual recordings."""
    folder = tmp_path_factory.mktemp("undisturbed")
    speech = write_recordings(folder / "speech")

    @functools.cache
    def out_of(kind: str) -> Path:
        script, model, usual = KINDS[kind]
        words = [models / model, speech, "--output_dir", folder / kind, "--device", "cpu", "--batch_seconds", "0.01"]
        scripts[script].main([*map(str, words), *usual])
        return folder / kind

    return out_of


@pytest.fixture
def run(scripts, models, speech, tmp_path) -> Callable[..., dict[str, bytes]]:
    """Run the script of a kind, and return the files that it wrote."""

    def run_script(kind: str, *flags: str, model: Path | None = None, inputs: Path = speech, out: str = "out"):
        name, folder, usual = KINDS[kind]
        words = [model or models / folder, inputs, "--output_dir", tmp_path / out, "--device", "cpu"]
        scripts[name].main([*map(str, words), "--batch_seconds", "0.01", *usual, *flags])
        return written(tmp_path / out)

    return run_script


def written(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name[0] != "." and path.name not in ("settings.json", "summary.json")
    }


def changes(kind: str, out: Path) -> dict[str, bytes]:
    """Return what is equal in two runs, whatever the shards: of units the rows, else the files."""
    if kind not in ("jsonl", "parquet"):
        return written(out)
    rows = list(load_units(out))
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: json.dumps(row) for row in rows}


def assert_refused(run, tmp_path, message: str, kind: str, *flags: str, **changed) -> None:
    before = written(tmp_path / "out")
    with pytest.raises(SystemExit, match=rf"^{KINDS[kind][0]}\.py: .*{message}") as refusal:
        run(kind, *flags, **changed)
    assert "\n" not in str(refusal.value)
    assert written(tmp_path / "out") == before


def other_weights(models: Path, kind: str, folder: Path) -> Path:
    """Copy a model and change one of its weights a little."""
    shutil.copytree(models / KINDS[kind][1], folder)
    model_class = DinoSRForCTC if kind in ("txt", "json") else DinoSRForPreTraining
    model = model_class.from_pretrained(folder)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 0.01
    model.save_pretrained(folder)
    return folder


@each_kind
def test_the_same_command_keeps_what_is_done_also_for_moved_models_and_recordings(run, models, speech, tmp_path, kind):
    first = run(kind)
    assert len(first) >= 4 or kind in ("jsonl", "parquet")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*") if path.name in first}
    model = shutil.copytree(models / KINDS[kind][1], tmp_path / "moved model")
    assert run(kind, model=model, inputs=shutil.move(speech, tmp_path / "moved speech")) == first
    assert {path: path.stat().st_mtime_ns for path in times} == times


@each_script
def test_another_model_is_refused_also_in_the_same_place(run, models, tmp_path, kind):
    run(kind)
    model = other_weights(models, kind, tmp_path / "model")
    assert_refused(run, tmp_path, "they have model_sha256='[0-9a-f]{16}', and it has", kind, model=model)
    model = shutil.copytree(models / KINDS[kind][1], tmp_path / "replaced")
    run(kind, model=model, out="second")
    shutil.rmtree(model)
    other_weights(models, kind, model)
    with pytest.raises(SystemExit, match="model_sha256"):
        run(kind, model=model, out="second")


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("jsonl", ["--layers", "3"], r"layers=\[2\], and it has layers=\[3\]"),
        ("jsonl", ["--source", "teacher"], "source='student', and it has source='teacher'"),
        ("jsonl", ["--format", "parquet"], "format='jsonl', and it has format='parquet'"),
        ("jsonl", ["--deduplicate"], "deduplicate=False, and it has deduplicate=True"),
        ("jsonl", ["--dtype", "bfloat16"], "dtype='float32', and it has dtype='bfloat16'"),
        ("jsonl", ["--window_seconds", "20"], r"window_seconds=30\.0, and it has window_seconds=20\.0"),
        ("jsonl", ["--context_seconds", "1"], r"context_seconds=5\.0, and it has"),
        ("jsonl", ["--features", "npy", "--shard_seconds", "3600"], "results='units', and it has results='features'"),
        ("npy", ["--source", "teacher"], "source='student', and it has source='teacher'"),
        ("npy", ["--dtype", "bfloat16"], "dtype='float32', and it has dtype='bfloat16'"),
        ("npy", ["--window_seconds", "20"], r"window_seconds=30\.0, and it has window_seconds=20\.0"),
        ("txt", ["--dtype", "bfloat16"], "dtype='float32', and it has dtype='bfloat16'"),
        ("txt", ["--window_seconds", "20"], r"window_seconds=30\.0, and it has window_seconds=20\.0"),
        ("txt", ["--pause_seconds", "1"], r"pause_seconds=0\.3, and it has pause_seconds=1\.0"),
    ],
    ids=lambda value: "".join(value).replace("-", "") if isinstance(value, list) else None,
)
def test_other_settings_are_refused(run, tmp_path, kind, flags, message):
    run(kind)
    assert_refused(run, tmp_path, message, kind, *flags)


def test_other_clusters_are_refused(run, tmp_path):
    for name, seed in {"one": 0, "same": 0, "two": 1}.items():
        centroids = np.random.default_rng(seed).normal(size=(5, 36)).astype(np.float32)
        LayerKMeans(centroids, 2, "student").save(tmp_path / f"{name}.safetensors")
    run("jsonl", "--kmeans", str(tmp_path / "one.safetensors"))
    run("jsonl", "--kmeans", str(tmp_path / "same.safetensors"))
    assert_refused(run, tmp_path, "kmeans_sha256=", "jsonl", "--kmeans", str(tmp_path / "two.safetensors"))
    assert_refused(run, tmp_path, "kmeans_sha256='[0-9a-f]{16}', and it has kmeans_sha256=None", "jsonl")


def test_other_beam_search_is_refused(run, models, tmp_path):
    pytest.importorskip("flashlight")
    model = shutil.copytree(models / "recogniser", tmp_path / "model")
    (model / "words.txt").write_text("A\nB\n")
    (model / "decoding.json").write_text(json.dumps({"lexicon": "words.txt", "beam_size": 20}))
    run("txt", model=model)
    run("txt", model=shutil.copytree(model, tmp_path / "moved"))
    assert_refused(
        run, tmp_path, "search='BeamSearchDecoder', and it has search='Greedy", "txt", "--greedy", model=model
    )
    (model / "words.txt").write_text("A\nC\n")
    assert_refused(run, tmp_path, "lexicon_sha256=", "txt", model=model)
    (model / "words.txt").write_text("A\nB\n")
    (model / "decoding.json").write_text(json.dumps({"lexicon": "words.txt", "beam_size": 10}))
    assert_refused(run, tmp_path, "beam_size=20, and it has beam_size=10", "txt", model=model)


@each_kind
def test_another_corpus_with_the_same_names_is_refused(run, tmp_path, kind):
    run(kind)
    longer = write_recordings(tmp_path / "longer", b=2_346)
    assert_refused(run, tmp_path, r"b\.wav has 2,346 samples .* now, and had 2,345 before", kind, inputs=longer)
    same_lengths = write_recordings(tmp_path / "other", seed=1)
    assert_refused(run, tmp_path, r"\.wav is another recording now, of the same length", kind, inputs=same_lengths)


@each_kind
def test_recordings_may_be_added(run, speech, tmp_path, kind):
    run(kind)
    write_recordings(speech, e=1_500)
    run(kind)
    run(kind, out="whole")
    assert changes(kind, tmp_path / "out") == changes(kind, tmp_path / "whole")
    assert len(changes(kind, tmp_path / "out")) == 5


def test_units_of_recordings_that_are_gone_are_refused(run, speech, tmp_path):
    run("jsonl")
    (speech / "b.wav").write_bytes(b"no audio")
    run("jsonl")  # its units are as good as they were
    (speech / "b.wav").unlink()
    assert_refused(run, tmp_path, r"b\.wav is not among its recordings\. Give", "jsonl")


def test_names_that_begin_at_another_folder_are_explained(run, tmp_path):
    run("jsonl")
    message = (
        r"\.wav is not among its recordings, but speech/\w\.wav is: names begin at the lowest folder that contains"
    )
    assert_refused(run, tmp_path, message, "jsonl", inputs=tmp_path)


@pytest.mark.parametrize("kind", ["npy", "txt"])
def test_results_of_other_recordings_may_be_in_the_folder(run, tmp_path, kind):
    first = run(kind)
    sf.write(tmp_path / "alone.wav", noise(900), 16_000)
    second = run(kind, inputs=tmp_path / "alone.wav")
    assert len(second) == 5 and first.items() <= second.items()
    assert run(kind) == second


def test_other_formats_and_layers_may_be_in_the_folder(run, tmp_path):
    run("txt")
    run("json")
    assert len(written(tmp_path / "out")) == 8
    run("npy", out="features")
    run("npy", "--layers", "1", "2", "--features", "safetensors", out="features")
    assert len(written(tmp_path / "features")) == 12


@each_script
@pytest.mark.parametrize("damage", [None, b"", b'{"settings": {', b"[]", b"\xff\xfe", b'{"settings": 1, "a": 2}'])
def test_damaged_settings_are_never_trusted(run, undisturbed, tmp_path, kind, damage):
    run(kind)
    out = tmp_path / "out"
    state = out / (f".settings-{kind}" if kind in ("txt", "json") else "settings.json")
    state.unlink() if damage is None else state.write_bytes(damage)
    assert_refused(run, tmp_path, rf"{state.name} does not say how those of \S+\.wav were made, or is damaged", kind)
    for path in out.rglob("*.*"):  # nothing is done: the same command begins
        if path.is_file() and path != state:
            path.unlink()
    run(kind)
    assert changes(kind, out) == changes(kind, undisturbed(kind))


@pytest.mark.parametrize(
    "damage", [b"", b'{"id": "a.wav", "un', b"[1]\n", b'{"units": [1]}\n', b'{"id": []}\n', b"\xff"]
)
def test_damaged_shards_are_named(run, tmp_path, damage):
    run("jsonl")
    shard = sorted((tmp_path / "out").glob("units-*"))[0]
    before = changes("jsonl", tmp_path / "out")
    shard.write_bytes(damage)
    if damage:
        message = rf"{shard.name} is damaged\. Remove it to extract its recordings again"
        assert_refused(run, tmp_path, message, "jsonl")
        shard.unlink()
    run("jsonl")
    assert changes("jsonl", tmp_path / "out") == before


def test_cut_parquet_shards_are_named(run, tmp_path):
    run("parquet")
    shard = sorted((tmp_path / "out").glob("units-*"))[0]
    for content in (b"", shard.read_bytes()[:-9], b"PAR1" + bytes(50) + b"PAR1"):
        shard.write_bytes(content)
        assert_refused(run, tmp_path, rf"{shard.name} is damaged\. Remove it", "parquet")


@each_script
def test_a_folder_belongs_to_one_run_at_a_time(run, tmp_path, kind):
    for lock, process in {".lock": 0, ".lock-001": 1}.items():  # a process can outlive the one that started it
        with (
            lock_folder(tmp_path / "out", process),
            pytest.raises(SystemExit, match=rf"Another run is using output_dir=.*out \({lock} is locked\)\. Give"),
        ):
            run(kind)
    assert not written(tmp_path / "out")
    run(kind)


@each_script
def test_a_link_in_the_place_of_the_lock_is_not_followed(run, tmp_path, kind):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(SystemExit, match=rf"^{KINDS[kind][0]}\.py: output_dir=.*out cannot be written to: "):
        run(kind)
    assert not (tmp_path / "victim").exists()


def test_files_of_something_else_stay(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("b.txt", "notes.txt", "b.json"):
        (out / name).write_text("mine")
    assert_refused(run, tmp_path, r"\.settings-txt does not say .* b\.wav .*Give --overwrite, or another", "txt")
    run("txt", "--overwrite")
    assert (out / "b.txt").read_text() != "mine"
    assert {(out / name).read_text() for name in ("notes.txt", "b.json")} == {"mine"}


def test_overwriting_never_leaves_transcripts_of_two_models(run, models, tmp_path, monkeypatch):
    """Also when it is interrupted: what the second command keeps is its own."""
    run("txt")
    model = randomize(DinoSRForCTC.from_pretrained(models / "recogniser"), seed=5)
    shutil.copytree(models / "recogniser", tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    fail_after(monkeypatch, 7)
    with pytest.raises(SystemExit, match="No space left"):
        run("txt", "--overwrite", model=tmp_path / "other")
    monkeypatch.undo()
    assert 0 < len(written(tmp_path / "out")) < 4
    assert run("txt", model=tmp_path / "other") == run("txt", model=tmp_path / "other", out="whole")


def test_what_is_kept_is_said(run, capsys):
    run("txt")
    assert "already" not in capsys.readouterr().err
    run("txt")
    assert "4 of 4 transcripts are in" in capsys.readouterr().err


def fail_after(monkeypatch, num_flushes: int) -> None:
    """Let the disk be full after so many flushes: two for each file, of it and its folder."""
    flushed, original = [], files.flush_to_disk

    def flush(path):
        flushed.append(path)
        if len(flushed) > num_flushes:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path)

    monkeypatch.setattr(files, "flush_to_disk", flush)


@each_kind
@pytest.mark.parametrize("num_flushes", [0, 2, 5])
def test_a_full_disk_leaves_whole_files_and_the_same_command_goes_on(
    run, undisturbed, tmp_path, monkeypatch, kind, num_flushes
):
    expected = written(undisturbed(kind))
    fail_after(monkeypatch, num_flushes)
    with pytest.raises(SystemExit, match=rf"^{KINDS[kind][0]}\.py: .*No space left on device") as refusal:
        run(kind)
    monkeypatch.undo()
    assert "\n" not in str(refusal.value) and refusal.value.code != 0
    out = tmp_path / "out"
    assert not list(out.rglob(f"{TEMPORARY_PREFIX}*"))
    if kind not in ("jsonl", "parquet"):
        assert written(out).items() <= expected.items() and len(written(out)) < len(expected)
    run(kind)
    assert changes(kind, out) == changes(kind, undisturbed(kind))


# Imports take seconds and a run milliseconds: one process imports, its forks run the command and are stopped.
STOPS = """
import importlib, os, random, resource, signal, sys, time
from pathlib import Path
name, out, how = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
script = importlib.import_module(f"dinosr_hf.commands.{name}")
words, log = sys.argv[4:], os.open(out.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
chance = random.Random(0)
stops = starts = 0
is_done = False
while not is_done:
    starts += 1
    before = len(list(out.rglob("*.*")))
    child = os.fork()
    if child == 0:
        os.dup2(log, 1), os.dup2(log, 2)
        if how == "full" and starts <= 2:
            limit = 200 if starts == 1 else 7_500  # settings fit into the second, and features do not
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            script.main(words)
        except SystemExit as stop:
            print(stop, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    delay = chance.random() * 0.01
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            assert how == "full" or status == 0, status
            is_done = status == 0
            stops += not is_done
            break
        if how == "kill" and stops < 4 and len(list(out.rglob("*.*"))) > before:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            stops += os.waitpid(child, 0)[1] == signal.SIGKILL
            break
        time.sleep(0.002)
    assert starts < 60
print(stops)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "how"), [*((kind, "kill") for kind in KINDS), *((kind, "full") for kind in ("npy", "safetensors", "txt"))]
)
def test_stopped_runs_end_with_the_files_of_an_undisturbed_one(run, models, tmp_path, kind, how):
    inputs = write_recordings(tmp_path / "many", **{f"{number:02}": 800 + 37 * number for number in range(20)})
    run(kind, inputs=inputs, out="whole")
    name, model, flags = KINDS[kind]
    words = [models / model, inputs, "--output_dir", tmp_path / "out", "--device", "cpu", "--batch_seconds", "0.01"]
    done = forks.run(["-c", STOPS, name, tmp_path / "out", how, *words, *flags])
    assert done.returncode == 0, done.stderr[-3000:] + (tmp_path / "log.txt").read_text()[-3000:]
    log = (tmp_path / "log.txt").read_text()
    assert "Traceback" not in log
    assert int(done.stdout.split()[-1]) >= (3 if how == "kill" else 1)
    if how == "full":
        assert f"{name}.py: " in log
    assert changes(kind, tmp_path / "out") == changes(kind, tmp_path / "whole")
    assert not list((tmp_path / "out").rglob(f"{TEMPORARY_PREFIX}*"))


@pytest.mark.parametrize("kind", ["jsonl", "npy", "txt"])
def test_a_dry_run_says_what_is_to_do_and_writes_nothing(run, speech, tmp_path, capsys, kind):
    (speech / "junk.wav").write_bytes(b"no audio")
    num_recordings = len(LENGTHS)
    run(kind, "--dry_run")
    said = capsys.readouterr().out
    assert said.startswith(f"To do: {num_recordings} recordings, 0.") and not (tmp_path / "out").exists()
    assert "minutes of audio. Left out: 1 unreadable (such as junk.wav). Their " in said
    assert f" go to {tmp_path / 'out'}. " in said and said.endswith(" Nothing was written.\n")
    (speech / "junk.wav").unlink()
    run(kind)
    before = written(tmp_path / "out")
    write_recordings(speech, new=900)
    run(kind, "--dry_run")
    assert "To do: 1 recordings, 0.0 minutes" in (said := capsys.readouterr().out)
    assert f"({num_recordings} are there already)" in said and written(tmp_path / "out") == before


def test_a_dry_run_refuses_what_the_run_would(run, tmp_path):
    run("jsonl")
    assert_refused(run, tmp_path, "cannot continue", "jsonl", "--dry_run", "--deduplicate")
