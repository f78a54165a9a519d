"""What of a checkpoint is checked before a run goes on from it: each bit of each file, and that it can be restored."""

import contextlib
import logging
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from dinosr_hf.pretraining import CheckpointError, checkpoint, read_checkpoint, run
from dinosr_hf.pretraining.train_state import check_fits
from dinosr_hf.training.sealed_files import describe_files, read_sealed, seal
from pretraining_runs import ANCHORED, assert_same_run, tiny_arguments

OPTIONS = {**ANCHORED, "max_steps": 4, "checkpoint_steps": 1, "keep_checkpoints": 9}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, recordings):
    """A finished run with a checkpoint of each step."""
    folder = tmp_path_factory.mktemp("finished")
    run(tiny_arguments(folder, recordings, **OPTIONS))
    return folder / "out"


@pytest.fixture
def out(tmp_path, finished):
    """A copy of it that is not marked as finished, so that the same command resumes it."""
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / "finished.json").unlink()
    return tmp_path / "out"


def rewrite_manifest(checkpoint, change):
    """Change the content of checkpoint.json, and write it as the program would."""
    content = read_sealed(checkpoint / "checkpoint.json")
    change(content)
    (checkpoint / "checkpoint.json").write_text(seal(content))


def test_no_flipped_bit_and_no_cut_of_any_file_goes_unnoticed(out):
    checkpoint, chance = out / "checkpoint-4", random.Random(0)
    unchanged = read_checkpoint(checkpoint).manifest
    manifest = checkpoint / "checkpoint.json"
    for file in sorted(checkpoint.iterdir()):
        whole = file.read_bytes()
        num_damages = 400 if file == manifest else 12
        for number in range(num_damages):
            damaged = bytearray(whole)
            place = chance.randrange(len(whole))
            if number % 4:
                damaged[place] ^= 1 << chance.randrange(8)
            else:
                del damaged[place:]
            file.write_bytes(damaged)
            with contextlib.suppress(CheckpointError):
                accepted = read_checkpoint(checkpoint).manifest
                # Such as 1E-06 for 1e-06, which is the same.
                assert file == manifest and accepted == unchanged, (file.name, place)
        file.write_bytes(whole)
    assert read_checkpoint(checkpoint).manifest == unchanged  # negative control


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "a/b", "..", "", "a\0b"])
def test_only_files_of_the_folder_are_listed(out, name):
    rewrite_manifest(
        out / "checkpoint-4", lambda content: content["files"].update({name: content["files"]["config.json"]})
    )
    with pytest.raises(CheckpointError, match="which is not the name of a file"):
        read_checkpoint(out / "checkpoint-4")


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"format": 1}', "[" * 100_000, "\xff", '{"format": 3}'])
def test_a_manifest_of_another_kind_is_refused(out, text):
    (out / "checkpoint-4" / "checkpoint.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"checkpoint-4.checkpoint\.json"):
        read_checkpoint(out / "checkpoint-4")


def test_formats_of_other_versions_are_named(out):
    rewrite_manifest(out / "checkpoint-4", lambda content: content.update(format=99))
    with pytest.raises(CheckpointError, match=r"has format 99, but this version reads format 3\."):
        read_checkpoint(out / "checkpoint-4")


def test_a_folder_of_another_step_is_refused(out):
    (out / "checkpoint-4").rename(out / "checkpoint-40")
    with pytest.raises(CheckpointError, match="is of step 4, but the folder is named checkpoint-40"):
        read_checkpoint(out / "checkpoint-40")
    (out / "checkpoint-40").rename(out / "best")  # any other name says nothing about the step
    assert read_checkpoint(out / "best").step == 4


def test_a_listed_file_that_is_a_link_is_refused(out):
    weights = out / "checkpoint-4" / "model.safetensors"
    weights.rename(out / "elsewhere.safetensors")
    weights.symlink_to(out / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors, which is a link or outside the folder"):
        read_checkpoint(out / "checkpoint-4")


def test_only_listed_weights_are_read(tmp_path, recordings, finished, out, caplog):
    shutil.rmtree(out / "checkpoint-4")
    other = {name: tensor + 1 for name, tensor in load_file(out / "checkpoint-3" / "model.safetensors").items()}
    save_file(other, out / "checkpoint-3" / "other.safetensors")
    run(tiny_arguments(tmp_path, recordings, **OPTIONS))
    assert "other.safetensors is not part of the checkpoint and is ignored" in caplog.text
    assert_same_run(out, finished)


def rewrite_state(checkpoint, name, change):
    """Change a file of tensors, and describe it in the manifest as if it had been written so."""
    state = torch.load(checkpoint / name, weights_only=True)
    change(state)
    torch.save(state, checkpoint / name)
    described = describe_files(checkpoint)
    rewrite_manifest(checkpoint, lambda content: content["files"].update({name: described[name]}))


def state_of(training):
    return next(iter(training["optimizer"]["state"].values()))


def params_of(training):
    return training["optimizer"]["param_groups"][0]["params"]


DAMAGES = {
    "optimizer of other shapes": (
        lambda path: rewrite_state(path, "training_state.pt", lambda s: state_of(s).update(exp_avg=torch.ones(3))),
        r"exp_avg of the optimizer has the shape \(3,\) instead of",
    ),
    "optimizer of fewer weights": (
        lambda path: rewrite_state(path, "training_state.pt", lambda s: params_of(s).pop()),
        "doesn't match the size of optimizer's group",
    ),
    "no optimizer": (
        lambda path: rewrite_state(path, "training_state.pt", lambda s: s.clear()),
        "cannot be restored: KeyError",
    ),
    "processes": (
        lambda path: rewrite_state(path, "process_states.pt", lambda s: s.extend(s)),
        r"process_states\.pt has 2 processes instead of 1",
    ),
    "random state": (
        lambda path: rewrite_state(path, "process_states.pt", lambda s: s[0]["random"].update(torch=torch.zeros(3))),
        "cannot be restored: TypeError",
    ),
    "sums": (
        lambda path: rewrite_state(path, "process_states.pt", lambda s: s[0].update(sums=torch.zeros(3))),
        "The state has 3 sums",
    ),
    "held": (
        lambda path: rewrite_state(path, "process_states.pt", lambda s: s[0].update(held=torch.zeros(3))),
        r"what the codebooks gathered has the shape \(3,\)",
    ),
    "monitor": (
        lambda path: rewrite_manifest(path, lambda content: content["monitor"].update(other=[])),
        "this monitor watches",
    ),
    "architecture": (
        lambda path: rewrite_manifest(path, lambda content: content["architecture"].update(codebook_size=9)),
        "is of another model: codebook_size 9 instead of 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_what_cannot_be_restored_is_named_and_the_checkpoint_before_it_used(
    tmp_path, recordings, finished, out, caplog, name
):
    damage, message = DAMAGES[name]
    arguments = tiny_arguments(tmp_path, recordings, **OPTIONS)
    check_fits(read_checkpoint(out / "checkpoint-4"), arguments, Accelerator())  # negative control
    damage(out / "checkpoint-4")
    with pytest.raises(CheckpointError, match=message):
        check_fits(read_checkpoint(out / "checkpoint-4"), arguments, Accelerator())
    if name in ("optimizer of other shapes", "monitor"):  # the others take the same way
        with caplog.at_level(logging.INFO, "dinosr_hf"):
            run(arguments)
        assert f"Checkpoint refused: {out / 'checkpoint-4'} cannot be restored" in caplog.text
        assert f"Resuming from {out / 'checkpoint-3'}" in caplog.text
        assert_same_run(out, finished)


def test_other_weights_are_refused(tmp_path, recordings, out):
    weights = load_file(out / "checkpoint-4" / "model.safetensors")
    weights.popitem()
    save_file(weights, out / "checkpoint-4" / "model.safetensors")
    described = describe_files(out / "checkpoint-4")["model.safetensors"]
    rewrite_manifest(out / "checkpoint-4", lambda content: content["files"].update({"model.safetensors": described}))
    arguments = tiny_arguments(tmp_path, recordings, **OPTIONS)
    with pytest.raises(CheckpointError, match=r"does not fit the model: .*Missing key"):
        check_fits(read_checkpoint(out / "checkpoint-4"), arguments, Accelerator())


@pytest.mark.parametrize("is_available", [True, False])
def test_random_states_of_every_kind_of_gpu_are_kept(monkeypatch, is_available):
    given = []
    gpu = SimpleNamespace(is_available=lambda: is_available, get_rng_state=lambda: 7, set_rng_state=given.append)
    monkeypatch.setattr(checkpoint, "_GPUS", {"mps": gpu})
    state = checkpoint.random_state()
    assert state.get("mps") == (7 if is_available else None)
    checkpoint.set_random_state({**state, "mps": 7})
    assert given == [7] * is_available
