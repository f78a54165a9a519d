"""The small files of a run's folder: damaged ones never lock a run out, and a full disk at the end loses nothing."""

import contextlib
import errno
import random
import shutil

import pytest

from dinosr_hf.pretraining import ArgumentError, CheckpointError, run
from dinosr_hf.training.run_record import read_record
from dinosr_hf.utils import files
from pretraining_runs import ANCHORED, assert_same_run, metrics_of, tiny_arguments

OPTIONS = {**ANCHORED, "max_steps": 3, "log_steps": 1, "checkpoint_steps": 2}


def arguments_of(tmp_path, recordings, **changes):
    return tiny_arguments(tmp_path, recordings, **OPTIONS, eval_data=str(recordings), eval_seconds=3, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, recordings):
    folder = tmp_path_factory.mktemp("finished")
    run(arguments_of(folder, recordings))
    return folder / "out"


def assert_finished_as(out, expected, *, is_marked=True):
    assert_same_run(out, expected)
    assert read_record(out).evaluation == read_record(expected).evaluation
    if is_marked:
        assert (out / "finished.json").read_bytes() == (expected / "finished.json").read_bytes()
    assert list(out.glob(".unfinished-*")) == []


DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "not UTF-8": lambda content: b"\xff\xfe" + content,
    "a list": lambda content: b"[1, 2]",
    "nested": lambda content: b"[" * 100_000,
    "a bit": lambda content: bytes([content[0] ^ 2]) + content[1:],
}
TENSORS = ("empty", "cut", "a bit")  # the other damages leave nothing that is a file of tensors
GROUPS = [
    *((("run.json", "finished.json", "arguments.yaml"), damage) for damage in DAMAGES),
    *(((name,), damage) for name in ("anchor.safetensors", "model.safetensors") for damage in TENSORS),
]


@pytest.mark.parametrize(("names", "damage"), GROUPS, ids=[f"{names[0]}-{damage}" for names, damage in GROUPS])
def test_damaged_files_count_as_missing(tmp_path, recordings, finished, caplog, names, damage):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for name in names:
        (out / name).write_bytes(DAMAGES[damage]((out / name).read_bytes()))
    if names[0] == "anchor.safetensors":  # a finished run needs no anchor
        (out / "finished.json").unlink()
    run(arguments_of(tmp_path, recordings))
    expected = {"run.json": "finished.json is damaged and counts as missing", "anchor.safetensors": "was made again"}
    assert expected.get(names[0], "It is written again from checkpoint-3") in caplog.text
    assert_finished_as(out, finished)


def test_flipped_bits_never_lock_a_run_out(tmp_path, recordings, finished):
    chance, out = random.Random(0), tmp_path / "out"
    for _ in range(4):
        shutil.copytree(finished, out)
        for name in ("run.json", "finished.json", "arguments.yaml", "metrics.jsonl", "anchor.safetensors"):
            content = bytearray((out / name).read_bytes())
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            (out / name).write_bytes(content)
        run(arguments_of(tmp_path, recordings))
        assert read_record(out).steps == 3
        shutil.rmtree(out)


def test_damaged_lines_of_metrics_are_dropped(tmp_path, recordings, finished):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "finished.json").unlink()
    with open(out / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\n[1]\n{"step": "2"}\n{"a": 1}\n' + b"[" * 100_000 + b'\n{"step": 1, "lo')
    run(arguments_of(tmp_path, recordings))
    assert_finished_as(out, finished)


def test_a_run_without_checkpoints_is_known_to_be_finished_by_its_record(tmp_path, recordings, caplog):
    arguments = tiny_arguments(tmp_path, recordings, max_steps=2, checkpoint_steps=0)
    run(arguments)
    (tmp_path / "out" / "finished.json").write_bytes(b"")
    with caplog.at_level("INFO", "dinosr_hf"):
        run(arguments)
    assert "This run is finished" in caplog.text
    (tmp_path / "out" / "run.json").write_bytes(b"")  # now nothing says whose model this is
    with pytest.raises(ArgumentError, match="has a model already"):
        run(arguments)


@pytest.mark.parametrize("checkpoint_steps", [2, 0], ids=["checkpoints", "no checkpoints"])
def test_a_disk_that_is_full_at_any_write_at_the_end_loses_nothing(
    tmp_path, recordings, monkeypatch, finished, checkpoint_steps
):
    arguments = arguments_of(tmp_path, recordings)
    arguments.run.checkpoint_steps = checkpoint_steps
    out, plain = tmp_path / "out", files.flush_to_disk
    is_full, failed = [], set()

    def flush(path):
        """Let the first flush of each file or folder after the last step fail, one in a run."""
        name = path.relative_to(out).parts[:1]
        is_at_the_end = (out / "metrics.jsonl").exists() and 3 in [line["step"] for line in metrics_of(out)]
        if checkpoint_steps:  # a thread writes this one, and may still be at it after the last step
            is_at_the_end = is_at_the_end and (out / "checkpoint-2").exists()
        if is_full and is_at_the_end and name not in failed:
            failed.add(name)
            is_full.clear()
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        plain(path)

    monkeypatch.setattr(files, "flush_to_disk", flush)
    while True:
        is_full.append(True)
        with contextlib.suppress(CheckpointError):
            run(arguments)
        if is_full:  # each of them has failed once
            break
        run(arguments)
        assert_finished_as(out, finished, is_marked=checkpoint_steps > 0)  # else by run.json, if that is whole
        shutil.rmtree(out)
    # The model, run.json, finished.json and the folder itself; and the checkpoint.
    assert len(failed) == (5 if checkpoint_steps else 4)
