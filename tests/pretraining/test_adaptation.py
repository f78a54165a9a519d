"""Training a model on: heads fitted first, codebooks anew, and an end when the held-out loss no longer falls."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from audio_files import write
from dinosr_hf import DinoSRConfig, DinoSRForPreTraining
from dinosr_hf.pretraining import ArgumentError, best_model, open_data, open_held_out, parse_arguments, run
from dinosr_hf.pretraining.anchor_making import make_anchor
from dinosr_hf.pretraining.base_model import initial_model
from dinosr_hf.pretraining.held_out import HeldOut
from dinosr_hf.pretraining.plan import RunPlan
from dinosr_hf.utils.model_folder import save_folder
from pretraining_runs import SIZES, metrics_of, read_config, tiny_arguments


def changed(before, after):
    """Return the parts of a model whose weights differ."""
    return {name.partition(".")[0] for name, weight in before.items() if not torch.equal(weight, after[name])}


@pytest.mark.parametrize(("max_steps", "learnt"), [(3, {"heads", "codebooks"}), (4, None)])
def test_heads_are_fitted_while_network_and_teacher_stand_still(tmp_path, recordings, base, max_steps, learnt):
    options = {"fit_heads_steps": 3, "max_steps": max_steps, "weight_decay": 0.5, "checkpoint_steps": 0}
    run(tiny_arguments(tmp_path, recordings, base_model=str(base), **options))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert changed(before, after) == (learnt or {"heads", "codebooks", "dinosr", "teacher"})
    assert [line["ema_decay"] for line in metrics_of(tmp_path / "out")[:3]] == [1.0] * 3


@pytest.mark.parametrize("size", [8, 11], ids=["same-size", "other-size"])
def test_heads_and_codebooks_can_start_anew(tmp_path, base, size):
    options = {"new_codebooks": True, "codebook_size": size}
    model = initial_model(tiny_arguments(tmp_path, "synthetic", base_model=str(base), **options))
    before, after = load_file(base / "model.safetensors"), model.state_dict()
    kept = {name: weight for name, weight in before.items() if name.startswith(("dinosr.", "teacher."))}
    assert changed(kept, after) == set()
    assert model.codebooks.sums.shape[1] == size and (model.codebooks.counts == 1).all()
    assert size != 8 or not torch.equal(model.heads[0].weight, before["heads.0.weight"])


@pytest.mark.parametrize(
    ("name", "problem"),
    [("adapt", "fit_heads_steps is for continuing a base_model"), ("small_again", "base_model=runs/small")],
)
def test_a_recipe_for_training_on_needs_a_base_model_and_gives_a_plan(tmp_path, base, name, problem, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=problem):
        read_config(name)
    Path("runs").mkdir()
    Path("runs/small").symlink_to(base)
    flags = ["--base_model", str(base)] if name == "adapt" else []
    arguments = read_config(name, *flags, "--min_seconds", "0.3")
    assert str(RunPlan(arguments, None)) and arguments.model_config().num_codebooks == 2
    assert (arguments.data.eval_share, arguments.run.anchor) == ((0.1, None) if flags else (0, "runs/small"))
    if name == "small_again":
        save_folder(DinoSRForPreTraining(read_config("small").model_config()), tmp_path / "small")
        again = read_config(name, *(word for flag in ("base_model", "anchor") for word in (f"--{flag}", "small")))
        assert again.model_config().num_anchor_labels == 500 and RunPlan(again, None).notes == []
    (tmp_path / "arguments.yaml").write_text(arguments.to_yaml())
    assert parse_arguments([str(tmp_path / "arguments.yaml")], "unused") == arguments


def test_masks_and_dropout_are_the_base_models_unless_they_are_set(tmp_path, base):
    own = {"mask_length": 3, "mask_min_spans": 2, "hidden_dropout": 0.3, "layerdrop": 0.2}
    config = DinoSRConfig.from_pretrained(base)
    config.update(own)
    config.save_pretrained(tmp_path / "base")
    flags = ["--base_model", str(tmp_path / "base"), "--layerdrop", "0", "--output_dir", str(tmp_path / "out")]
    taken = read_config("adapt", *flags).model_config()
    assert {name: getattr(taken, name) for name in own} == own | {"layerdrop": 0.0}
    assert taken.hidden_size == SIZES["hidden_size"]


def test_a_share_of_the_recordings_is_held_out(tmp_path, recordings):
    options = {"eval_share": 0.3, "eval_steps": 1, "max_steps": 2}
    arguments = tiny_arguments(tmp_path, recordings, **options)
    everything, nothing = open_data(tiny_arguments(tmp_path, recordings).data, seed=0)
    training, held_out = open_data(arguments.data, seed=0)
    assert nothing is None and 0 < len(held_out) < len(training)
    assert sorted([*training.utterances, *held_out.utterances]) == sorted(everything.utterances)
    by_id = {utterance.id: index for index, utterance in enumerate(everything.utterances)}
    for source in (training, held_out):
        for index, (name, _) in enumerate(source.utterances):
            np.testing.assert_array_equal(source.load(index, 5, 100), everything.load(by_id[name], 5, 100))
    run(arguments)
    assert [line["step"] for line in metrics_of(tmp_path / "out") if "eval_loss" in line] == [1, 2]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["evaluation"][0]["dataset"] == str(recordings) and record["evaluation"][0]["split"] == "30% held out"
    assert record["data"][0]["utterances"] == len(training)


def test_of_several_data_the_first_is_held_out_from(tmp_path, recordings):
    other = tmp_path / "other"
    shutil.copytree(recordings, other)
    data = tiny_arguments(tmp_path, recordings, data=[str(recordings), str(other)], eval_share=0.3).data
    training, held_out = open_data(data, seed=0)
    first, second = training.sources
    assert {name for name, _ in first.utterances} | {name for name, _ in held_out.utterances} == {
        name for name, _ in second.utterances
    }
    assert len(first) + len(held_out) == len(second)


@pytest.mark.parametrize("is_mixed", [False, True], ids=["alone", "mixed"])
def test_a_bare_name_of_labels_is_not_the_other_part_s(tmp_path, recordings, is_mixed):
    """Two speakers number their recordings alike, and only one of a number is held out."""
    twins, labels = tmp_path / "twins", tmp_path / "labels.jsonl"
    for number in range(6):
        for speaker in ("ann", "bob"):
            write(twins / speaker / f"n{number}.wav", 16_000 + number)
    data = [str(twins), str(recordings)] if is_mixed else str(twins)
    options = {"data": data, "eval_share": 0.4, "anchor": str(labels), "eval_labels": str(labels)}
    labels.write_text(json.dumps({"name": "nobody", "phones": ["A"] * 101}))
    training, held_out = open_data(tiny_arguments(tmp_path, twins, **options).data, seed=0)
    stems = Counter(Path(utterance.id).stem for utterance in held_out.utterances)
    alone = next(stem for stem, count in sorted(stems.items()) if count == 1)
    labels.write_text(json.dumps({"name": alone, "phones": ["A"] * 101}))
    arguments = tiny_arguments(tmp_path, twins, **options)
    message = rf"The labels of '{alone}' fit two recordings, '(twins/)?(ann|bob)/{alone}\.wav' and "
    with pytest.raises(ArgumentError, match=message):
        make_anchor(arguments, training, torch.device("cpu"))
    with pytest.raises(ArgumentError, match=message):
        open_held_out(arguments, held_out)


def test_one_recording_cannot_be_shared(tmp_path, recordings):
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(sorted(recordings.rglob("*.wav"))[0], one)
    arguments = tiny_arguments(tmp_path, one, eval_share=0.3)
    with pytest.raises(ArgumentError, match=r"eval_share: A share of 0\.3 of 1 recordings leaves none to train on"):
        run(arguments)


@pytest.fixture
def losses(monkeypatch):
    """Let the held-out losses be 3, 2, 2.5, 2.6, ..., and return a weight of the models that were evaluated."""
    plain, seen = HeldOut.evaluate, []

    def evaluate(self, model, accelerator=None):
        figures = plain(self, model, accelerator)
        seen.append(model.dinosr.masked_spec_embed.detach().clone())
        return {**figures, "loss": [3.0, 2.0, 2.5, 2.6, 2.7, 2.8][len(seen) - 1]}

    monkeypatch.setattr(HeldOut, "evaluate", evaluate)
    return seen


def patient(tmp_path, recordings, **changes):
    options = {
        "eval_data": str(recordings),
        "eval_steps": 1,
        "eval_patience": 2,
        "checkpoint_steps": 1,
        "max_steps": 6,
    }
    return tiny_arguments(tmp_path, recordings, **{**options, **changes})


def test_a_run_ends_with_the_best_model_when_the_held_out_loss_rises(tmp_path, recordings, losses, caplog):
    caplog.set_level("INFO", logger="dinosr_hf")
    run(patient(tmp_path, recordings))
    assert [line["step"] for line in metrics_of(tmp_path / "out") if "eval_loss" in line] == [1, 2, 3, 4]
    assert "Step 2 had the lowest held-out loss, 2.0000" in caplog.text
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(weights["dinosr.masked_spec_embed"], losses[1])
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["steps"] == 4 and record["evaluation"][0]["loss"] == 2.0
    assert [path.name for path in (tmp_path / "out").glob("best*")] == ["best-2"]
    # The same command finds it over, and changes nothing.
    run(patient(tmp_path, recordings))
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert len(losses) == 4 and all(torch.equal(again[name], weight) for name, weight in weights.items())


def test_a_best_model_that_is_gone_is_told(tmp_path, recordings, losses, monkeypatch, caplog):
    monkeypatch.setattr(best_model, "save_folder", lambda model, path: None)
    run(patient(tmp_path, recordings, max_steps=3, eval_patience=9))
    assert "best-2 is missing: the run ends with the best of the others" in caplog.text
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(weights["dinosr.masked_spec_embed"], losses[2])
    assert json.loads((tmp_path / "out" / "run.json").read_text())["evaluation"][0]["loss"] == 2.5


def test_the_best_model_before_survives_one_that_cannot_be_written(tmp_path, recordings, losses, monkeypatch, caplog):
    def save(model, path):
        if path.name == "best-2":
            raise OSError("No space left on device")
        save_folder(model, path)

    monkeypatch.setattr(best_model, "save_folder", save)
    run(patient(tmp_path, recordings, max_steps=4, eval_patience=9))
    assert "The best model could not be written: No space left on device. The run goes on." in caplog.text
    assert "best-2 is missing: the run ends with the best of the others" in caplog.text
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(weights["dinosr.masked_spec_embed"], losses[2])  # 2.5, after 3.0, before 2.6
    assert [path.name for path in (tmp_path / "out").glob("best*")] == ["best-3"]


def test_the_step_at_which_the_loss_ends_a_run_is_logged(tmp_path, recordings, losses):
    run(patient(tmp_path, recordings, log_steps=3))
    lines = metrics_of(tmp_path / "out")
    assert [line["step"] for line in lines if "loss" in line] == [1, 3, 4]
    assert [line["step"] for line in lines if "eval_loss" in line] == [1, 2, 3, 4]


def test_a_run_that_ends_before_its_patience_takes_the_best_too(tmp_path, recordings, losses):
    run(patient(tmp_path, recordings, max_steps=3, eval_patience=9))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert len(losses) == 3 and torch.equal(weights["dinosr.masked_spec_embed"], losses[1])


def test_a_resumed_run_counts_the_evaluations_before(tmp_path, recordings, losses):
    run(patient(tmp_path, recordings, max_steps=3))
    run(patient(tmp_path, recordings))
    assert len(losses) == 4
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(weights["dinosr.masked_spec_embed"], losses[1])


@pytest.mark.parametrize("is_other_speech", [True, False], ids=["speech", "masks"])
def test_evaluations_of_another_held_out_set_do_not_count(tmp_path, recordings, losses, is_other_speech):
    run(patient(tmp_path, recordings, max_steps=3))
    other = shutil.copytree(recordings, tmp_path / "other", ignore=shutil.ignore_patterns("*.mp3"))
    run(patient(tmp_path, recordings, **({"eval_data": str(other)} if is_other_speech else {"mask_length": 5})))
    assert [line["step"] for line in metrics_of(tmp_path / "out") if "eval_loss" in line] == [1, 2, 3, 4, 5, 6]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(weights["dinosr.masked_spec_embed"], losses[3])  # a loss of 2.6, after one of 2
    assert [path.name for path in (tmp_path / "out").glob("best*")] == ["best-4"]
    run(patient(tmp_path, recordings))  # finished, whatever it is evaluated on
    assert len(losses) == 6


def test_a_run_without_checkpoints_that_its_loss_ended_is_finished(tmp_path, recordings, losses):
    run(patient(tmp_path, recordings, checkpoint_steps=0))
    model = run(patient(tmp_path, recordings, checkpoint_steps=0))
    assert len(losses) == 4 and torch.equal(model.dinosr.masked_spec_embed, losses[1])
    with pytest.raises(ArgumentError, match="has a model already"):
        run(patient(tmp_path, recordings, checkpoint_steps=0, eval_patience=3))


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path):
    accelerator = Accelerator(cpu=True)
    best = best_model.BestModel(tmp_path, 2, accelerator)
    model = DinoSRForPreTraining(DinoSRConfig(**SIZES))
    found = []
    for step, loss in enumerate([np.nan, 3.0, np.nan, 2.0], start=1):
        best.add(step, {"loss": loss}, model)
        found.append(best.step)
    assert found == [1, 2, 2, 4]


def test_the_best_at_a_checkpoint_is_kept_while_the_run_can_go_back_to_it(tmp_path):
    accelerator = Accelerator(cpu=True)
    best = best_model.BestModel(tmp_path, 9, accelerator)
    model = DinoSRForPreTraining(DinoSRConfig(**SIZES))

    def kept():
        return sorted(path.name for path in tmp_path.glob("best-*"))

    best.add(1, {"loss": 3.0}, model)
    best.add(2, {"loss": 2.5}, model)
    assert kept() == ["best-2"]
    (tmp_path / "checkpoint-3").mkdir()
    best.add(4, {"loss": 2.0}, model)
    best.add(5, {"loss": 1.5}, model)
    assert kept() == ["best-2", "best-5"]
    shutil.rmtree(tmp_path / "checkpoint-3")
    best.add(6, {"loss": 1.0}, model)
    assert kept() == ["best-6"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fit_heads_steps": 3}, "fit_heads_steps is for continuing a base_model"),
        ({"new_codebooks": True}, "new_codebooks is for continuing a base_model"),
        ({"eval_patience": 3}, "eval_patience is set, but there is no held-out speech. Give eval_data or eval_share"),
        ({"eval_labels": "phones.jsonl"}, "eval_labels is set, but there is no held-out speech"),
        ({"eval_split": "test"}, "eval_split=test is a split of eval_data, which is not set"),
        ({"eval_share": 1.0}, "eval_share=1.0 is out of range: it must be at least 0 and less than 1"),
        ({"eval_share": 0.1, "streaming": True}, "eval_share holds out recordings, which streaming does not list"),
        ({"eval_patience": -1}, "eval_patience=-1 is out of range: it must be at least 0"),
    ],
)
def test_options_without_effect_are_refused(tmp_path, recordings, changes, message):
    with pytest.raises(ArgumentError, match=message):
        tiny_arguments(tmp_path, recordings, **changes)
