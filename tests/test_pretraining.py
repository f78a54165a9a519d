"""The pre-training command: what it is told, that it learns, and that however a step is grouped, it is the same."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoModel
from transformers.trainer_utils import set_seed

from dinosr_hf import DinoSRConfig, DinoSRForPreTraining, DinoSRModel
from dinosr_hf.data import FolderSource
from dinosr_hf.pretraining import ArgumentError, parse_arguments, pretrain, run, tri_stage

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "examples" / "configs"

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": [8, 8, 8],
    "conv_kernel": [10, 8, 8],
    "conv_stride": [5, 8, 8],
    "num_conv_pos_embeddings": 2,
    "conv_pos_kernel_size": 3,
    "num_conv_pos_embedding_groups": 2,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "layerdrop": 0.0,
    "num_codebooks": 2,
    "codebook_size": 8,
    "ema_decay": 0.9,
    "ema_end_decay": 0.99,
    "ema_anneal_steps": 3,
    "freeze_teacher_step": None,
    "mask_length": 4,
    "step_seconds": 8.0,
    "micro_seconds": 8.0,
    "min_seconds": 0.3,
    "max_seconds": 2.0,
    "num_buckets": 2,
    "num_workers": 0,
    "num_threads": 1,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "log_steps": 1,
    "save_steps": 0,
}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its precision for the life of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A folder of coloured noise in several formats, rates and channels."""
    folder = tmp_path_factory.mktemp("recordings")
    generator = np.random.default_rng(0)
    for number, (suffix, rate, channels) in enumerate(
        [("wav", 16000, 1), ("flac", 22050, 2), ("ogg", 16000, 1), ("mp3", 44100, 2), ("wav", 8000, 1)] * 3
    ):
        seconds = 0.8 + 0.15 * number
        audio = generator.standard_normal((int(rate * seconds), channels)).cumsum(axis=0) * 0.002
        soundfile.write(folder / f"{number:02d}.{suffix}", np.clip(audio, -0.9, 0.9), rate)
    return folder


def write_config(folder, **changes):
    path = Path(folder) / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return path


def tiny_arguments(tmp_path, recordings, **changes):
    path = write_config(tmp_path, data=str(recordings), output_dir=str(tmp_path / "out"), **changes)
    return parse_arguments([str(path)], CONFIGS / "tiny_cpu.yaml")


def metrics_of(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


# -- arguments


def test_without_a_file_the_default_one_counts_and_flags_go_over_it():
    arguments = parse_arguments(["--max_steps", "7", "--codebook_size=32"], CONFIGS / "tiny_cpu.yaml")
    assert (arguments.run.max_steps, arguments.model.codebook_size, arguments.model.hidden_size) == (7, 32, 128)


def test_flags_go_over_the_file_and_what_neither_has_is_the_paper_s(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("max_steps: 9\nlearning_rate: 1e-3\nconv_bias: true\nfreeze_teacher_step: null\n")
    arguments = parse_arguments(
        [
            str(path),
            "--max_steps",
            "8",
            "--conv_stride",
            "4",
            "5",
            "6",
            "--conv_dim",
            "8",
            "8",
            "8",
            "--conv_kernel",
            "4",
            "5",
            "6",
        ],
        "no such file",
    )
    assert arguments.run.max_steps == 8
    assert arguments.run.learning_rate == 1e-3  # YAML 1.1 reads it as text
    assert arguments.model.conv_bias is True
    assert arguments.model.conv_stride == [4, 5, 6]
    assert arguments.model.freeze_teacher_step is None
    assert (arguments.model.hidden_size, arguments.data.step_seconds) == (768, 3800.0)


def test_base_configuration_is_the_paper_s():
    arguments = parse_arguments([str(CONFIGS / "base_ls960.yaml"), "--data", "somewhere"], "unused")
    model, data, options = arguments.model, arguments.data, arguments.run
    assert (model.hidden_size, model.num_hidden_layers, model.num_codebooks, model.codebook_size) == (768, 12, 8, 256)
    assert (data.step_seconds * 16000, data.micro_seconds * 16000) == (60.8e6, 3.8e6)
    assert (data.min_seconds * 16000, data.max_seconds * 16000, data.batching) == (32000, 320000, "crop")
    assert (options.learning_rate, options.max_steps, options.weight_decay) == (5e-4, 400_000, 0.01)
    assert (options.adam_beta1, options.adam_beta2, options.adam_epsilon) == (0.9, 0.98, 1e-6)
    assert (options.warmup_share, options.hold_share) == (0.03, 0.47)
    assert arguments.model_config().to_json_string(use_diff=False) == DinoSRConfig().to_json_string(use_diff=False)


def test_arguments_written_by_a_run_start_the_same_run(tmp_path, recordings):
    arguments = tiny_arguments(tmp_path, recordings)
    path = tmp_path / "again.yaml"
    path.write_text(arguments.to_yaml())
    assert parse_arguments([str(path)], "unused") == arguments


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("learning_rat: 1", [], "learning_rat is no argument. The nearest is learning_rate"),
        ("", ["--codebok_size", "3"], "codebok_size is no argument. The nearest is codebook_size"),
        ("", ["stray"], "stray belongs to no argument"),
        ("max_steps: many", [], "max_steps.*many"),
        ("- a list", [], "must be lines of"),
        ("a: [1", [], "not valid YAML"),
        ("max_steps: 0", [], "max_steps=0 is out of range"),
        ("hold_share: 0.99", [], "hold_share=0.99 is out of range"),
        ("micro_seconds: 1", [], "micro_seconds=1.0 is out of range"),
        ("mixed_precision: int8", [], "mixed_precision=int8"),
        ("batching: none", [], "batching"),
        ("num_threads: -1", [], "num_threads=-1 is out of range"),
    ],
)
def test_wrong_arguments_are_refused_by_name(tmp_path, content, flags, message):
    path = tmp_path / "a.yaml"
    path.write_text(content)
    with pytest.raises(ArgumentError, match=message):
        parse_arguments([str(path), *flags], "unused")


def test_impossible_models_are_refused():
    with pytest.raises(ValueError, match="num_codebooks=9 is more than num_hidden_layers=3"):
        parse_arguments(["--num_codebooks", "9"], CONFIGS / "tiny_cpu.yaml")


def test_a_missing_file_is_refused():
    with pytest.raises(ArgumentError, match=r"nowhere\.yaml is not a file"):
        parse_arguments(["nowhere.yaml"], "unused")


# -- schedule


def test_tri_stage_rises_holds_and_decays():
    rates = [tri_stage(s, max_steps=100, warmup_share=0.1, hold_share=0.4, final_lr_scale=0.01) for s in range(102)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[5] == pytest.approx(0.505)
    assert set(rates[10:51]) == {1.0}
    assert rates[75] == pytest.approx(0.1)
    assert rates[100] == rates[101] == pytest.approx(0.01)


# -- the loop


def test_a_run_leaves_a_model_that_transformers_opens(tmp_path, recordings):
    arguments = tiny_arguments(tmp_path, recordings, save_steps=2)
    model = run(arguments)
    out = tmp_path / "out"
    assert isinstance(AutoModel.from_pretrained(out), DinoSRModel)
    assert AutoFeatureExtractor.from_pretrained(out).do_normalize
    loaded = DinoSRForPreTraining.from_pretrained(out)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert (out / "step-2" / "model.safetensors").exists()
    assert yaml.safe_load((out / "arguments.yaml").read_text())["codebook_size"] == 8
    lines = metrics_of(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert math.isfinite(line["loss"]) and line["masked_frames"] > 0 and line["seconds"] > 0
        assert line["loss"] == pytest.approx(np.mean(line["codebook_losses"]))
        assert 1 <= line["target_perplexity"] <= 8 and 1 <= line["prediction_perplexity"] <= 8
    with pytest.raises(ArgumentError, match="has a model already"):
        run(arguments)


def test_every_parameter_moves_and_the_loss_falls(tmp_path, recordings):
    arguments = tiny_arguments(tmp_path, recordings, max_steps=30, log_steps=10, learning_rate=5e-3)
    set_seed(arguments.run.seed)
    before = DinoSRForPreTraining(arguments.model_config()).state_dict()
    after = run(arguments).state_dict()
    still = [name for name, tensor in before.items() if torch.equal(tensor, after[name])]
    # the gradient of a key bias is zero in theory, but decay and rounding move it as well
    assert still == []
    losses = [line["loss"] for line in metrics_of(tmp_path / "out")]
    assert losses[-1] < losses[0] - 0.2


def trained(tmp_path, recordings, name, **changes):
    arguments = tiny_arguments(tmp_path, recordings, **changes)
    arguments.run.output_dir = str(tmp_path / name)
    model = run(arguments)
    return model.state_dict(), metrics_of(tmp_path / name)


def largest_difference(first, second):
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize("batching", ["crop", "pad"])
def test_micro_batches_are_the_same_step_as_one_batch(tmp_path, recordings, batching):
    whole, whole_metrics = trained(tmp_path, recordings, "whole", batching=batching)
    parts, parts_metrics = trained(tmp_path, recordings, "parts", batching=batching, micro_seconds=2.0)
    assert largest_difference(whole, parts) < 1e-4
    for one, other in zip(whole_metrics, parts_metrics, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["target_perplexity"] == pytest.approx(other["target_perplexity"], abs=1e-5)
        assert one["seconds"] == other["seconds"]


def test_another_seed_is_another_run(tmp_path, recordings):
    # the negative control of the test above
    first, _ = trained(tmp_path, recordings, "first")
    second, _ = trained(tmp_path, recordings, "second", seed=1)
    assert largest_difference(first, second) > 1e-3


def test_the_same_seed_is_the_same_run(tmp_path, recordings):
    first, _ = trained(tmp_path, recordings, "first", hidden_dropout=0.1, layerdrop=0.3, num_workers=0)
    second, _ = trained(tmp_path, recordings, "second", hidden_dropout=0.1, layerdrop=0.3, num_workers=2)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradient_checkpointing_and_clipping(tmp_path, recordings):
    plain, _ = trained(tmp_path, recordings, "plain")
    checkpointed, _ = trained(tmp_path, recordings, "checkpointed", gradient_checkpointing=True)
    assert largest_difference(plain, checkpointed) < 1e-5
    clipped, metrics = trained(tmp_path, recordings, "clipped", max_grad_norm=1e-4)
    assert largest_difference(plain, clipped) > 1e-6
    assert all(line["grad_norm"] > 1e-4 for line in metrics)


def test_bf16_keeps_weights_and_codebooks_in_float32(tmp_path, recordings):
    state, metrics = trained(tmp_path, recordings, "bf16", mixed_precision="bf16")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert metrics[-1]["loss"] == pytest.approx(trained(tmp_path, recordings, "fp32")[1][-1]["loss"], abs=0.05)


def test_freeze_stops_the_front_end_in_mid_run(tmp_path, recordings):
    state, metrics = trained(tmp_path, recordings, "run", freeze_teacher_step=2, save_steps=2, max_steps=5)
    at_freeze = load_file(tmp_path / "run" / "step-2" / "model.safetensors")
    later = {name for name in state if not torch.equal(state[name], at_freeze[name])}
    assert not any("feature_extractor" in name or "feature_projection" in name for name in later)
    assert not any(name.startswith("teacher.") for name in later)
    assert any(name.startswith("dinosr.encoder") for name in later) and "codebooks.sums" in later
    assert [line["ema_decay"] for line in metrics] == pytest.approx([0.93, 1.0, 1.0, 1.0, 1.0])


def test_a_mask_that_does_not_fit_says_what_to_change(tmp_path, recordings):
    arguments = tiny_arguments(tmp_path, recordings, mask_length=60)
    with pytest.raises(ArgumentError, match=r"mask_length=60 does not fit.*Raise min_seconds to at least 1\.2"):
        run(arguments)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, recordings):
    arguments = tiny_arguments(tmp_path, recordings)
    model = DinoSRForPreTraining(arguments.model_config())
    with torch.no_grad():
        model.heads[0].weight[0, 0] = float("nan")
    Path(arguments.run.output_dir).mkdir()
    with pytest.raises(FloatingPointError, match="Lower learning_rate"):
        pretrain(model, FolderSource(recordings), arguments, Accelerator())


def test_threads_are_those_asked_for_or_all_there_are(tmp_path, recordings):
    before = torch.get_num_threads()
    try:
        trained(tmp_path, recordings, "one", max_steps=1)
        assert torch.get_num_threads() == 1
        trained(tmp_path, recordings, "all", max_steps=1, num_threads=0)
        assert torch.get_num_threads() == os.cpu_count()
    finally:
        torch.set_num_threads(before)


def test_trackers_get_the_metrics(tmp_path, recordings):
    trained(tmp_path, recordings, "run", trackers=["tensorboard"], max_steps=2)
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def launch(tmp_path, name, num_processes, *flags):
    """The real command, through `accelerate launch`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1"]
    command += ["--num_processes", str(num_processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--multi_gpu"] * 0 + ["--main_process_port", str(29500 + os.getpid() % 2000)]
    command += [str(ROOT / "examples" / "pretrain.py"), str(tmp_path / "tiny.yaml")]
    command += ["--output_dir", str(tmp_path / name), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(tmp_path / name / "model.safetensors"), metrics_of(tmp_path / name), done


@pytest.mark.slow
def test_two_processes_are_the_same_run_as_one(tmp_path, recordings):
    write_config(tmp_path, data=str(recordings), freeze_teacher_step=3, max_steps=5)
    one, one_metrics, done = launch(tmp_path, "one", 1)
    assert "AutoModel.from_pretrained" in done.stdout
    two, two_metrics, _ = launch(tmp_path, "two", 2, "--micro_seconds", "3")
    assert largest_difference(one, two) < 1e-4
    for first, second in zip(one_metrics, two_metrics, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)
        assert first["seconds"] == second["seconds"]
        assert first["masked_frames"] == second["masked_frames"]


@pytest.mark.slow
def test_the_command_names_a_wrong_flag_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "pretrain.py"), "--learning_rat", "1"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "pretrain.py: learning_rat is no argument. The nearest is learning_rate."
    )
