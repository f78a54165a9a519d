"""An interrupted run resumes with the same command; a finished one is left alone; other arguments are refused."""

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file
from transformers import TrainerCallback

import forks
from dinosr_hf.finetuning import Recognition, finetune
from dinosr_hf.finetuning.resume_point import find_resume_point, read_trainer_checkpoint, write_file_list
from dinosr_hf.training.resume import CheckpointError, changed_arguments
from dinosr_hf.training.run_record import read_record
from dinosr_hf.training.signals import RunInterrupted
from dinosr_hf.utils.command_line import ArgumentError
from disk import flip_a_bit, truncate
from finetuning_runs import recognise, recognition_of, run_settings, write_corpus, write_model
from kills import run_through_kills
from scripts import ROOT

# Dropout and masks, so that random states matter. An epoch has four steps.
RANDOM = {"hidden_dropout": 0.2, "mask_time_prob": 0.3, "mask_time_length": 3}
OPTIONS = {"start": RANDOM, "max_steps": 7, "save_strategy": "steps", "save_steps": 1, "freeze_steps": 3}


class Interrupted(Exception):
    """Stands for a signal or an error that ends a run early."""


class InterruptAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def __call__(self, trainer):
        trainer.add_callback(self)

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Interrupted


class SignalIn(TrainerCallback):
    """Send a signal to this process during a step."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def __call__(self, trainer):
        trainer.add_callback(self)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


class CountSteps(TrainerCallback):
    def __init__(self):
        self.steps = []

    def __call__(self, trainer):
        trainer.add_callback(self)

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), 17)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def uninterrupted(model, corpus, tmp_path_factory):
    """Folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    recognise(model, corpus, folder, **OPTIONS)
    return folder


@pytest.fixture(scope="module")
def interrupted_once(model, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted") / "out"
    with pytest.raises(Interrupted):
        recognise(model, corpus, folder, on_trainer=InterruptAfter(4), **OPTIONS)
    return folder


@pytest.fixture
def interrupted(interrupted_once, tmp_path):
    """Folder of a run that was interrupted after its fourth checkpoint; checkpoints 3 and 4 are left."""
    return shutil.copytree(interrupted_once, tmp_path / "out")


def assert_same_model(folder, other):
    weights, expected = (load_file(path / "model.safetensors") for path in (folder, other))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


@pytest.mark.parametrize("step", [2, 4], ids=["within_an_epoch", "between_epochs"])
def test_the_same_command_resumes_exactly(model, corpus, uninterrupted, tmp_path, caplog, step):
    out, count = tmp_path / "out", CountSteps()
    with pytest.raises(Interrupted):
        recognise(model, corpus, out, on_trainer=InterruptAfter(step), **OPTIONS)
    started = json.loads((out / "run.json").read_text())
    assert (started["finished"], started["steps"], started["arguments"]["hidden_dropout"]) == (None, 0, 0.2)
    assert not (out / "config.json").exists()
    with caplog.at_level("INFO", "dinosr_hf"):
        record = recognise(model, corpus, out, on_trainer=count, **OPTIONS)
    assert f"Resuming from {out / f'checkpoint-{step}'}." in caplog.text
    assert count.steps == list(range(step + 1, 8))
    assert_same_model(out, uninterrupted)
    assert (record.started, record.steps) == (started["started"], 7)
    assert read_record(out) == record


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_a_run_with_a_checkpoint(model, corpus, uninterrupted, tmp_path, name, code):
    options = {**OPTIONS, "save_steps": 100}
    with pytest.raises(RunInterrupted, match=rf"{name}: stopped after step 2, with .*out/checkpoint-2\.") as caught:
        recognise(model, corpus, tmp_path / "out", on_trainer=SignalIn(2, getattr(signal, name)), **options)
    assert caught.value.exit_code == code
    assert read_record(uninterrupted) and not (tmp_path / "out" / "config.json").exists()
    count = CountSteps()
    recognise(model, corpus, tmp_path / "out", on_trainer=count, **options)
    assert count.steps == [3, 4, 5, 6, 7]
    assert_same_model(tmp_path / "out", uninterrupted)


def test_a_signal_asks_for_a_checkpoint(model, corpus, uninterrupted, tmp_path):
    options = {**OPTIONS, "save_steps": 100}
    recognise(model, corpus, tmp_path / "out", on_trainer=SignalIn(2, signal.SIGUSR1), **options)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-7"]
    assert_same_model(tmp_path / "out", uninterrupted)


TWO_PROCESSES = """
import sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from dinosr_hf.commands.finetune_ctc import main

config = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, start_method="fork")
elastic_launch(config, main)(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_command_answers_signals_with_a_checkpoint_and_its_exit_code(model, corpus, tmp_path, num_processes):
    out = tmp_path / "out"
    flags = {**run_settings(), "max_steps": 100_000, "dataloader_num_workers": 2, "min_seconds": 0.01}
    flags |= {"model": model, "train_data": corpus, "output_dir": out}
    words = [ROOT / "examples" / "configs" / "ctc_tiny.yaml", *(f"--{name}={value}" for name, value in flags.items())]
    program = [ROOT / "examples" / "finetune_ctc.py"] if num_processes == 1 else ["-c", TWO_PROCESSES]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    process = forks.Program([*program, *words], env=environment, new_session=True)
    while not (out / "run.json").exists():
        assert process.is_running, process.wait().stderr[-3000:]
        time.sleep(0.01)
    time.sleep(1)  # it trains, or is about to
    os.killpg(process.pid, signal.SIGTERM)  # as Slurm does: to the processes that load data as well
    done = process.wait()
    assert (done.returncode == 143) if num_processes == 1 else done.returncode, done.stderr[-3000:]
    assert "The same command resumes from there." in done.stderr, done.stderr[-3000:]
    assert [read_trainer_checkpoint(path).step > 0 for path in out.glob("checkpoint-*")] == [True]


def test_starting_over_is_not_resuming(model, corpus, uninterrupted, tmp_path):
    # The control of the test above: random states and the place in the data make a difference.
    recognise(model, corpus, tmp_path / "out", **{**OPTIONS, "seed": 1})
    with pytest.raises(AssertionError):
        assert_same_model(tmp_path / "out", uninterrupted)


@pytest.mark.parametrize("value", ["true", "path"])
def test_resume_from_checkpoint_resumes_exactly(model, corpus, uninterrupted, interrupted, value):
    asked = str(interrupted / "checkpoint-3") if value == "path" else value
    count = CountSteps()
    recognise(model, corpus, interrupted, resume_from_checkpoint=asked, on_trainer=count, **OPTIONS)
    assert count.steps[0] == (4 if value == "path" else 5)
    assert_same_model(interrupted, uninterrupted)
    assert (interrupted / "abandoned-checkpoint-4").is_dir() == (value == "path")


def test_resuming_by_path_goes_on_from_the_newest_checkpoint_after_it(model, corpus, uninterrupted, interrupted):
    """Also once the named checkpoint is pruned; and a run that finished so is finished."""
    back, counts = {**OPTIONS, "resume_from_checkpoint": str(interrupted / "checkpoint-3")}, []
    with pytest.raises(Interrupted):
        recognise(model, corpus, interrupted, on_trainer=InterruptAfter(5), **back)
    shutil.rmtree(interrupted / "checkpoint-3", ignore_errors=True)
    for expected in ([6, 7], []):
        counts.append(CountSteps())
        recognise(model, corpus, interrupted, on_trainer=counts[-1], **back)
        assert counts[-1].steps == expected
        assert_same_model(interrupted, uninterrupted)


def test_other_arguments_and_tasks_are_noticed_when_resuming_by_path(model, corpus, interrupted, caplog):
    back = {**OPTIONS, "resume_from_checkpoint": str(interrupted / "checkpoint-3")}
    folder, asked, given = str(interrupted), back["resume_from_checkpoint"], {"learning_rate": 0.5}
    with pytest.raises(ArgumentError, match=r"checkpoint-3 has a run of the task automatic-speech-recognition"):
        find_resume_point(folder, asked, "audio-classification", given)
    assert find_resume_point(folder, asked, "automatic-speech-recognition", given).checkpoint is not None
    assert "Resuming a run that had other arguments" in caplog.text
    recognise(model, corpus, interrupted, **back)
    with pytest.raises(ArgumentError, match=r"has a run with other arguments: .*learning_rate is 0\.5"):
        recognise(model, corpus, interrupted, **{**back, "learning_rate": 0.5})


def test_a_checkpoint_of_another_run_overwrites_nothing(model, corpus, uninterrupted, interrupted, tmp_path):
    asked = {"resume_from_checkpoint": str(interrupted / "checkpoint-3")}
    before = (uninterrupted / "run.json").read_bytes()
    with pytest.raises(CheckpointError, match="has checkpoints of another run, the newest checkpoint-7, and resume"):
        recognise(model, corpus, uninterrupted, **asked, **OPTIONS)
    finished = shutil.copytree(uninterrupted, tmp_path / "finished", ignore=shutil.ignore_patterns("checkpoint-*"))
    with pytest.raises(ArgumentError, match="has a model already"):
        recognise(model, corpus, finished, **asked, **OPTIONS)
    assert (uninterrupted / "run.json").read_bytes() == before == (finished / "run.json").read_bytes()


def test_a_run_interrupted_after_its_last_step_trains_no_further(model, corpus, uninterrupted, tmp_path, monkeypatch):
    def interrupt(*args):
        raise Interrupted

    out, options, count = tmp_path / "out", {**OPTIONS, "data": {"eval_data": [str(corpus)]}}, CountSteps()
    with monkeypatch.context() as patch:
        patch.setattr(Recognition, "report", interrupt)
        with pytest.raises(Interrupted):
            recognise(model, corpus, out, **options)
    record = recognise(model, corpus, out, on_trainer=count, **options)
    assert count.steps == [] and record.steps == 7
    assert_same_model(out, uninterrupted)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("trainer_state.json", "remove", "checkpoint-4 has no trainer_state.json: it is incomplete"),
        ("trainer_state.json", truncate, "trainer_state.json has .* bytes instead of .*: it is truncated"),
        ("model.safetensors", flip_a_bit, "model.safetensors is not what was written"),
        ("optimizer.pt", truncate, "optimizer.pt has .* bytes instead of .*: it is truncated"),
        ("optimizer.pt", "remove", r"checkpoint-4 has no optimizer\*"),
        ("rng_state.pth", flip_a_bit, "rng_state.pth is not what was written"),
        ("checkpoint.json", flip_a_bit, "checkpoint.json"),
    ],
)
def test_an_incomplete_checkpoint_is_passed_over(
    model, corpus, uninterrupted, interrupted, caplog, name, damage, message
):
    file, count = interrupted / "checkpoint-4" / name, CountSteps()
    file.unlink() if damage == "remove" else damage(file)
    recognise(model, corpus, interrupted, on_trainer=count, **OPTIONS)
    assert re.search(f"Checkpoint refused: .*{message}", caplog.text)
    assert count.steps[0] == 4
    assert_same_model(interrupted, uninterrupted)


def test_no_flipped_bit_and_no_lost_byte_of_a_checkpoint_is_accepted(interrupted):
    checkpoint = interrupted / "checkpoint-4"
    before = read_trainer_checkpoint(checkpoint)  # the control
    assert before.record is not None and before.record.arguments["max_steps"] == 7
    chance = random.Random(0)
    for file in sorted(checkpoint.iterdir()):
        content = file.read_bytes()
        for number in range(20):
            if number % 4:
                flip_a_bit(file, chance.randrange(len(content)), chance.randrange(8))
            else:
                file.write_bytes(content[: chance.randrange(len(content))])
            try:
                found = read_trainer_checkpoint(checkpoint)
            except CheckpointError:
                continue
            finally:
                file.write_bytes(content)
            assert file.name == "checkpoint.json" and found == before  # white space, or the last line break
    assert read_trainer_checkpoint(checkpoint) == before


def test_files_that_were_not_written_with_a_checkpoint_are_not_loaded(interrupted):
    checkpoint = interrupted / "checkpoint-4"
    (checkpoint / "notes.txt").write_text("as good as the one before")
    (checkpoint / ".DS_Store").write_bytes(b"")
    read_trainer_checkpoint(checkpoint)
    shutil.copyfile(checkpoint / "model.safetensors", checkpoint / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"has adapter_model\.safetensors, which was not written with it"):
        read_trainer_checkpoint(checkpoint)
    (checkpoint / "adapter_model.safetensors").unlink()
    (checkpoint / "model.safetensors").rename(interrupted / "elsewhere.safetensors")
    (checkpoint / "model.safetensors").symlink_to(interrupted / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match=r"lists model\.safetensors, which is a link or outside the folder"):
        read_trainer_checkpoint(checkpoint)


def test_a_checkpoint_without_its_manifest_is_passed_over(model, corpus, uninterrupted, interrupted, caplog):
    (interrupted / "checkpoint-4" / "checkpoint.json").unlink()
    recognise(model, corpus, interrupted, **OPTIONS)
    assert "checkpoint-4 has no checkpoint.json: it is unfinished, or from another program." in caplog.text
    assert_same_model(interrupted, uninterrupted)


def test_a_folder_of_incomplete_checkpoints_is_refused(model, corpus, interrupted):
    for number in (3, 4):
        (interrupted / f"checkpoint-{number}" / "trainer_state.json").unlink()
    with pytest.raises(ArgumentError, match=r"No checkpoint in output_dir=.*can be used.*checkpoint-3 has no trainer"):
        recognise(model, corpus, interrupted, **OPTIONS)


def test_a_wrong_model_is_reported_before_the_state_of_the_folder(corpus, uninterrupted, tmp_path):
    with pytest.raises(ArgumentError, match=r"^model=\S+nothing is neither a folder nor a model on the Hub"):
        recognise(tmp_path / "nothing", corpus, uninterrupted)


def test_a_finished_run_is_left_alone(model, corpus, uninterrupted, caplog):
    before = (uninterrupted / "run.json").read_text()
    with caplog.at_level("INFO", "dinosr_hf"):
        record = recognise(model, corpus, uninterrupted, **OPTIONS)
    assert "This run is finished. To begin another, give another output_dir." in caplog.text
    assert record == read_record(uninterrupted)
    assert (uninterrupted / "run.json").read_text() == before


def test_other_arguments_are_refused_by_name(model, corpus, uninterrupted, interrupted):
    changed = {
        **OPTIONS,
        "learning_rate": 0.5,
        "start": {**RANDOM, "final_dropout": 0.3},
        "data": {"max_seconds": 9.0},
    }
    message = (
        "has a run with other arguments: final_dropout is 0.3 and was not given, learning_rate is 0.5 and was 0.001,"
        r" max_seconds is 9.0 and was 40.0\. Give another output_dir"
    )
    for folder in (interrupted, uninterrupted):
        with pytest.raises(ArgumentError, match=message):
            recognise(model, corpus, folder, **changed)
    with pytest.raises(
        ArgumentError, match=r"weight_decay is 0\.1 and was not given"
    ):  # TrainingArguments' own default
        recognise(model, corpus, interrupted, weight_decay=0.1, **OPTIONS)


def test_another_spelling_of_a_path_is_the_same_argument(tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    monkeypatch.chdir(tmp_path)
    saved = {"model": "corpus/", "train_data": [str(tmp_path / "corpus")], "seed": 1}
    now = {"model": "corpus", "train_data": ["./corpus"], "seed": 1}
    assert changed_arguments(saved, now, saved) == ""
    assert changed_arguments(saved, {**now, "train_data": ["other"]}, saved).startswith(
        "train_data is ['other'] and was"
    )


def test_other_arguments_are_reported_if_resuming_is_requested(model, corpus, interrupted, caplog):
    count = CountSteps()
    changed = {**OPTIONS, "max_steps": 6}
    recognise(model, corpus, interrupted, resume_from_checkpoint="true", on_trainer=count, **changed)
    assert count.steps == [5, 6]
    assert "Resuming a run that had other arguments: max_steps is 6 and was 7." in caplog.text


def test_arguments_that_change_no_weight_may_change(model, corpus, uninterrupted, interrupted, tmp_path):
    moved = interrupted.rename(tmp_path / "moved")
    recognise(model, corpus, moved, logging_steps=3, save_total_limit=5, dataloader_num_workers=0, **OPTIONS)
    assert_same_model(moved, uninterrupted)


def test_false_refuses_a_folder_with_a_run(model, corpus, interrupted):
    with pytest.raises(ArgumentError, match="has a run, and resume_from_checkpoint is false"):
        recognise(model, corpus, interrupted, resume_from_checkpoint="False", **OPTIONS)


@pytest.mark.parametrize(
    ("letter", "message"),
    [
        (
            "a",
            r"checkpoint-4 was trained with other labels \(new: a; gone: e\)\. Undo the change",
        ),  # as many as before
        ("éa", r"checkpoint-4 was trained with other labels \(new: a é; gone: e\)\. Undo the change"),
    ],
)
def test_other_labels_are_refused_by_name(model, corpus, tmp_path, letter, message):
    train, out = shutil.copytree(corpus, tmp_path / "corpus"), tmp_path / "out"
    with pytest.raises(Interrupted):
        recognise(model, train, out, on_trainer=InterruptAfter(4), **OPTIONS)
    table = train / "metadata.csv"
    table.write_text(table.read_text().replace("hello", f"h{letter}llo"))
    with pytest.raises(ArgumentError, match=message):
        recognise(model, train, out, **OPTIONS)


def test_other_recordings_are_reported(model, corpus, tmp_path, caplog):
    train, out = shutil.copytree(corpus, tmp_path / "corpus"), tmp_path / "out"
    with pytest.raises(Interrupted):
        recognise(model, train, out, on_trainer=InterruptAfter(4), **OPTIONS)
    assert "has changed" not in caplog.text
    table = train / "metadata.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    recognise(model, train, out, **OPTIONS)
    assert re.search(r"changed since \S+checkpoint-4 \(\S+: 17 utt.*\); now it has \S+: 16 utterances", caplog.text)


def test_the_same_objects_resume(model, corpus, uninterrupted, tmp_path):
    asked = recognition_of(model, corpus, tmp_path / "out", **OPTIONS)
    with pytest.raises(Interrupted):
        finetune(*asked, on_trainer=InterruptAfter(4))
    finetune(*asked)
    assert_same_model(tmp_path / "out", uninterrupted)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"task": 3}', b"\xff\xfe", None], ids=repr)
def test_a_damaged_record_is_written_again(model, corpus, uninterrupted, interrupted, caplog, content):
    record = interrupted / "run.json"
    record.unlink() if content is None else record.write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    with pytest.raises(ArgumentError, match=r"has a run with other arguments: learning_rate is 0\.5 and was 0\.001"):
        recognise(model, corpus, interrupted, **{**OPTIONS, "learning_rate": 0.5})
    recognise(model, corpus, interrupted, **OPTIONS)
    assert ("run.json is damaged and will be written again" in caplog.text) == (content is not None)
    assert_same_model(interrupted, uninterrupted)
    assert read_record(interrupted).steps == 7


def test_checkpoints_of_unknown_runs_are_refused(model, corpus, interrupted):
    record = interrupted / "run.json"
    content = json.loads(record.read_text())
    for number in (3, 4):  # without a record of their own
        (interrupted / f"checkpoint-{number}" / "checkpoint.json").unlink()
        write_file_list(interrupted / f"checkpoint-{number}", None, None)
    record.write_text(json.dumps({**content, "task": "audio-classification"}))
    with pytest.raises(ArgumentError, match="has a run of the task audio-classification"):
        recognise(model, corpus, interrupted, **OPTIONS)
    record.unlink()
    with pytest.raises(ArgumentError, match=r"has checkpoints, but no run\.json"):
        recognise(model, corpus, interrupted, **OPTIONS)


def test_a_finished_run_whose_model_is_damaged_writes_it_again(model, corpus, uninterrupted, tmp_path, caplog):
    out = shutil.copytree(uninterrupted, tmp_path / "out")
    truncate(out / "model.safetensors")
    count = CountSteps()
    recognise(model, corpus, out, on_trainer=count, **OPTIONS)
    assert "its model is damaged and will be written again" in caplog.text
    assert count.steps == []
    assert_same_model(out, uninterrupted)


def test_folders_that_cannot_be_resumed_are_refused(model, corpus, tmp_path):
    with pytest.raises(ArgumentError, match=f"output_dir={model} has a model already"):
        recognise(model, corpus, model)
    with pytest.raises(ArgumentError, match=r"has no checkpoint\. Remove resume_from_checkpoint"):
        recognise(model, corpus, tmp_path / "out", resume_from_checkpoint="true")
    with pytest.raises(
        ArgumentError, match=r"resume_from_checkpoint=.*tiny has no trainer_state\.json: .* not of a fine"
    ):
        recognise(model, corpus, tmp_path / "out", resume_from_checkpoint=str(model))
    (tmp_path / "other" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(ArgumentError, match=r"other is the folder of a run\. Give one .*other/checkpoint-3; or leave"):
        recognise(model, corpus, tmp_path / "out", resume_from_checkpoint=str(tmp_path / "other"))


def test_a_run_without_checkpoints_starts_over(model, corpus, tmp_path):
    out, options = tmp_path / "out", {**OPTIONS, "save_strategy": "no", "max_steps": 2}

    class InterruptAtStart(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            raise Interrupted

    with pytest.raises(Interrupted):
        recognise(model, corpus, out, on_trainer=lambda trainer: trainer.add_callback(InterruptAtStart()), **options)
    assert json.loads((out / "run.json").read_text())["finished"] is None
    assert recognise(model, corpus, out, learning_rate=0.5, **options).steps == 2


def test_two_runs_in_one_folder_are_refused(model, corpus, tmp_path):
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".lock"),
        pytest.raises(ArgumentError, match="Another run is using output_dir"),
    ):
        recognise(model, corpus, tmp_path / "out")


BEST = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 4, "freeze_steps": 0}


@pytest.fixture(scope="module")
def best_is_first(model, corpus, tmp_path_factory):
    """Folder of a run that was interrupted at its third checkpoint, and whose first one has the best model."""
    out = tmp_path_factory.mktemp("best") / "out"
    options = {**OPTIONS, **BEST, "data": {"eval_data": [str(corpus)]}}

    def set_best_and_interrupt(trainer):
        trainer.compute_metrics = lambda prediction: {"ranking": trainer.state.global_step / 10}
        InterruptAfter(3)(trainer)

    with pytest.raises(Interrupted):
        recognise(model, corpus, out, on_trainer=set_best_and_interrupt, **options)
    return out, options


def rate_by_step(trainer):
    trainer.compute_metrics = lambda prediction: {"ranking": trainer.state.global_step / 10}


def test_the_best_checkpoint_is_found_in_a_moved_folder(model, corpus, best_is_first, tmp_path):
    out, options = best_is_first
    first = load_file(out / "checkpoint-1" / "model.safetensors")
    moved = shutil.copytree(out, tmp_path / "moved")
    recognise(model, corpus, moved, on_trainer=rate_by_step, **options)
    assert all(torch.equal(value, first[name]) for name, value in load_file(moved / "model.safetensors").items())


def test_the_best_checkpoint_stays_when_a_run_is_resumed_by_another_spelling(
    model, corpus, best_is_first, tmp_path, monkeypatch
):
    out, options = best_is_first
    first = load_file(out / "checkpoint-1" / "model.safetensors")
    shutil.copytree(out, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    again = {"resume_from_checkpoint": str(tmp_path / "moved" / "checkpoint-3"), "save_total_limit": 1}
    recognise(model, corpus, Path("moved"), on_trainer=rate_by_step, **options, **again)
    assert all(torch.equal(value, first[name]) for name, value in load_file("moved/model.safetensors").items())


def test_a_damaged_best_checkpoint_is_not_loaded(model, corpus, best_is_first, tmp_path):
    out, options = best_is_first
    moved = shutil.copytree(out, tmp_path / "moved")
    flip_a_bit(moved / "checkpoint-1" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"It had the best model. Remove .*checkpoint-1 to finish with the last"):
        recognise(model, corpus, moved, on_trainer=rate_by_step, **options)
    assert not (moved / "config.json").exists()
    shutil.rmtree(moved / "checkpoint-1")
    recognise(model, corpus, moved, on_trainer=rate_by_step, **options)
    last = load_file(moved / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(value, last[name]) for name, value in load_file(moved / "model.safetensors").items())


class SpoilWeights(TrainerCallback):
    def __call__(self, trainer):
        trainer.add_callback(self)

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 3:
            model.lm_head.weight.data[0, 0] = float("nan")


@pytest.mark.parametrize("logging_steps", [1, 100], ids=["logged", "only_saved"])
def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(model, corpus, tmp_path, logging_steps):
    out, options = tmp_path / "out", {**OPTIONS, "logging_steps": logging_steps}
    with pytest.raises(ArgumentError, match=r"After step 3 some weights are not finite numbers.*Lower learning_rate"):
        recognise(model, corpus, out, on_trainer=SpoilWeights(), **options)
    assert sorted(path.name for path in out.glob("*checkpoint*")) == ["checkpoint-1", "checkpoint-2"]
    assert not (out / "config.json").exists()


def test_a_run_whose_recordings_vanish_writes_a_checkpoint_and_goes_on_later(model, corpus, tmp_path, uninterrupted):
    mount, gone, out = tmp_path / "mount", tmp_path / "gone", tmp_path / "out"
    shutil.copytree(corpus, mount)
    options = {**OPTIONS, "save_steps": 100}

    class Unmount(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                mount.rename(gone)

    with pytest.raises(
        ArgumentError, match=r"None of the \d+ recordings up to step 6 could be read; .* Look at the disk"
    ):
        recognise(model, mount, out, on_trainer=lambda trainer: trainer.add_callback(Unmount()), **options)
    gone.rename(mount)
    count = CountSteps()
    recognise(model, mount, out, on_trainer=count, **options)
    assert count.steps == [6, 7]
    assert_same_model(out, uninterrupted)


def test_a_full_disk_keeps_the_checkpoint_before_it(model, corpus, uninterrupted, tmp_path, monkeypatch):
    out, saved = tmp_path / "out", torch.save

    def fill(content, path, *args, **kwargs):
        if "checkpoint-4" in str(path) and "optimizer" in str(path):
            raise OSError(28, "No space left on device")
        saved(content, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fill)
        with pytest.raises(CheckpointError, match=r"checkpoint-4 could not be written \(OSError.*Free space in"):
            recognise(model, corpus, out, **OPTIONS)
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["checkpoint-2", "checkpoint-3"]
    recognise(model, corpus, out, **OPTIONS)
    assert_same_model(out, uninterrupted)


@pytest.mark.slow
@pytest.mark.timeout(900)  # each start takes seconds
def test_kills_at_any_moment_end_with_the_model_of_an_undisturbed_run(model, corpus, tmp_path):
    options = {**run_settings(max_steps=10, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=4)}
    options |= {"model": str(model), "train_data": [str(corpus)], "eval_data": [str(corpus)], "min_seconds": 0.01}
    outs = [tmp_path / name / "out" for name in ("whole", "killed")]
    for out in outs:
        out.parent.mkdir()
        text = yaml.safe_dump({**options, **RANDOM, "output_dir": str(out), "load_best_model_at_end": False})
        (out.parent / "run.yaml").write_text(text)
    for out, num_kills in zip(outs, (0, 6), strict=True):
        run_through_kills("finetune_ctc", out.parent / "run.yaml", out, num_kills)
    assert_same_model(outs[1], outs[0])
    assert read_record(outs[1]).evaluation[0]["wer"] == read_record(outs[0]).evaluation[0]["wer"]
    assert not list(outs[1].glob(".unfinished-*"))
