"""The pre-training command: its arguments, that it learns, and that any grouping of a step gives the same step."""

import json
import math
import os
import re
import shutil
import sys
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoFeatureExtractor, AutoModel
from transformers.trainer_utils import set_seed

import forks
from audio_files import write
from dinosr_hf import DinoSRConfig, DinoSRForPreTraining, DinoSRModel
from dinosr_hf.data import AudioFileError, FolderSource
from dinosr_hf.pretraining import (
    ArgumentError,
    DataArguments,
    Pretraining,
    TrainingStopped,
    find_checkpoints,
    loop,
    parse_arguments,
    read_checkpoint,
    run,
    runner,
    train_state,
)
from dinosr_hf.pretraining.held_out import HeldOut
from dinosr_hf.pretraining.monitor import CollapseMonitor
from dinosr_hf.pretraining.plan import RunPlan
from dinosr_hf.pretraining.pretraining_arguments import GROUPS, ModelArguments, RunArguments
from pretraining_runs import CONFIGS, launch, metrics_of, tiny_arguments, write_config
from scripts import ROOT


def test_flags_take_precedence_over_the_default_file():
    arguments = parse_arguments(["--max_steps", "7", "--codebook_size=32"], CONFIGS / "tiny_cpu.yaml")
    assert (arguments.run.max_steps, arguments.model.codebook_size, arguments.model.hidden_size) == (7, 32, 128)


def test_flags_take_precedence_over_the_file_and_defaults_are_the_paper_s(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("max_steps: 9\nlearning_rate: 1e-3\nconv_bias: true\nfreeze_teacher_step: null\n")
    arguments = parse_arguments(
        [
            *(str(path), "--max_steps", "8", "--conv_stride", "4", "5", "6"),
            *("--conv_dim", "8", "8", "8", "--conv_kernel", "4", "5", "6"),
        ],
        "no such file",
    )
    assert arguments.run.max_steps == 8
    assert arguments.run.learning_rate == 1e-3  # YAML 1.1 reads it as text
    assert arguments.model.conv_bias is True
    assert arguments.model.conv_stride == [4, 5, 6]
    assert arguments.model.freeze_teacher_step is None
    assert (arguments.model.hidden_size, arguments.data.step_seconds) == (768, 3800.0)


def test_the_base_configuration_has_the_values_of_the_paper():
    arguments = parse_arguments([str(CONFIGS / "base_ls960.yaml"), "--data", "somewhere"], "unused")
    model, data, options = arguments.model, arguments.data, arguments.run
    assert (model.hidden_size, model.num_hidden_layers, model.num_codebooks, model.codebook_size) == (768, 12, 8, 256)
    assert (data.step_seconds * 16000, data.micro_seconds * 16000) == (60.8e6, 3.8e6)
    assert (data.min_seconds * 16000, data.max_seconds * 16000, data.batching) == (32000, 320000, "crop")
    assert (options.learning_rate, options.max_steps, options.weight_decay) == (5e-4, 400_000, 0.01)
    assert (options.adam_beta1, options.adam_beta2, options.adam_epsilon) == (0.9, 0.98, 1e-6)
    assert (options.warmup_share, options.hold_share, options.final_lr_scale) == (0.03, 0.47, 0.1)
    assert (options.schedule, options.max_grad_norm, options.scale_to_batch) == ("tri_stage", 0.0, False)
    assert RunPlan(arguments, None).notes == []
    paper = ("learning_rate", "max_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "schedule")
    paper += ("warmup_share", "hold_share", "final_lr_scale", "max_grad_norm", "scale_to_batch")
    assert [getattr(options, name) for name in paper] == [getattr(RunArguments(), name) for name in paper]
    assert arguments.model_config().to_json_string(use_diff=False) == DinoSRConfig().to_json_string(use_diff=False)


def test_the_written_arguments_start_the_same_run(tmp_path, recordings):
    arguments = tiny_arguments(tmp_path, recordings)
    path = tmp_path / "again.yaml"
    path.write_text(arguments.to_yaml())
    assert parse_arguments([str(path)], "unused") == arguments


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("learning_rat: 1", [], "learning_rat is not a known argument. The nearest is learning_rate"),
        ("", ["--codebok_size", "3"], "codebok_size is not a known argument. The nearest is codebook_size"),
        ("", ["stray"], "stray does not belong to any argument"),
        ("max_steps: many", [], "max_steps.*many"),
        ("- a list", [], "must be lines of"),
        ("a: [1", [], "not valid YAML"),
        ("max_steps: 0", [], "max_steps=0 is out of range"),
        ("hold_share: 0.99", [], "hold_share=0.99 is out of range"),
        ("micro_seconds: 1", [], "micro_seconds=1.0 is out of range"),
        ("mixed_precision: int8", [], "mixed_precision=int8"),
        ("batching: none", [], "batching"),
        ("seed: -1", [], "seed=-1 is out of range"),
        ("adam_beta2: 1", [], "adam_beta2=1.0 is out of range"),
        ("num_buckets: 0", [], "num_buckets=0 is out of range"),
        (
            "speed_change: 1.0",
            [],
            r"speed_change=1.0 is out of range: it must be at least 0 and less than 1",
        ),
        ("speed_change: -0.1", [], "speed_change=-0.1 is out of range"),
        ("num_threads: -1", [], "num_threads=-1 is out of range"),
        ("collapse_perplexity: 1", [], r"collapse_perplexity=1.0 is out of range: .* \(no bound\) and less than 1"),
        ("collapse_active: -0.1", [], "collapse_active=-0.1 is out of range"),
        ("collapse_variation: 2", [], "collapse_variation=2.0 is out of range"),
        (
            "codebook_decay: 0.5\ncodebook_end_decay: 0.9",
            [],
            r"codebook_end_decay_step=0 does not fit codebook_end_decay=0\.9: .* Set both, or neither\.",
        ),
        ("codebook_end_decay_step: 9", [], "codebook_end_decay_step=9 does not fit codebook_end_decay=None"),
        ("collapse_patience: 0", [], "collapse_patience=0 is out of range: it must be at least 1"),
        (
            "synthetic_texts: []",
            [],
            r"synthetic_texts=\[\] is out of range: it must be one number, or a minimum and a",
        ),
        ("synthetic_texts: [1, 2, 3]", [], r"synthetic_texts=\[1, 2, 3\] is out of range"),
        ("data_split: train", [], r"data_split=\['train'\] has no effect: data is synthetic\. Leave data_split out\."),
        ("data_config: en", [], r"data_config=\['en'\] has no effect: data is synthetic\."),
        ("streaming: true", [], r"streaming=True has no effect: data is synthetic\. Leave streaming out\."),
        ("eval_split: dev", ["--eval_data", "synthetic"], r"eval_split=dev has no effect: eval_data is synthetic\."),
        ("data: here", ["--data_weights", "-3"], r"data_weights=\[-3.0\] has no effect: data has one value\. Leave"),
    ],
)
def test_wrong_arguments_are_refused_by_name(tmp_path, content, flags, message):
    path = tmp_path / "a.yaml"
    path.write_text(content)
    with pytest.raises(ArgumentError, match=message):
        parse_arguments([str(path), *flags], "unused")


def test_a_decay_that_stays_needs_no_step_of_its_end():
    for step in (0, 200):
        flags = ["--codebook_decay", "0.9", "--codebook_end_decay_step", str(step)]
        model = parse_arguments(flags, CONFIGS / "small.yaml").model
        assert (model.codebook_end_decay, model.codebook_end_decay_step) == (0.9, step)


def test_impossible_models_are_refused():
    with pytest.raises(ArgumentError, match="num_codebooks=9 is more than num_hidden_layers=3"):
        parse_arguments(["--num_codebooks", "9"], CONFIGS / "tiny_cpu.yaml")


def test_help_explains_every_argument(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"], CONFIGS / "tiny_cpu.yaml")
    printed = capsys.readouterr().out
    for group in GROUPS:
        for spec in fields(group):
            assert f"--{spec.name}" in printed and spec.metadata["help"].endswith("."), spec.name
    assert "about 57 % of the frames" in re.sub(r"\s+", " ", printed)


def test_model_arguments_have_types_and_defaults_of_the_configuration():
    kinds = {name: spec.type for name, spec in ModelArguments.__dataclass_fields__.items()}
    assert (kinds["num_codebooks"], kinds["conv_bias"], kinds["codebook_decay"]) == (int, bool, float)
    assert kinds["conv_dim"] == list[int]
    defaults, config = ModelArguments(), DinoSRConfig().to_dict()
    assert asdict(defaults) == {name: config[name] for name in kinds}
    assert defaults.codebook_end_decay is None and defaults.freeze_teacher_step == 200_001


def test_a_missing_file_is_refused():
    with pytest.raises(ArgumentError, match=r"nowhere\.yaml is neither a YAML file nor a recipe"):
        parse_arguments(["nowhere.yaml"], "unused")


def test_a_run_writes_a_model_that_transformers_opens(tmp_path, recordings):
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


@pytest.mark.parametrize("anchor", [None, "mfcc"], ids=["plain", "anchored"])
@pytest.mark.parametrize("batching", ["crop", "pad"])
def test_micro_batches_are_the_same_step_as_one_batch(tmp_path, recordings, batching, anchor):
    options = {"batching": batching, "anchor": anchor}
    whole, whole_metrics = trained(tmp_path, recordings, "whole", **options)
    parts, parts_metrics = trained(tmp_path, recordings, "parts", **options, micro_seconds=2.0)
    assert largest_difference(whole, parts) < 1e-4
    for one, other in zip(whole_metrics, parts_metrics, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["target_perplexity"] == pytest.approx(other["target_perplexity"], abs=1e-5)
        assert one["seconds"] == other["seconds"]
        assert one.get("anchor_losses") == pytest.approx(other.get("anchor_losses"), abs=1e-5)
        assert ("anchor_losses" in one) == (anchor is not None)


def test_another_seed_gives_another_run(tmp_path, recordings):
    # negative control of the test above
    first, _ = trained(tmp_path, recordings, "first")
    second, _ = trained(tmp_path, recordings, "second", seed=1)
    assert largest_difference(first, second) > 1e-3


def test_the_same_seed_gives_the_same_run(tmp_path, recordings):
    options = {"hidden_dropout": 0.1, "layerdrop": 0.3, "anchor": "mfcc"}
    first, _ = trained(tmp_path, recordings, "first", **options, num_workers=0)
    second, _ = trained(tmp_path, recordings, "second", **options, num_workers=2)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradient_checkpointing_and_clipping(tmp_path, recordings):
    plain, _ = trained(tmp_path, recordings, "plain")
    model = run(tiny_arguments(tmp_path, recordings, gradient_checkpointing=True))
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert largest_difference(plain, model.state_dict()) < 1e-5
    clipped, metrics = trained(tmp_path, recordings, "clipped", max_grad_norm=1e-4)
    assert largest_difference(plain, clipped) > 1e-6
    assert all(line["grad_norm"] > 1e-4 for line in metrics)


def test_a_compiled_model_gives_the_same_run(tmp_path, recordings):
    # Each layer takes seconds to trace, and each length.
    small = {"max_steps": 3, "num_hidden_layers": 1, "num_codebooks": 1, "min_seconds": 0.9, "max_seconds": 0.9}
    small |= {"conv_dim": [8], "conv_kernel": [325], "conv_stride": [320], "num_conv_pos_embeddings": 1}
    small |= {"anchor": "mfcc", "anchor_end_weight": 1.0, "anchor_end_step": 2}
    plain, _ = trained(tmp_path, recordings, "plain", **small)
    # Traced and differentiated as for inductor, whose C++ takes minutes.
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    graphs = torch._dynamo.utils.counters
    graphs.clear()
    traced, _ = trained(tmp_path, recordings, "traced", **small, **compiled)
    assert graphs["stats"]["unique_graphs"] > 0
    assert largest_difference(plain, traced) < 1e-5
    with pytest.raises(ArgumentError, match=r"torch_compile_backend=nothing is unknown.*inductor"):
        tiny_arguments(tmp_path, recordings, torch_compile=True, torch_compile_backend="nothing")


def test_bf16_keeps_weights_and_codebooks_in_float32(tmp_path, recordings):
    state, metrics = trained(tmp_path, recordings, "bf16", mixed_precision="bf16")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    AcceleratorState._reset_state(reset_partial_state=True)  # or it stays at bf16
    loss = trained(tmp_path, recordings, "fp32")[1][-1]["loss"]
    assert metrics[-1]["loss"] == pytest.approx(loss, abs=0.05) and metrics[-1]["loss"] != loss


def test_freeze_stops_the_front_end_in_mid_run(tmp_path, recordings):
    state, metrics = trained(tmp_path, recordings, "run", freeze_teacher_step=2, save_steps=2, max_steps=5)
    at_freeze = load_file(tmp_path / "run" / "step-2" / "model.safetensors")
    later = {name for name in state if not torch.equal(state[name], at_freeze[name])}
    assert not any("feature_extractor" in name or "feature_projection" in name for name in later)
    assert not any(name.startswith("teacher.") for name in later)
    assert any(name.startswith("dinosr.encoder") for name in later) and "codebooks.sums" in later
    assert [line["ema_decay"] for line in metrics] == pytest.approx([0.93, 1.0, 1.0, 1.0, 1.0])


def test_a_mask_that_does_not_fit_is_refused(tmp_path, recordings):
    arguments = tiny_arguments(tmp_path, recordings, mask_length=60)
    with pytest.raises(ArgumentError, match=r"mask_length=60 does not fit.*Raise min_seconds to at least 1\.2"):
        run(arguments)


def make_gradients_nan(monkeypatch, is_nan):
    """Make the gradient of the steps for which `is_nan` returns True, by number from 0, NaN."""
    calls = iter(range(10**6))
    plain = loop._accumulate_gradients

    def accumulate(model, *arguments):
        plain(model, *arguments)
        if is_nan(next(calls)):
            next(model.parameters()).grad[0] = float("nan")

    monkeypatch.setattr(loop, "_accumulate_gradients", accumulate)


def test_a_step_without_finite_gradients_is_skipped_and_counted(tmp_path, recordings, monkeypatch):
    steps = []
    plain = loop.Pretraining._train_step

    def train_step(self, *arguments):
        model = self.state.model
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        update = plain(self, *arguments)
        after = model.state_dict()
        changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
        steps.append((update is not None, changed))
        assert model.codebooks._pending is None
        return update

    monkeypatch.setattr(loop.Pretraining, "_train_step", train_step)
    make_gradients_nan(monkeypatch, lambda call: call in (2, 3))
    _, metrics = trained(tmp_path, recordings, "run", max_steps=5)
    assert [is_update for is_update, _ in steps] == [True, True, False, False, True, True, True]
    assert all(bool(changed) == is_update for is_update, changed in steps)
    assert [line["skipped_steps"] for line in metrics] == [0, 0, 2, 2, 2]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in metrics)


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path, recordings, monkeypatch):
    message = r"4 steps in a row had no finite gradient, after step 3\..*Lower learn.*resumes from checkpoint-3\."
    with monkeypatch.context() as patch:
        make_gradients_nan(patch, lambda call: call >= 3)
        with pytest.raises(TrainingStopped, match=message):
            trained(tmp_path, recordings, "run", max_steps=20, max_skipped_steps=4, checkpoint_steps=100)
    saved = DinoSRForPreTraining.from_pretrained(find_checkpoints(tmp_path / "run")[0])
    assert all(torch.isfinite(tensor).all() for tensor in saved.state_dict().values())
    make_gradients_nan(monkeypatch, lambda call: call < 3)  # the first of them do not end the run that resumes
    _, metrics = trained(tmp_path, recordings, "run", max_steps=5, max_skipped_steps=4, checkpoint_steps=100)
    assert [(line["step"], line["skipped_steps"]) for line in metrics[2:]] == [(3, 0), (4, 7), (5, 7)]


def test_targets_that_are_not_finite_make_the_gradient_nan(tmp_path, recordings, monkeypatch):
    plain = DinoSRForPreTraining._targets

    def overflow(self, *arguments):
        targets, energies = plain(self, *arguments)
        return targets, energies * float("inf")

    monkeypatch.setattr(DinoSRForPreTraining, "_targets", overflow)
    with pytest.raises(TrainingStopped, match="2 steps in a row had no finite gradient, after step 0"):
        trained(tmp_path, recordings, "run", max_skipped_steps=2)


def test_unreadable_recordings_are_skipped_counted_and_logged(tmp_path, recordings, monkeypatch, caplog):
    folder = tmp_path / "recordings"
    shutil.copytree(recordings, folder)
    source = FolderSource(folder)
    wav, flac = sorted(folder.glob("*.wav"))[2], sorted(folder.glob("*.flac"))[1]
    wav.unlink()
    flac.write_bytes(flac.read_bytes()[:3000])
    monkeypatch.setattr("dinosr_hf.pretraining.runner.open_source", lambda *_, **__: source)
    _, metrics = trained(tmp_path, recordings, "run", max_steps=9, num_workers=1, min_seconds=0.5)
    assert metrics[-1]["skipped_files"] in (4, 5, 6)  # two in each of three epochs, unless in an incomplete step
    assert f"Skipped {wav.name}: " in caplog.text and f"Skipped {flac.name}: " in caplog.text
    with pytest.raises(TrainingStopped, match=r"of \d+ recordings could not be used.*max_skipped_share=0\.001"):
        trained(tmp_path, recordings, "strict", max_steps=9, max_skipped_share=0.001)


def test_a_run_whose_disk_went_away_resumes_as_if_it_had_not(tmp_path, recordings, monkeypatch):
    options = {"hidden_dropout": 0.1, "max_steps": 6, "checkpoint_steps": 100, "max_skipped_share": 0.001}
    whole, expected = trained(tmp_path, recordings, "whole", **options)
    plain, calls = FolderSource.load, iter(range(10**6))

    def load(self, *arguments):
        if next(calls) >= 15 + 14:  # after a look at all of the fifteen, by which a resumed run knows them
            raise AudioFileError("The disk went away.")
        return plain(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FolderSource, "load", load)
        with pytest.raises(
            TrainingStopped, match=r"could not be used.*manifest again.*The run resumes from checkpoint-\d\."
        ):
            trained(tmp_path, recordings, "run", **options)
    (checkpoint,) = find_checkpoints(tmp_path / "run")
    assert read_checkpoint(checkpoint).manifest["progress"]["skipped_files"] == 0
    parts, metrics = trained(tmp_path, recordings, "run", **options)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert [line["loss"] for line in metrics] == [line["loss"] for line in expected]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("share", "message"),
    [
        (
            0.01,
            r"^1\d of 1\d recordings .* max_skipped_share=0\.01 .* session: 1\d silent\. .* are silent, or raise",
        ),
        (
            1.0,
            r"^1,0\d\d of 1,0\d\d recordings .* one after the other\. .* 1,0\d\d silent\. .* Cut the .* silent\.$",
        ),
    ],
)
def test_a_step_without_readable_recordings_is_no_update(tmp_path, recordings, monkeypatch, share, message):
    def load(self, index, start, num_samples):
        raise AudioFileError("All samples are 0.", "silent")

    with monkeypatch.context() as patch:
        patch.setattr(FolderSource, "load", load)
        with pytest.raises(TrainingStopped, match=message):
            trained(tmp_path, recordings, "run", max_skipped_share=share)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_collapse_is_reported_and_can_stop_the_run(tmp_path, recordings, caplog, monkeypatch):
    monkeypatch.setattr(train_state, "CollapseMonitor", partial(CollapseMonitor, grace_steps=4))

    # All codewords but one are far away, so that each frame falls on that one.
    def collapsed(name, **changes):
        arguments = tiny_arguments(tmp_path, recordings, max_steps=12, collapse_patience=2, **changes)
        arguments.run.output_dir = str(tmp_path / name)
        model = DinoSRForPreTraining(arguments.model_config())
        with torch.no_grad():
            model.codebooks.sums[1, 1:] = 1e6
        Path(arguments.run.output_dir).mkdir()
        return Pretraining(model, FolderSource(recordings), arguments, Accelerator()).run()

    only = {"collapse_perplexity": 0.2, "collapse_active": 0.0, "collapse_variation": 0.0}
    collapsed("warned", **only)
    assert "target perplexity" in caplog.text and "codebook 2 (layer 2)" in caplog.text
    warned = [line for line in metrics_of(tmp_path / "warned") if line.get("warnings")]
    assert len(warned) == 1 and warned[0]["step"] == 6
    resumed = {**only, "collapse_patience": 2, "max_steps": 13, "output_dir": str(tmp_path / "warned")}
    run(tiny_arguments(tmp_path, recordings, **resumed))
    again = [text.split(",")[0] for text in caplog.messages if ", still: the run looks collapsed. The target" in text]
    assert again == ["Step 12", "Step 12", "Step 13"]  # at the end, when resumed, and at the end
    with pytest.raises(TrainingStopped, match=r"The model has collapsed.*codebook 2 \(layer 2\)"):
        collapsed("stopped", **only, stop_on_collapse=True)
    assert metrics_of(tmp_path / "stopped")[-1]["step"] == 6


def test_held_out_speech_is_evaluated_while_training(tmp_path, recordings, caplog):
    _, metrics = trained(tmp_path, recordings, "run", max_steps=5, eval_data=str(recordings), eval_steps=2)
    evaluations = [line for line in metrics if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [2, 4, 5]
    assert f"eval_data={recordings} is trained on, so its figures are too good." in caplog.text
    assert all(0 < line["eval_loss"] < 3 and 1 <= line["eval_target_perplexity"] <= 8 for line in evaluations)


def test_speed_is_that_of_training_alone(tmp_path, recordings, monkeypatch):
    evaluate, clock, taken = HeldOut.evaluate, loop.time.perf_counter, [0.0]

    def slowly(self, *arguments):
        taken[0] += 1_000
        return evaluate(self, *arguments)

    monkeypatch.setattr(HeldOut, "evaluate", slowly)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock() + taken[0])
    held_out = {"eval_data": str(recordings), "eval_steps": 1, "log_steps": 1}
    _, metrics = trained(tmp_path, recordings, "run", max_steps=3, **held_out)
    lines = [line for line in metrics if "audio_seconds_per_second" in line]
    taken = [line["seconds"] / line["audio_seconds_per_second"] for line in lines]
    assert taken[-1] < 1_000 < 2_000 < lines[-1]["elapsed_seconds"]
    assert [line["seconds_left"] for line in lines] == pytest.approx([2 * taken[0], taken[1], 0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("save_folder", r"The model could not be written to .*step-1"),
        ("evaluate", "Step 1 could not be evaluated"),
    ],
)
def test_what_fails_beside_the_training_does_not_end_it(tmp_path, recordings, monkeypatch, caplog, name, message):
    save = loop.save_folder

    def fail(*arguments):
        if name == "evaluate" or Path(arguments[1]).name.startswith("step-"):
            raise ValueError("it is broken")
        save(*arguments)

    monkeypatch.setattr(loop if name == "save_folder" else HeldOut, name, fail)
    options = {"max_steps": 2, "save_steps": 1, "eval_data": str(recordings), "eval_steps": 1}
    assert run(tiny_arguments(tmp_path, recordings, **options)) is not None
    assert re.search(f"{message}.*it is broken", caplog.text)


def test_held_out_speech_of_the_same_dataset_has_its_configuration(tmp_path, recordings, monkeypatch):
    opened = {}

    def open_source(name, **options):
        opened[name] = options.get("config_name")
        return FolderSource(recordings)

    monkeypatch.setattr(runner, "open_source", open_source)
    data = {"data": ["org/one", "org/two"], "data_config": ["en", "de"]}
    for name in ("org/two", "org/other"):
        runner.open_held_out(tiny_arguments(tmp_path, recordings, **data, eval_data=name))
    assert opened == {"org/two": "de", "org/other": None}
    data = {"data": ["org/one", "org/one"], "data_config": ["en", "de"]}
    with pytest.raises(ArgumentError, match=r"eval_data=org/one is among the data with the configurations de, en"):
        runner.open_held_out(tiny_arguments(tmp_path, recordings, **data, eval_data="org/one"))


def test_each_split_that_is_trained_on_is_looked_at(tmp_path, recordings, monkeypatch, caplog):
    monkeypatch.setattr(runner, "open_source", lambda *arguments, **options: FolderSource(recordings))
    data = {"data": ["org/one", "org/one"], "data_split": ["clean", "other"]}
    for split, is_trained in (("other", True), ("test", False)):
        caplog.clear()
        runner.open_held_out(tiny_arguments(tmp_path, recordings, **data, eval_data="org/one", eval_split=split))
        assert ("eval_data=org/one is trained on" in caplog.text) == is_trained


def test_long_recordings_of_which_little_is_used_are_told_of(tmp_path, recordings, caplog):
    write(tmp_path / "long" / "a.wav", 5 * 16_000)
    runner.open_data(tiny_arguments(tmp_path, recordings).data, seed=0)
    assert "An epoch uses" not in caplog.text
    runner.open_data(tiny_arguments(tmp_path, tmp_path / "long").data, seed=0)
    assert "An epoch uses only 40% of the audio: a part of max_seconds=2 of each recording. To use all" in caplog.text


def test_evaluating_does_not_change_the_run(tmp_path, recordings):
    plain, _ = trained(tmp_path, recordings, "plain", hidden_dropout=0.1)
    options = {"hidden_dropout": 0.1, "eval_data": str(recordings), "eval_steps": 1}
    evaluated, _ = trained(tmp_path, recordings, "evaluated", **options)
    assert all(torch.equal(plain[name], evaluated[name]) for name in plain)


def test_a_dry_run_prints_the_plan_draws_it_and_trains_nothing(tmp_path, recordings, capsys):
    options = {"scale_to_batch": True, "reference_step_seconds": 16.0, "anchor": "mfcc"}
    arguments = tiny_arguments(tmp_path, recordings, dry_run=True, **options)
    assert run(arguments) is None
    printed = capsys.readouterr().out
    assert "8 labels from mfcc; weight 2 beside 2 codebooks, 0.5 of it on unmasked frames" in printed
    assert "learning_rate" in printed and "Nothing was trained" in printed
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plan.png"]


def test_a_dry_run_without_matplotlib_prints_the_plan(tmp_path, recordings, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(tiny_arguments(tmp_path, recordings, dry_run=True)) is None
    assert 'The plan is not drawn, as there is no matplotlib (pip install "dinosr-hf[' in capsys.readouterr().out


def test_scaled_arguments_are_written_and_resumed_without_scaling_again(tmp_path, recordings, caplog):
    options = {"scale_to_batch": True, "reference_step_seconds": 16.0, "checkpoint_steps": 2, "max_steps": 2}
    run(tiny_arguments(tmp_path, recordings, **options))
    written = parse_arguments([str(tmp_path / "out" / "arguments.yaml")], "unused")
    assert (written.run.max_steps, written.run.scale_to_batch) == (4, False)
    assert written.run.learning_rate == pytest.approx(1e-3 * 0.5**0.5)
    with caplog.at_level("INFO", "dinosr_hf"):
        run(tiny_arguments(tmp_path, recordings, **options))
    assert "This run is finished" in caplog.text and "other arguments" not in caplog.text


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (["/a/german", "/b/mandarin"], ["german", "mandarin"]),
        (["/a/german/train", "/a/mandarin/train"], ["german/train", "mandarin/train"]),
        (["a/x.jsonl", "y"], ["x.jsonl", "y"]),
    ],
)
def test_several_data_are_named_by_what_differs(data, names):
    assert runner._names(DataArguments(data=data)) == names


@pytest.mark.parametrize("again", ["x/one", "x/one/", "./x/one"])
def test_the_same_data_twice_are_refused(again):
    with pytest.raises(ArgumentError, match=r"data has (x/)?one twice\. Name it once; --data_weights says how often"):
        runner._names(DataArguments(data=["x/one", again]))
    splits = DataArguments(data=["x/one", "x/one"], data_split=["train", "test"])
    assert runner._names(splits) == ["x/one:train", "x/one:test"]


def test_several_data_are_mixed(tmp_path, recordings, caplog):
    one, other = tmp_path / "one", tmp_path / "other"
    for number, path in enumerate(sorted(recordings.iterdir())):
        (one if number % 3 else other).mkdir(exist_ok=True)
        shutil.copy(path, one if number % 3 else other)
    with caplog.at_level("INFO", "dinosr_hf"):
        path = write_config(tmp_path, data=[str(one), str(other)], data_weights=[1, 2], output_dir=str(tmp_path / "o"))
        run(parse_arguments([str(path)], "unused"))
    assert re.search(r"\bone\b.* weight 1:.*\bother\b.* weight 2:", caplog.text, re.DOTALL)
    assert metrics_of(tmp_path / "o")[-1]["step"] == 4


def test_the_number_of_threads_is_that_asked_for_or_all_cores(tmp_path, recordings, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    trained(tmp_path, recordings, "one", max_steps=1)
    assert torch.get_num_threads() == 1
    trained(tmp_path, recordings, "all", max_steps=1, num_threads=0)
    assert torch.get_num_threads() == len(os.sched_getaffinity(0))


def test_a_run_on_a_gpu_has_its_threads_too(tmp_path, recordings, monkeypatch):
    gpu = SimpleNamespace(device=torch.device("cuda"), num_processes=1, distributed_type=DistributedType.NO)
    gpu.mixed_precision, gpu.log_with, gpu.is_main_process = "fp16", [], True
    monkeypatch.setattr(runner, "Accelerator", lambda **options: gpu)
    torch.set_num_threads(2)
    assert runner._make_accelerator(tiny_arguments(tmp_path, recordings, num_threads=1)) is gpu
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere"}, "nowhere does not exist"),
        ({"eval_data": "nowhere"}, "nowhere does not exist"),
        ({"trackers": ["tensorbord"]}, "tensorbord"),
        ({"trackers": ["comet_ml"]}, "trackers=comet_ml is unknown to Accelerate, or not installed"),
        ({"mixed_precision": "fp16"}, "mixed_precision=fp16 needs a GPU"),
        (
            {"min_seconds": 4.0, "max_seconds": 5.0},
            r"No recording is at least min_seconds=4\.0 long \(the longest has 2\.9 s\)\. Lower --min_seconds\.$",
        ),
        (
            {"min_seconds": 2.8, "max_seconds": 5.0, "speed_change": 0.1},
            r"No recording is at least min_seconds=2\.8 long \(the longest has 2\.9 s\) at the highest speed of"
            r" speed_change=0\.1\. Lower --min_seconds or --speed_change\.$",
        ),
        ({"output_dir": "/dev/null/out"}, "output_dir=/dev/null/out cannot be written to"),
    ],
    ids=["data", "held-out data", "unknown tracker", "missing tracker", "fp16 on a CPU", "short", "fast", "folder"],
)
def test_user_errors_are_named(tmp_path, recordings, changes, message):
    path = write_config(tmp_path, **{"data": str(recordings), "output_dir": str(tmp_path / "out"), **changes})
    with pytest.raises(ArgumentError, match=message):
        run(parse_arguments([str(path)], "unused"))


def test_processes_that_are_not_connected_are_refused(tmp_path, recordings, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets it; without a GPU, Accelerate takes no notice
    with pytest.raises(ArgumentError, match=r"2 processes were started, but .* set ACCELERATE_USE_CPU=true\.$"):
        run(tiny_arguments(tmp_path, recordings))
    assert not (tmp_path / "out").exists()


def test_trackers_get_the_metrics(tmp_path, recordings):
    trained(tmp_path, recordings, "run", trackers=["tensorboard"], max_steps=2)
    written = EventAccumulator(str(tmp_path / "run" / "dinosr")).Reload().Scalars("loss")
    assert [event.step for event in written] == [1, 2]
    assert [event.value for event in written] == pytest.approx([line["loss"] for line in metrics_of(tmp_path / "run")])


def test_a_tracker_that_fails_costs_only_its_curves(tmp_path, recordings, monkeypatch, caplog):
    def fail(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    monkeypatch.setattr(TensorBoardTracker, "finish", fail)
    _, metrics = trained(tmp_path, recordings, "run", trackers=["tensorboard"], max_steps=2)
    assert [line["step"] for line in metrics] == [1, 2]
    assert "The trackers lack step 2: no route to host. The run goes on." in caplog.text
    assert "The tracker tensorboard may lack the last steps: ConnectionError: no route to host" in caplog.text


def test_a_tracker_that_does_not_start_costs_only_its_curves(tmp_path, recordings, monkeypatch, caplog):
    def fail(*arguments, **options):
        raise ConnectionError("not logged in")

    monkeypatch.setattr(TensorBoardTracker, "store_init_configuration", fail)
    _, metrics = trained(tmp_path, recordings, "run", trackers=["tensorboard"], max_steps=2)
    assert [line["step"] for line in metrics] == [1, 2]
    assert "No tracker gets the metrics: ConnectionError: not logged in" in caplog.text


EIGHT = {"adam_epsilon": 1e-3, "freeze_teacher_step": 3, "max_steps": 8, "step_seconds": 8.0, "batching": "pad"}
EIGHT["codebook_revival_share"] = 0.5  # from the seventh step on
EIGHT |= {"anchor_end_weight": 0.5, "anchor_end_unmasked_share": 0.1, "anchor_end_step": 5}


@pytest.fixture(scope="module")
def eight_recordings(tmp_path_factory):
    """
    Eight recordings of unequal length, which are one step; their masks have unequal numbers of frames. Labels of four
    lie beside them, so that some micro-batches have none.
    """
    folder = tmp_path_factory.mktemp("eight")
    generator = np.random.default_rng(1)
    for number in range(8):
        audio = generator.standard_normal(int(16000 * (0.65 + 0.08 * number))).cumsum() * 0.002
        soundfile.write(folder / f"{number}.wav", np.clip(audio, -0.9, 0.9), 16000)
    rows = [{"name": name, "phones": list("abcd" * 40)[: 65 + 8 * int(name)]} for name in "1257"]
    (folder / "phones.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def eight(recordings):
    return {**EIGHT, "data": str(recordings), "anchor": str(recordings / "phones.jsonl")}


def assert_same_data(one, other):
    """Check that the steps have the same audio, masks and labels, however they are cut."""
    for name in ("seconds", "masked_frames", "anchor_frames"):
        assert [line[name] for line in one[1]] == [line[name] for line in other[1]], name


def assert_same_steps(one, other, tolerance=1e-5):
    """Compare the metrics of each step, gradient norms among them, and the final weights."""
    names = ("loss", "codebook_losses", "target_perplexities", "prediction_perplexities", "grad_norm", "seconds")
    names += ("anchor_losses", "anchor_accuracies", "anchor_frames")
    for first, second in zip(one[1], other[1], strict=True):
        for name in (*names, "masked_frames", "codebook_active_codewords", "target_variations", "feature_variation"):
            assert first[name] == pytest.approx(second[name], rel=tolerance, abs=tolerance), (first["step"], name)
    assert largest_difference(one[0], other[0]) < tolerance


@pytest.fixture(scope="module")
def batch_of_eight(tmp_path_factory, eight_recordings):
    """Weights and metrics of a run whose steps are one micro-batch of eight utterances."""
    folder = tmp_path_factory.mktemp("eight")
    return trained(folder, eight_recordings, "whole", **eight(eight_recordings), micro_seconds=10.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:All 8 utterances together")
def test_batch_8_and_8_times_1_and_2_processes_of_4_give_the_same_run(
    tmp_path, eight_recordings, batch_of_eight, caplog
):
    caplog.set_level("INFO", "dinosr_hf")
    options = {**eight(eight_recordings), "micro_seconds": 1.25, "max_seconds": 1.25}
    ones = trained(tmp_path, eight_recordings, "ones", **options)
    assert "(8 micro-batches" in caplog.text
    write_config(tmp_path, **eight(eight_recordings))
    two = launch(tmp_path, "two", 2, "--micro_seconds", "5")
    assert "(2 micro-batches" in two[2].stderr and two[2].stdout.count("AutoModel.from_pretrained") == 1
    assert_same_steps(batch_of_eight, ones)
    assert_same_steps(batch_of_eight, two)


@pytest.mark.filterwarnings("ignore:All 8 utterances together")
def test_means_of_means_give_another_run(tmp_path, eight_recordings, batch_of_eight, monkeypatch):
    # negative control of the test above: all micro-batches weigh the same, however many of their frames are masked
    options, whole = eight(eight_recordings), batch_of_eight
    parts = trained(tmp_path, eight_recordings, "parts", **options, micro_seconds=2.0)
    assert_same_steps(whole, parts)
    assert all(0 < min(line["anchor_frames"]) < line["masked_frames"] for line in whole[1])
    plain = loop._accumulate_gradients

    def equal_weights(model, micro_batches, total, *arguments):
        for batch in micro_batches:
            own = loop.FrameCounts.of(batch.inputs)
            plain(model, [batch], loop.FrameCounts(*(len(micro_batches) * count for count in own)), *arguments)

    monkeypatch.setattr(loop, "_accumulate_gradients", equal_weights)
    naive = trained(tmp_path, eight_recordings, "naive", **options, micro_seconds=2.0)
    assert_same_data(whole, naive)
    with pytest.raises(AssertionError):
        assert_same_steps(whole, naive, tolerance=1e-4)


@pytest.mark.filterwarnings("ignore:All 8 utterances together")
@pytest.mark.parametrize("part", ["anchor_masked", "anchor_unmasked"])
def test_anchor_frames_that_are_counted_by_micro_batch_give_another_run(
    tmp_path, eight_recordings, batch_of_eight, monkeypatch, part
):
    options, whole = eight(eight_recordings), batch_of_eight
    plain = loop._accumulate_gradients

    def equal_weights(model, micro_batches, total, *arguments):
        for batch in micro_batches:
            own = getattr(loop.FrameCounts.of(batch.inputs), part)
            plain(model, [batch], total._replace(**{part: own * len(micro_batches)}), *arguments)

    monkeypatch.setattr(loop, "_accumulate_gradients", equal_weights)
    naive = trained(tmp_path, eight_recordings, "naive", **options, micro_seconds=2.0)
    assert_same_data(whole, naive)
    with pytest.raises(AssertionError):
        assert_same_steps(whole, naive, tolerance=1e-4)


@pytest.mark.slow
def test_the_command_names_a_wrong_flag_in_one_line():
    done = forks.run([ROOT / "examples" / "pretrain.py", "--learning_rat", "1"])
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "pretrain.py: learning_rat is not a known argument. The nearest is learning_rate."
    )
