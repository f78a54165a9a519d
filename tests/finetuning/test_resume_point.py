"""An interrupted run resumes with the same command; a finished one is left alone; other arguments are refused."""

import json
import re
import shutil

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from transformers import TrainerCallback

from dinosr_hf.finetuning import Recognition
from dinosr_hf.training.run_record import read_record
from dinosr_hf.utils.command_line import ArgumentError
from finetuning_runs import recognise, write_corpus, write_model

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


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("trainer_state.json", "remove", "checkpoint-4 has no trainer_state.json: it is incomplete"),
        ("trainer_state.json", truncate, "checkpoint-4 has a truncated file"),
        ("model.safetensors", truncate, "checkpoint-4 has a truncated file"),
        ("optimizer.pt", truncate, "checkpoint-4 has a truncated file"),
        ("optimizer.pt", "remove", r"checkpoint-4 has no optimizer\*"),
        ("rng_state.pth", truncate, "checkpoint-4 has a truncated file"),
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


def test_checkpoints_of_unknown_runs_are_refused(model, corpus, interrupted):
    record = interrupted / "run.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "task": "audio-classification"}))
    with pytest.raises(ArgumentError, match="has a run of the task audio-classification"):
        recognise(model, corpus, interrupted, **OPTIONS)
    record.write_text("{")
    with pytest.raises(ArgumentError, match=r"run\.json cannot be read"):
        recognise(model, corpus, interrupted, **OPTIONS)
    record.unlink()
    with pytest.raises(ArgumentError, match=r"has checkpoints, but no run\.json"):
        recognise(model, corpus, interrupted, **OPTIONS)


def test_folders_that_cannot_be_resumed_are_refused(model, corpus, tmp_path):
    with pytest.raises(ArgumentError, match=f"output_dir={model} has a model already"):
        recognise(model, corpus, model)
    with pytest.raises(ArgumentError, match=r"has no checkpoint\. Remove resume_from_checkpoint"):
        recognise(model, corpus, tmp_path / "out", resume_from_checkpoint="true")
    with pytest.raises(
        ArgumentError, match=r"resume_from_checkpoint=.*tiny has no trainer_state\.json: .* not of a fine"
    ):
        recognise(model, corpus, tmp_path / "out", resume_from_checkpoint=str(model))


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
