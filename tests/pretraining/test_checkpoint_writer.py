"""Checkpoints are written while training goes on, and hold the state of the step at which they began."""

import threading
import time

import pytest
from safetensors.torch import load_file

from dinosr_hf.pretraining import CheckpointError, checkpoint, find_checkpoints, loop, read_checkpoint, run
from dinosr_hf.pretraining.monitor import CollapseMonitor
from pretraining_runs import ANCHORED, assert_same_run, tiny_arguments

OPTIONS = {**ANCHORED, "checkpoint_steps": 3, "keep_checkpoints": 9}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, recordings):
    folder = tmp_path_factory.mktemp("undisturbed")
    run(tiny_arguments(folder, recordings, **OPTIONS))
    return folder / "out"


@pytest.fixture
def slow_disk(monkeypatch):
    """Hold the first checkpoint back until two more steps are done; return the steps done while it was."""
    plain, train_step = checkpoint._write, loop.Pretraining._train_step
    may_write, steps = threading.Event(), []

    def write(path, *arguments):
        if path.name == "checkpoint-3":
            assert may_write.wait(60)
        plain(path, *arguments)

    def step_and_count(self, *arguments):
        update = train_step(self, *arguments)
        if self.state.writer.step == 3 and not may_write.is_set():
            steps.append(self.state.progress.step)
            if len(steps) == 2:
                may_write.set()
        return update

    monkeypatch.setattr(checkpoint, "_write", write)
    monkeypatch.setattr(loop.Pretraining, "_train_step", step_and_count)
    return steps


def test_training_goes_on_while_a_checkpoint_is_written_and_it_is_of_its_own_step(
    tmp_path, recordings, undisturbed, slow_disk
):
    run(tiny_arguments(tmp_path, recordings, **OPTIONS))
    assert slow_disk == [4, 5]
    assert_same_run(tmp_path / "out", undisturbed)
    saved, wanted = (
        load_file(folder / "checkpoint-3" / "model.safetensors") for folder in (tmp_path / "out", undisturbed)
    )
    assert all(saved[name].equal(tensor) for name, tensor in wanted.items())
    for later in ("checkpoint-10", "checkpoint-9", "checkpoint-6", "finished.json"):
        path = tmp_path / "out" / later
        path.unlink() if path.is_file() else path.rename(tmp_path / later)
    run(tiny_arguments(tmp_path, recordings, **OPTIONS))
    assert_same_run(tmp_path / "out", undisturbed)


def test_without_copies_it_would_be_of_a_later_step(tmp_path, recordings, undisturbed, slow_disk, monkeypatch):
    # negative control
    monkeypatch.setattr(checkpoint, "_copy", lambda state: state)
    run(tiny_arguments(tmp_path, recordings, **OPTIONS))
    saved, wanted = (
        load_file(folder / "checkpoint-3" / "model.safetensors") for folder in (tmp_path / "out", undisturbed)
    )
    assert not all(saved[name].equal(tensor) for name, tensor in wanted.items())


def test_one_that_cannot_be_written_is_reported_and_the_next_one_is(tmp_path, recordings, monkeypatch, caplog):
    plain = checkpoint._write

    def write(path, *arguments):
        if path.name == "checkpoint-3":
            raise OSError(28, "No space left on device")
        plain(path, *arguments)

    monkeypatch.setattr(checkpoint, "_write", write)
    run(tiny_arguments(tmp_path, recordings, **OPTIONS))
    assert (
        "checkpoint-3 could not be written (OSError: [Errno 28] No space left on device). There is no" in caplog.text
    )
    assert [read_checkpoint(path).step for path in find_checkpoints(tmp_path / "out")] == [10, 9, 6]


def test_one_is_copied_only_after_the_one_before_is_written(tmp_path, recordings, monkeypatch):
    plain_write, plain_collect, being_written, found = checkpoint._write, checkpoint._collect, [], []

    def write(path, *arguments):
        being_written.append(path.name)
        time.sleep(0.3)  # much longer than a step
        plain_write(path, *arguments)
        being_written.clear()

    def collect(*arguments):
        found.append(being_written.copy())
        return plain_collect(*arguments)

    monkeypatch.setattr(checkpoint, "_write", write)
    monkeypatch.setattr(checkpoint, "_collect", collect)
    run(tiny_arguments(tmp_path, recordings, max_steps=3, checkpoint_steps=1))
    assert found == [[], [], []]


def test_the_last_one_before_a_collapse_is_kept_while_it_lasts(tmp_path, recordings, monkeypatch):
    def names_after(max_steps):
        run(tiny_arguments(tmp_path, recordings, max_steps=max_steps, checkpoint_steps=1, keep_checkpoints=2))
        return [path.name for path in find_checkpoints(tmp_path / "out")]

    with monkeypatch.context() as patch:
        patch.setattr(CollapseMonitor, "since", 4)
        assert names_after(7) == ["checkpoint-7", "checkpoint-6", "checkpoint-3"]
    assert names_after(8) == ["checkpoint-8", "checkpoint-7"]


def test_a_last_one_that_cannot_be_written_is_an_error(tmp_path, recordings, monkeypatch):
    def write(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", write)
    with pytest.raises(CheckpointError, match=r"checkpoint-10 could not be written .*There is no earlier checkpoint"):
        run(tiny_arguments(tmp_path, recordings, **OPTIONS))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_run_that_fails_completes_the_one_being_written(tmp_path, recordings, slow_disk, monkeypatch):
    counted = loop.Pretraining._train_step

    def fail(self, *arguments):
        update = counted(self, *arguments)
        if len(slow_disk) == 2:
            raise RuntimeError("the device is gone")
        return update

    monkeypatch.setattr(loop.Pretraining, "_train_step", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        run(tiny_arguments(tmp_path, recordings, **OPTIONS))
    assert [read_checkpoint(path).step for path in find_checkpoints(tmp_path / "out")] == [3]
