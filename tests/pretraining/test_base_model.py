"""The model that pre-training starts from: all of another DinoSR, or its network alone."""

import json
import shutil

import pytest
import torch
import yaml
from transformers import BertConfig

from dinosr_hf import DinoSRConfig, DinoSRForCTC, DinoSRForPreTraining, DinoSRModel
from dinosr_hf.pretraining import ArgumentError, CheckpointError, parse_arguments, run
from dinosr_hf.pretraining.base_model import initial_model
from dinosr_hf.utils.model_folder import save_folder
from pretraining_runs import CONFIGS, SIZES, TINY, launch, metrics_of, tiny_arguments, write_config


def start_from(tmp_path, name, recordings="synthetic", **changes):
    return initial_model(tiny_arguments(tmp_path, recordings, base_model=str(name), **changes))


def is_same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def teacher_is_student(model):
    return all(torch.equal(own, live) for own, live in model.teacher.parameter_pairs(model.dinosr))


def test_a_pretraining_checkpoint_keeps_teacher_heads_and_codebooks(tmp_path, base):
    model = start_from(tmp_path, base)
    assert is_same(model, DinoSRForPreTraining.from_pretrained(base))
    assert not teacher_is_student(model)


@pytest.mark.parametrize("before", [0, 8, 5], ids=["none", "as many", "other"])
@pytest.mark.parametrize("anchor", [None, "mfcc"])
def test_the_anchor_s_head_starts_anew_and_the_rest_stays(tmp_path, base, before, anchor, caplog):
    source = DinoSRForPreTraining(DinoSRConfig(**SIZES, num_anchor_labels=before))
    source.load_state_dict(DinoSRForPreTraining.from_pretrained(base).state_dict(), strict=False)
    save_folder(source, tmp_path / "base")
    with caplog.at_level("INFO", "dinosr_hf"):
        model = start_from(tmp_path, tmp_path / "base", anchor=anchor)
    assert model.config.num_anchor_labels == (8 if anchor else 0)
    assert ("the anchor's head starts anew" in caplog.text) == (anchor is not None or before > 0)
    weights, expected = model.state_dict(), source.state_dict()
    heads = {name: weights.pop(name) for name in list(weights) if name.startswith("anchor_head.")}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
    assert len(heads) == (2 if anchor else 0)
    if heads:
        assert heads["anchor_head.weight"].shape == (8, 16)
        assert before != 8 or not torch.equal(heads["anchor_head.weight"], expected["anchor_head.weight"])


def test_training_options_are_those_of_the_run(tmp_path, base):
    model = start_from(tmp_path, base, codebook_decay=0.7, ema_end_decay=0.995, mask_length=5)
    assert (model.config.codebook_decay, model.config.ema_end_decay, model.config.mask_length) == (0.7, 0.995, 5)


def test_revival_can_start_with_the_new_run(tmp_path, base):
    model = start_from(tmp_path, base, codebook_revival_share=0.1)
    assert torch.equal(model.codebooks.sums, DinoSRForPreTraining.from_pretrained(base).codebooks.sums)
    assert torch.equal(model.codebooks.usage, torch.ones(2, 8))


def test_the_teacher_can_get_a_front_end_of_its_own(tmp_path, base):
    model = start_from(tmp_path, base, freeze_mode="copied")
    before = DinoSRForPreTraining.from_pretrained(base).state_dict()
    after = model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    copies = sorted(after.keys() - before.keys())
    assert copies and all(
        name.startswith(("teacher.feature_extractor.", "teacher.feature_projection.")) for name in copies
    )
    assert all(torch.equal(after[name], after[name.replace("teacher.", "dinosr.")]) for name in copies)


@pytest.mark.parametrize("changes", [{"codebook_size": 6}, {"num_codebooks": 1}])
def test_codebooks_of_other_sizes_start_anew(tmp_path, base, changes):
    model = start_from(tmp_path, base, **changes)
    assert is_same(model.dinosr, DinoSRModel.from_pretrained(base))
    assert teacher_is_student(model)
    assert model.codebooks.sums.shape == (changes.get("num_codebooks", 2), changes.get("codebook_size", 8), 16)
    assert torch.equal(model.codebooks.counts, torch.ones_like(model.codebooks.counts))


@pytest.mark.parametrize("kind", [DinoSRModel, DinoSRForCTC])
def test_other_models_give_only_their_network(tmp_path, base, kind, caplog):
    folder = save_folder(kind.from_pretrained(base), tmp_path / "other")
    with caplog.at_level("INFO", "dinosr_hf"):
        model = start_from(tmp_path, folder)
    assert "it has no codebooks, so teacher, heads and codebooks start anew" in caplog.text
    assert is_same(model.dinosr, DinoSRModel.from_pretrained(base))
    assert teacher_is_student(model)
    assert torch.equal(model.codebooks.counts, torch.ones_like(model.codebooks.counts))


def test_weights_in_half_precision_are_trained_in_float32(tmp_path, base):
    folder = save_folder(DinoSRForPreTraining.from_pretrained(base, dtype=torch.bfloat16), tmp_path / "half")
    assert {weights.dtype for weights in start_from(tmp_path, folder).parameters()} == {torch.float32}


def test_sizes_that_are_not_explicit_are_those_of_the_base(tmp_path, base):
    explicit = {name: value for name, value in TINY.items() if name not in SIZES or name == "mask_length"}
    path = tmp_path / "few.yaml"
    path.write_text(yaml.safe_dump({**explicit, "base_model": str(base)}))
    config = parse_arguments([str(path)], CONFIGS / "tiny_cpu.yaml").model_config()
    base_config = DinoSRConfig.from_pretrained(base)
    assert (config.hidden_size, config.conv_dim, config.num_codebooks) == (16, [8, 8, 8], 2)
    assert config.num_attention_heads == base_config.num_attention_heads
    assert config.layerdrop == base_config.layerdrop == 0.0
    assert config.ema_decay == 0.999  # schedules have the paper's values, as without a base model


@pytest.mark.parametrize("flag", [["--hidden_size", "32"], ["--hidden_size=32"]])
def test_other_sizes_are_refused(tmp_path, base, flag):
    path = write_config(tmp_path, base_model=str(base))
    with pytest.raises(ArgumentError, match=r"hidden_size=32 contradicts base_model=.*, which has hidden_size=16"):
        parse_arguments([str(path), *flag], CONFIGS / "tiny_cpu.yaml")


def test_sizes_of_the_recipe_that_nobody_gave_are_said_to_be_its(base):
    advice = r"It is of tiny_cpu, which applies without a recipe\. Give one without sizes, such as adapt\."
    with pytest.raises(ArgumentError, match=rf"hidden_size=128 contradicts .*, which has hidden_size=16\. {advice}"):
        parse_arguments(["--base_model", str(base)], CONFIGS / "tiny_cpu.yaml")
    with pytest.raises(ArgumentError, match=r"hidden_size=128 contradicts .*\. Leave hidden_size out"):
        parse_arguments([str(CONFIGS / "tiny_cpu.yaml"), "--base_model", str(base)], CONFIGS / "tiny_cpu.yaml")


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"base_model=.*nowhere is neither a folder nor a model on the Hub"):
        start_from(tmp_path, tmp_path / "nowhere")
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ArgumentError, match=r"base_model=.*bert is a bert, not a DinoSR"):
        start_from(tmp_path, tmp_path / "bert")


def test_a_base_without_weights_is_refused(tmp_path, base):
    folder = shutil.copytree(base, tmp_path / "bare")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArgumentError, match=r"base_model=.*bare cannot be opened: .*model\.safetensors"):
        start_from(tmp_path, folder)


def test_a_run_starts_from_a_model_and_resumes_without_it(tmp_path, recordings, base):
    folder = shutil.copytree(base, tmp_path / "base")
    arguments = tiny_arguments(tmp_path, recordings, base_model=str(folder), checkpoint_steps=2)
    run(arguments)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["base_model"] == str(folder)
    first = metrics_of(tmp_path / "out")[0]
    plain = tiny_arguments(tmp_path, recordings, output_dir=str(tmp_path / "plain"), max_steps=1)
    run(plain)
    # it started with the codebooks of its base
    assert first["target_perplexity"] != metrics_of(tmp_path / "plain")[0]["target_perplexity"]
    shutil.rmtree(folder)
    flags = ["--base_model", str(folder), "--output_dir"]
    words = [str(tmp_path / "out" / "arguments.yaml"), "--max_steps", "6"]
    run(parse_arguments([*words, *flags, str(tmp_path / "out")]))
    assert metrics_of(tmp_path / "out")[-1]["step"] == 6
    with pytest.raises(ArgumentError, match=r"base_model=.* is neither a folder nor a model"):  # one that begins
        parse_arguments([*words, *flags, str(tmp_path / "new")])


@pytest.mark.parametrize("max_steps", [2, 3], ids=["finished", "unfinished"])
def test_a_run_keeps_its_base_model(tmp_path, recordings, base, monkeypatch, max_steps):
    options = {"base_model": str(base), "checkpoint_steps": 2}
    run(tiny_arguments(tmp_path, recordings, **options, max_steps=2))
    other = shutil.copytree(base, tmp_path / "other")
    for name, value in {"base_model": str(other), "new_codebooks": True}.items():
        arguments = tiny_arguments(tmp_path, recordings, **{**options, "max_steps": max_steps, name: value})
        with pytest.raises(CheckpointError, match=f"a run that began in another way: {name} is .* and was "):
            run(arguments)
    monkeypatch.chdir(base.parent)
    run(tiny_arguments(tmp_path, recordings, **{**options, "max_steps": 3, "base_model": base.name}))
    assert metrics_of(tmp_path / "out")[-1]["step"] == 3


@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_command_starts_from_a_model(tmp_path, recordings, base, num_processes):
    write_config(tmp_path, data=str(recordings), base_model=str(base), learning_rate=1e-9, max_steps=1)
    weights, _, done = launch(tmp_path, f"out-{num_processes}", num_processes)
    assert f"Starting from {base}, with its teacher, heads and codebooks." in done.stderr
    for name, expected in DinoSRModel.from_pretrained(base).state_dict().items():
        torch.testing.assert_close(weights[f"dinosr.{name}"], expected, atol=1e-7, rtol=0)
