"""Checkpoints, resuming bit for bit, signals, kills and full disks: no work is lost."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from filelock import FileLock
from safetensors.torch import load_file

import forks
from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.data import FolderSource
from dinosr_hf.pretraining import (
    ArgumentError,
    CheckpointError,
    RunInterrupted,
    find_checkpoints,
    loop,
    parse_arguments,
    read_checkpoint,
    run,
)
from dinosr_hf.pretraining.checkpoint import CheckpointWriter
from disk import flip_a_bit, truncate
from kills import run_through_kills
from pretraining_runs import (
    ANCHORED,
    assert_same_run,
    launch,
    metrics_of,
    send_at_load,
    tiny_arguments,
    write_config,
)
from scripts import ROOT


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, recordings):
    folder = tmp_path_factory.mktemp("undisturbed")
    run(tiny_arguments(folder, recordings, **ANCHORED, checkpoint_steps=0))
    return folder / "out"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, recordings):
    """The same run with a checkpoint of each step."""
    folder = tmp_path_factory.mktemp("finished")
    run(tiny_arguments(folder, recordings, **ANCHORED, checkpoint_steps=1, keep_checkpoints=20))
    return folder / "out"


def back_at(step, finished, out):
    """Copy a finished run as it would be after a kill when its last checkpoint was of a step."""
    shutil.copytree(finished, out)
    for path in find_checkpoints(out):
        if read_checkpoint(path).step > step:
            shutil.rmtree(path)
    (out / "finished.json").unlink()


# An epoch has 3 steps of 4 or 5 recordings: in its middle, at its end, in the next one.
@pytest.mark.parametrize("call", [0, 6, 13, 30])
def test_a_run_stopped_by_a_signal_resumes_bit_for_bit(tmp_path, recordings, undisturbed, monkeypatch, call):
    arguments = tiny_arguments(tmp_path, recordings, **ANCHORED, checkpoint_steps=100)
    with monkeypatch.context() as patch:
        send_at_load(patch, signal.SIGTERM, call)
        with pytest.raises(RunInterrupted, match=r"SIGTERM: stopped after step \d+, with ") as caught:
            run(arguments)
    assert caught.value.exit_code == 143
    stopped_at = [read_checkpoint(path).step for path in find_checkpoints(tmp_path / "out")]
    assert stopped_at == [] if call == 0 else 1 <= stopped_at[0] < 10
    run(arguments)
    assert_same_run(tmp_path / "out", undisturbed)


@pytest.mark.parametrize("step", [2, 3, 5])
def test_every_checkpoint_leads_to_the_same_end(tmp_path, recordings, undisturbed, finished, step, caplog):
    arguments = tiny_arguments(tmp_path, recordings, **ANCHORED, checkpoint_steps=1, keep_checkpoints=20)
    back_at(step, finished, tmp_path / "out")
    with caplog.at_level("INFO", "dinosr_hf"):
        run(arguments)
    assert f"Resuming from {tmp_path / 'out' / f'checkpoint-{step}'}: step {step} of 10" in caplog.text
    assert_same_run(tmp_path / "out", undisturbed)


def test_without_its_random_states_a_resumed_run_differs(tmp_path, recordings, undisturbed, finished, monkeypatch):
    # negative control of the tests above
    arguments = tiny_arguments(tmp_path, recordings, **ANCHORED, checkpoint_steps=5)
    back_at(5, finished, tmp_path / "out")
    monkeypatch.setattr("dinosr_hf.pretraining.checkpoint.set_random_state", lambda _: None)
    run(arguments)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "out", undisturbed)


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.1), (0.1, 0.0)], ids=["on", "off"])
def test_other_speeds_begin_the_next_epoch(tmp_path, recordings, caplog, before, after):
    run(tiny_arguments(tmp_path, recordings, speed_change=before, checkpoint_steps=1, max_steps=1))
    run(tiny_arguments(tmp_path, recordings, speed_change=after, max_steps=2))
    assert "position in the data is lost, because speed_change changed since the checkpoint" in caplog.text
    assert [line["epoch"] for line in metrics_of(tmp_path / "out")] == [0, 1]


def test_a_run_with_workers_and_a_freeze_resumes_bit_for_bit(tmp_path, recordings):
    options = {**ANCHORED, "freeze_teacher_step": 4, "num_workers": 2, "keep_checkpoints": 9}
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    run(tiny_arguments(tmp_path / "whole", recordings, **options, checkpoint_steps=0))
    arguments = tiny_arguments(tmp_path / "parts", recordings, **options, checkpoint_steps=6)
    run(arguments)
    shutil.rmtree(tmp_path / "parts" / "out" / "checkpoint-10")
    (tmp_path / "parts" / "out" / "finished.json").unlink()
    run(arguments)
    assert_same_run(tmp_path / "parts" / "out", tmp_path / "whole" / "out")


def test_the_newest_checkpoints_are_kept(tmp_path, recordings):
    run(tiny_arguments(tmp_path, recordings, max_steps=7, checkpoint_steps=2, keep_checkpoints=3))
    assert [path.name for path in find_checkpoints(tmp_path / "out")] == [
        "checkpoint-7",
        "checkpoint-6",
        "checkpoint-4",
    ]
    assert DinoSRForPreTraining.from_pretrained(tmp_path / "out" / "checkpoint-6").config.hidden_size == 16
    assert [path.name for path in (tmp_path / "out").glob(".*")] in ([], [".lock"])


def test_a_checkpoint_names_versions_arguments_and_files(tmp_path, recordings):
    run(tiny_arguments(tmp_path, recordings, checkpoint_steps=2, keep_checkpoints=9))
    manifest = read_checkpoint(tmp_path / "out" / "checkpoint-2").manifest
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["arguments"]["codebook_size"] == 8
    assert manifest["progress"]["step"] == 2 and manifest["progress"]["audio_seconds"] > 0
    assert set(manifest["files"]) >= {"model.safetensors", "training_state.pt", "process_states.pt", "config.json"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: truncate(folder / "training_state.pt"), r"training_state\.pt has .* bytes instead of"),
        (lambda folder: flip_a_bit(folder / "model.safetensors"), r"model\.safetensors is not what was written"),
        (lambda folder: (folder / "process_states.pt").unlink(), r"checkpoint-10 lacks process_states\.pt"),
        (lambda folder: (folder / "checkpoint.json").unlink(), r"checkpoint-10 has no checkpoint\.json"),
        (lambda folder: truncate(folder / "checkpoint.json"), r"checkpoint\.json cannot be read"),
        (lambda folder: (folder / "checkpoint.json").write_text("{}"), r"checkpoint\.json is not what was written"),
    ],
    ids=["truncated", "changed", "incomplete", "unfinished", "half-manifest", "other-program"],
)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_used(
    tmp_path, recordings, undisturbed, finished, caplog, damage, message
):
    out = tmp_path / "out"
    back_at(10, finished, out)
    damage(out / "checkpoint-10")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(out / "checkpoint-10")
    with caplog.at_level("INFO", "dinosr_hf"):
        run(tiny_arguments(tmp_path, recordings, **ANCHORED, checkpoint_steps=3, keep_checkpoints=9))
    assert "Checkpoint refused: " in caplog.text and "checkpoint-10" in caplog.text
    assert f"Resuming from {out / 'checkpoint-9'}" in caplog.text
    assert_same_run(out, undisturbed)


def test_a_checkpoint_of_another_model_is_refused(tmp_path, recordings):
    run(tiny_arguments(tmp_path, recordings, checkpoint_steps=2))
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* can be used.*codebook_size 8 instead of 12"):
        run(tiny_arguments(tmp_path, recordings, checkpoint_steps=2, codebook_size=12))
    other = tiny_arguments(tmp_path, recordings, codebook_size=12, resume=str(tmp_path / "out" / "checkpoint-2"))
    with pytest.raises(CheckpointError, match="is of another model: codebook_size 8 instead of 12"):
        run(other)


def test_never_resuming_refuses_a_folder_with_checkpoints(tmp_path, recordings):
    run(tiny_arguments(tmp_path, recordings, checkpoint_steps=2))
    with pytest.raises(CheckpointError, match="has checkpoints, and resume is never"):
        run(tiny_arguments(tmp_path, recordings, resume="never"))


def test_a_folder_with_a_model_and_no_checkpoint_is_refused(tmp_path, recordings):
    run(tiny_arguments(tmp_path, recordings, checkpoint_steps=0))
    with pytest.raises(ArgumentError, match="has a model already"):
        run(tiny_arguments(tmp_path, recordings, checkpoint_steps=0, max_steps=5))


def test_a_finished_run_stays_and_goes_on_with_more_steps(tmp_path, recordings, caplog):
    with caplog.at_level("INFO", "dinosr_hf"):
        first = run(tiny_arguments(tmp_path, recordings, checkpoint_steps=2))
        again = run(tiny_arguments(tmp_path, recordings, checkpoint_steps=2))
        assert "This run is finished" in caplog.text
        assert all(torch.equal(first.state_dict()[name], tensor) for name, tensor in again.state_dict().items())
        run(tiny_arguments(tmp_path, recordings, checkpoint_steps=2, max_steps=6, learning_rate=2e-3))
    assert "other arguments: learning_rate is 0.002 and was 0.001, max_steps is 6 and was 4." in caplog.text
    assert [line["step"] for line in metrics_of(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("checkpoint_steps", [2, 0], ids=["checkpoints", "no checkpoints"])
def test_a_finished_run_is_not_passed_off_as_another(tmp_path, recordings, monkeypatch, caplog, checkpoint_steps):
    options = {"checkpoint_steps": checkpoint_steps, "max_steps": 2}
    run(tiny_arguments(tmp_path, recordings, **options))
    changes = {"data": str(tmp_path), "data_split": ["train"], "data_config": ["de"], "seed": 1}
    for name, value in changes.items():
        message = f"has a finished run with other arguments, so nothing would be trained: {name} is .* and was "
        with pytest.raises(ArgumentError, match=message):
            run(tiny_arguments(tmp_path, recordings, **options, **{name: value}))
    monkeypatch.chdir(recordings.parent)
    with caplog.at_level("INFO", "dinosr_hf"):
        run(tiny_arguments(tmp_path, recordings, **options, data=recordings.name))  # the same place
    assert "This run is finished" in caplog.text


def test_revival_can_be_switched_on_and_off_when_resuming(tmp_path, recordings, caplog):
    run(tiny_arguments(tmp_path, recordings, checkpoint_steps=2))
    with caplog.at_level("INFO", "dinosr_hf"):
        options = {"checkpoint_steps": 2, "codebook_revival_share": 0.1}
        reviving = run(tiny_arguments(tmp_path, recordings, max_steps=6, **options))
        plain = run(tiny_arguments(tmp_path, recordings, max_steps=8, checkpoint_steps=2))
    assert "codebook_revival_share is 0.1 and was 0.0" in caplog.text
    assert (reviving.codebooks.usage != 1).any() and plain.codebooks.usage is None
    assert [line["step"] for line in metrics_of(tmp_path / "out")] == list(range(1, 9))


def test_resuming_by_path_goes_on_from_the_newest_checkpoint_after_it(tmp_path, recordings, monkeypatch, caplog):
    (tmp_path / "first").mkdir()
    run(tiny_arguments(tmp_path / "first", recordings, checkpoint_steps=2))
    origin = tmp_path / "first" / "out" / "checkpoint-2"
    options = {"checkpoint_steps": 2, "max_steps": 8, "resume": str(origin), "learning_rate": 2e-3}
    with monkeypatch.context() as patch:
        send_at_load(patch, signal.SIGTERM, 18)
        with pytest.raises(RunInterrupted):
            run(tiny_arguments(tmp_path, recordings, **options))
    reached = read_checkpoint(find_checkpoints(tmp_path / "out")[0]).step
    assert reached > 4
    with caplog.at_level("INFO", "dinosr_hf"):
        run(tiny_arguments(tmp_path, recordings, **options))
    assert f"Resuming from {tmp_path / 'out' / f'checkpoint-{reached}'}" in caplog.text
    assert [line["step"] for line in metrics_of(tmp_path / "out")] == [3, 4, 5, 6, 7, 8]
    with pytest.raises(CheckpointError, match="has checkpoints of another run, the newest checkpoint-4, and resume="):
        run(
            tiny_arguments(tmp_path / "first", recordings, **{**options, "resume": str(tmp_path / "out/checkpoint-8")})
        )
    with pytest.raises(CheckpointError, match=r"resume=nowhere is not a folder\. Give a checkpoint"):
        run(tiny_arguments(tmp_path, recordings, resume="nowhere"))
    with pytest.raises(CheckpointError, match=r"is the folder of a run\. Give .* as .*checkpoint-8; or leave resume"):
        run(tiny_arguments(tmp_path, recordings, resume=str(tmp_path / "out")))


def test_going_back_renames_later_checkpoints(tmp_path, recordings, caplog):
    options = {"max_steps": 6, "checkpoint_steps": 1, "keep_checkpoints": 9}
    run(tiny_arguments(tmp_path, recordings, **options))
    out = tmp_path / "out"
    back = {**options, "resume": str(out / "checkpoint-3"), "max_steps": 7, "learning_rate": 1e-4}
    run(tiny_arguments(tmp_path, recordings, **back))
    assert "checkpoint-6 is after step 3, so it is renamed to abandoned-checkpoint-6" in caplog.text
    assert [line["learning_rate"] < 2e-4 for line in metrics_of(out)] == [False] * 3 + [True] * 4
    assert read_checkpoint(find_checkpoints(out)[0]).step == 7


def test_going_back_changes_nothing_before_the_run_begins(tmp_path, recordings, caplog):
    options, out = {"checkpoint_steps": 1, "keep_checkpoints": 2}, tmp_path / "out"
    run(tiny_arguments(tmp_path, recordings, **options))
    before = sorted(path.name for path in out.iterdir())
    back = {**options, "resume": str(out / "checkpoint-3"), "data": str(tmp_path / "typo")}
    with pytest.raises(ArgumentError, match="typo does not exist"):
        run(tiny_arguments(tmp_path, recordings, **back))
    assert sorted(path.name for path in out.iterdir()) == before
    with caplog.at_level("INFO", "dinosr_hf"):
        run(tiny_arguments(tmp_path, recordings, **options))
    assert "This run is finished. To continue it, raise max_steps" in caplog.text


def test_a_finished_run_without_checkpoints_says_how_to_go_on(tmp_path, recordings, caplog):
    options = {"checkpoint_steps": 0, "max_steps": 2}
    run(tiny_arguments(tmp_path, recordings, **options))
    with caplog.at_level("INFO", "dinosr_hf"):
        run(tiny_arguments(tmp_path, recordings, **options))
    assert f"To train its model on, give base_model={tmp_path / 'out'} and another output_dir." in caplog.text


def test_going_back_in_a_finished_run_trains_again(tmp_path, recordings, caplog):
    options, out = {"checkpoint_steps": 1, "keep_checkpoints": 2}, tmp_path / "out"
    run(tiny_arguments(tmp_path, recordings, **options))
    first = load_file(out / "model.safetensors")
    back = tiny_arguments(tmp_path, recordings, **options, resume=str(out / "checkpoint-3"), learning_rate=1e-4)
    run(back)
    second = load_file(out / "model.safetensors")
    assert not all(torch.equal(second[name], tensor) for name, tensor in first.items())
    assert [line["learning_rate"] < 2e-4 for line in metrics_of(out)] == [False] * 3 + [True]
    with caplog.at_level("INFO", "dinosr_hf"):
        again = run(back).state_dict()
    assert "This run is finished" in caplog.text
    assert all(torch.equal(again[name], tensor) for name, tensor in second.items())


def test_resuming_by_path_goes_on_when_that_checkpoint_is_removed(tmp_path, recordings, caplog):
    options, out = {"checkpoint_steps": 1, "keep_checkpoints": 2}, tmp_path / "out"
    run(tiny_arguments(tmp_path, recordings, **options))
    back = {**options, "resume": str(out / "checkpoint-3")}
    run(tiny_arguments(tmp_path, recordings, **back, max_steps=6))
    assert not (out / "checkpoint-3").exists()
    with caplog.at_level("INFO", "dinosr_hf"):
        run(tiny_arguments(tmp_path, recordings, **back, max_steps=7))
    assert f"Resuming from {out / 'checkpoint-6'}" in caplog.text


def test_a_checkpoint_of_another_folder_says_nothing_of_a_run(tmp_path, recordings):
    (tmp_path / "other").mkdir()
    run(tiny_arguments(tmp_path / "other", recordings, checkpoint_steps=2))
    out, origin = tmp_path / "out", tmp_path / "other" / "out" / "checkpoint-4"
    run(tiny_arguments(tmp_path, recordings, checkpoint_steps=0))
    from_other = tiny_arguments(tmp_path, recordings, checkpoint_steps=0, resume=str(origin), max_steps=6)
    model = (out / "model.safetensors").read_bytes()
    with pytest.raises(ArgumentError, match="has a model already"):
        run(from_other)
    assert (out / "model.safetensors").read_bytes() == model
    for name in ("config.json", "run.json", "finished.json"):  # as a run that stopped without a model leaves it
        (out / name).unlink()
    run(from_other)
    assert [line["step"] for line in metrics_of(out)] == [5, 6]


def test_the_model_of_a_finished_run_is_of_the_last_step(tmp_path, recordings, monkeypatch):
    run(tiny_arguments(tmp_path, recordings, checkpoint_steps=2))
    with monkeypatch.context() as patch:  # killed between the last checkpoint and the model
        patch.setattr("dinosr_hf.pretraining.loop.save_folder", lambda *_: 1 / 0)
        with pytest.raises(CheckpointError, match=r"The model could not be written.*Free space there"):
            run(tiny_arguments(tmp_path, recordings, checkpoint_steps=2, max_steps=6))
    again = run(tiny_arguments(tmp_path, recordings, checkpoint_steps=2, max_steps=6))
    last = load_file(tmp_path / "out" / "checkpoint-6" / "model.safetensors")
    assert all(torch.equal(tensor, last[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["codebooks.sums"], last["codebooks.sums"])


def test_changed_optimizer_options_apply_after_a_resume(tmp_path, recordings, monkeypatch):
    run(tiny_arguments(tmp_path, recordings, checkpoint_steps=2))
    groups = []
    plain = loop.Pretraining._finish

    def finish(self):
        groups.extend(self.state.optimizer.param_groups)
        plain(self)

    monkeypatch.setattr(loop.Pretraining, "_finish", finish)
    run(tiny_arguments(tmp_path, recordings, checkpoint_steps=2, max_steps=5, weight_decay=0.5, adam_beta2=0.9))
    assert [(group["weight_decay"], group["betas"]) for group in groups] == [(0.5, (0.9, 0.9))]


def test_two_runs_do_not_share_a_folder(tmp_path, recordings):
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".lock"),
        pytest.raises(ArgumentError, match="Another run is using output_dir"),
    ):
        run(tiny_arguments(tmp_path, recordings))


def test_metrics_that_cannot_be_written_do_not_end_the_run(tmp_path, recordings, caplog, monkeypatch):
    def append(folder, metrics):
        with open("/dev/full", "a") as file:
            file.write("{}")

    monkeypatch.setattr(loop, "append_metrics", append)
    run(tiny_arguments(tmp_path, recordings, checkpoint_steps=2))
    assert "metrics.jsonl lacks step 4" in caplog.text
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_signal_while_the_last_checkpoint_is_written_loses_nothing(tmp_path, recordings, monkeypatch):
    plain = CheckpointWriter.begin

    def begin(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments, **options)

    monkeypatch.setattr(CheckpointWriter, "begin", begin)
    run(tiny_arguments(tmp_path, recordings, checkpoint_steps=100))
    assert read_checkpoint(find_checkpoints(tmp_path / "out")[0]).step == 4
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_log_interval_cut_by_a_checkpoint_keeps_its_time(tmp_path, recordings):
    options = {"max_steps": 6, "checkpoint_steps": 3, "log_steps": 5, "keep_checkpoints": 9}
    run(tiny_arguments(tmp_path, recordings, **options))
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    before = read_checkpoint(tmp_path / "out" / "checkpoint-3").manifest["progress"]
    assert before["logged_step"] == 1 and before["interval_seconds"] > 0
    (tmp_path / "out" / "finished.json").unlink()
    run(tiny_arguments(tmp_path, recordings, **options))
    line = next(line for line in metrics_of(tmp_path / "out") if line["step"] == 5)
    assert line["seconds"] / line["audio_seconds_per_second"] > before["interval_seconds"]


def test_changed_data_start_a_new_epoch_with_a_warning(tmp_path, recordings, caplog):
    run(tiny_arguments(tmp_path, recordings, max_steps=5, checkpoint_steps=5))
    fewer = tmp_path / "fewer"
    shutil.copytree(recordings, fewer)
    next(iter(sorted(fewer.glob("*.wav")))).unlink()
    run(tiny_arguments(tmp_path, fewer, max_steps=7, checkpoint_steps=5, step_seconds=7.0))
    assert "because the recordings, step_seconds changed since the checkpoint: epoch 2 starts now" in caplog.text


def write_table(folder):
    """Write a table of the recordings in a folder, with their lengths, which spares reading all files."""
    rows = [{"path": name, "num_samples": num_samples} for name, num_samples in FolderSource(folder).utterances]
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "table.jsonl"


OTHER_CONTENT = "1 of 15 recordings that were compared have other content than at the checkpoint, such as 05.wav"


@pytest.mark.parametrize(
    ("is_table", "change", "message"),
    [
        (
            False,
            lambda audio: np.tile(audio, 2),
            "because the recordings changed since the checkpoint: epoch 2 starts",
        ),
        (False, lambda audio: audio / 2, OTHER_CONTENT),
        (True, lambda audio: audio / 2, OTHER_CONTENT),
        (False, None, None),
    ],
    ids=["longer", "other content", "other content in a table", "moved"],
)
def test_a_replaced_recording_is_noticed(tmp_path, recordings, caplog, is_table, change, message):
    folder = shutil.copytree(recordings, tmp_path / "before")
    table, options = write_table(folder), {"max_steps": 5, "checkpoint_steps": 5}
    run(tiny_arguments(tmp_path, table if is_table else folder, **options))
    if change is not None:
        audio, rate = soundfile.read(folder / "05.wav")
        soundfile.write(folder / "05.wav", change(audio), rate)
    else:  # to another place, with other times of the last change
        folder = shutil.copytree(folder, tmp_path / "after", copy_function=shutil.copyfile)
    run(tiny_arguments(tmp_path, table if is_table else folder, **options | {"max_steps": 6}))
    noticed = [text for text in caplog.messages if "since the checkpoint" in text or "other content" in text]
    assert noticed == [] if message is None else any(message in text for text in noticed)


def test_sigusr1_asks_for_a_checkpoint_and_the_run_goes_on(tmp_path, recordings, undisturbed, monkeypatch):
    send_at_load(monkeypatch, signal.SIGUSR1, 13)
    run(tiny_arguments(tmp_path, recordings, **ANCHORED, checkpoint_steps=0))
    (saved,) = find_checkpoints(tmp_path / "out")
    assert 3 <= read_checkpoint(saved).step <= 5
    assert_same_run(tmp_path / "out", undisturbed)


def test_a_second_ctrl_c_stops_at_once(tmp_path, recordings, monkeypatch):
    plain = FolderSource.load

    def load(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return plain(self, *arguments)

    monkeypatch.setattr(FolderSource, "load", load)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_arguments(tmp_path, recordings))
    assert not find_checkpoints(tmp_path / "out")


def test_signal_handlers_are_restored(tmp_path, recordings):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    run(tiny_arguments(tmp_path, recordings, max_steps=1))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


FULL_DISK = """
import logging, resource, sys, threading
from dinosr_hf.pretraining import CheckpointError, find_checkpoints, parse_arguments, run
from dinosr_hf.pretraining.loop import Pretraining
logging.basicConfig(level=logging.INFO)
arguments = parse_arguments([sys.argv[1]], "unused")
train_step = Pretraining._train_step
def train_step_and_fill_the_disk(self, *arguments):
    update = train_step(self, *arguments)
    if self.state.progress.step == 3:  # from here on no file may grow beyond 20 kB, as if the disk were full
        for thread in threading.enumerate():
            if thread.name == "checkpoint":  # that of step 2
                thread.join()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    return update
Pretraining._train_step = train_step_and_fill_the_disk
try:
    run(arguments)
except CheckpointError as error:
    print("refused:", error)
"""


def test_a_full_disk_keeps_the_checkpoint_before_it_and_is_reported(tmp_path, recordings, undisturbed):
    write_config(tmp_path, data=str(recordings), output_dir=str(tmp_path / "out"), **ANCHORED, checkpoint_steps=2)
    done = forks.run(["-c", FULL_DISK, tmp_path / "tiny.yaml"])
    assert done.returncode == 0, done.stderr[-3000:]
    # Without those of steps 4, 6 and 8 the run goes on; that the last one is missing is an error.
    for step in (4, 6, 8):
        assert f"checkpoint-{step} could not be written" in done.stderr
    assert "refused:" in done.stdout and "checkpoint-10 could not be written" in done.stdout
    assert f"The last checkpoint, {tmp_path / 'out' / 'checkpoint-2'}, is unchanged. Free space" in done.stdout
    assert [read_checkpoint(path).step for path in find_checkpoints(tmp_path / "out")] == [2]
    assert [path.name for path in (tmp_path / "out").glob(".*")] in ([], [".lock"])
    run(parse_arguments([str(tmp_path / "tiny.yaml")], "unused"))
    assert_same_run(tmp_path / "out", undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_end_with_the_weights_of_an_undisturbed_run(tmp_path, recordings):
    options = {**ANCHORED, "max_steps": 80, "log_steps": 7}
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    run(tiny_arguments(tmp_path / "whole", recordings, **options, checkpoint_steps=0))
    out = tmp_path / "killed" / "out"
    config = write_config(
        tmp_path / "killed", data=str(recordings), output_dir=str(out), **options, checkpoint_steps=1
    )
    run_through_kills("pretrain", config, out, 20)
    assert_same_run(out, tmp_path / "whole" / "out")


@pytest.mark.slow
def test_resume_with_two_processes_goes_on_from_one(tmp_path, recordings):
    write_config(tmp_path, data=str(recordings), max_steps=6, checkpoint_steps=3, keep_checkpoints=9)
    whole, whole_metrics, _ = launch(tmp_path, "whole", 1)
    (tmp_path / "parts").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "parts" / "checkpoint-3")
    parts, parts_metrics, done = launch(tmp_path, "parts", 2, through_accelerate=True)
    assert "is of 1 process(es), but there are 2 now" in done.stderr
    assert max((whole[name] - parts[name]).abs().max().item() for name in whole) < 1e-4
    assert parts_metrics[-1]["loss"] == pytest.approx(whole_metrics[-1]["loss"], abs=1e-4)


# What torchrun calls, with workers that are forks; one of them is killed as soon as there is a checkpoint.
TORCHRUN = """
import os, signal, sys, threading, time
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from dinosr_hf.commands.pretrain import main
from dinosr_hf.pretraining import find_checkpoints

def die():
    while not find_checkpoints(sys.argv[-1]):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)

def work(words):
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        threading.Thread(target=die, daemon=True).start()
    main(words)

config = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=1, start_method="fork")
elastic_launch(config, work)(sys.argv[1:])
"""


@pytest.mark.slow
def test_torchrun_brings_a_run_back_whose_process_was_killed(tmp_path, recordings):
    options = {**ANCHORED, "feature_encoder": "log_mel", "max_steps": 30}
    write_config(tmp_path, data=str(recordings), **options, checkpoint_steps=5)
    launch(tmp_path, "whole", 2)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    words = [tmp_path / "tiny.yaml", "--output_dir", tmp_path / "killed"]
    done = forks.run(["-c", TORCHRUN, *words], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Resuming from" in done.stderr, done.stderr[-3000:]
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_answers_signals_with_a_checkpoint_and_its_exit_code(tmp_path, recordings, number, code):
    out = tmp_path / "out"
    config = write_config(tmp_path, data=str(recordings), output_dir=str(out), max_steps=100_000, checkpoint_steps=0)
    process = forks.Program([ROOT / "examples" / "pretrain.py", config, "--num_workers", "2"], new_session=True)
    while not (out / "metrics.jsonl").exists():
        assert process.is_running
        time.sleep(0.01)
    os.killpg(process.pid, number)  # as a terminal or Slurm does: to the data loading processes as well
    done = process.wait()
    errors = done.stderr
    assert done.returncode == code, errors[-3000:]
    assert "The same command resumes from there." in errors and "Traceback" not in errors
    assert (
        read_checkpoint(find_checkpoints(out)[0]).step
        == json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    )


def test_folders_without_checkpoints(tmp_path):
    assert find_checkpoints(tmp_path) == []
    with pytest.raises(CheckpointError, match=r"has no checkpoint\.json: it is unfinished, or from another program"):
        read_checkpoint(Path(tmp_path))
