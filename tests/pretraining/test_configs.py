"""Every ready configuration can be parsed, gives a possible model and run, and agrees with its comments."""

import pytest
import yaml

from dinosr_hf import DinoSRConfig
from dinosr_hf.data import SAMPLING_RATE, min_maskable_samples
from dinosr_hf.hub.conversion.spidr import SPIDR_VALUES
from dinosr_hf.pretraining import parse_arguments
from dinosr_hf.pretraining.plan import RunPlan
from dinosr_hf.pretraining.scaling import scale_to_batch
from dinosr_hf.training.schedules import make_schedule
from pretraining_runs import CONFIGS, read_config

NAMES = ("base_ls960", "base_1gpu", "large_ll60k", "multilingual", "small", "spidr_base", "tiny_cpu")
TRAINING_ON = ("adapt", "small_again")  # test_adaptation.py opens these
# For fine-tuning: tests/finetuning opens these.
OTHERS = ("ctc_", "classify_", "superb_")
BASE = DinoSRConfig()


def test_all_configurations_are_tested():
    stems = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert {stem for stem in stems if not stem.startswith(OTHERS)} == {*NAMES, *TRAINING_ON}


@pytest.mark.parametrize("name", NAMES)
def test_configuration_gives_a_plan(name, tmp_path):
    arguments, changes = scale_to_batch(read_config(name))
    plan = RunPlan(arguments, None, changes=changes)
    assert str(plan)
    shortest = int(arguments.data.min_seconds * SAMPLING_RATE)
    assert shortest >= min_maskable_samples(plan.config)
    # The file that the run would write starts the same run.
    path = tmp_path / "arguments.yaml"
    path.write_text(arguments.to_yaml())
    assert parse_arguments([str(path)], "unused") == arguments


@pytest.mark.parametrize("name", [*NAMES, *TRAINING_ON])
def test_numbers_are_numbers_to_yaml(name):
    # YAML 1.1 reads 5e-4 as text: our parser accepts it, other readers of the file would not.
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    text = {key for key, value in content.items() if isinstance(value, str)}
    names = {"data", "batching", "output_dir", "mixed_precision", "schedule", "feature_encoder", "anchor"}
    assert text <= {*names, "base_model", "head_input", "ema_schedule", "teacher_init", "attention_init"}


def test_spidr_has_the_values_of_its_package():
    arguments = read_config("spidr_base")
    config = arguments.model_config()
    assert {name: getattr(config, name) for name in SPIDR_VALUES} == SPIDR_VALUES
    assert (config.qkv_bias, config.layerdrop, config.freeze_front_end_step) == (False, 0, 200_000)
    assert config.ema_decay_at(1) == pytest.approx(0.99900005, abs=1e-9)
    assert config.ema_decay_at(20_000) == pytest.approx(0.99963, abs=1e-5)
    assert config.teacher_stop_step == 184_207
    assert config.ema_decay_at(184_206) < 1 and config.ema_decay_at(184_207) == 1
    rate = make_schedule(arguments.run)
    assert rate(6_000) == pytest.approx(0.01 + 0.99 * 0.5) and rate(200_000) == 1 and rate(400_000) == 0.01


def test_scaling_spidr_keeps_the_audio_at_which_teacher_and_front_end_stop():
    config = scale_to_batch(read_config("spidr_base", "--step_seconds", "475", "--scale_to_batch"))[0].model_config()
    assert config.freeze_front_end_step == 200_000 * 8
    assert config.teacher_stop_step == pytest.approx(184_207 * 8, rel=1e-3)


def test_one_gpu_is_base_with_an_eighth_of_the_batch():
    arguments, changes = scale_to_batch(read_config("base_1gpu"))
    model, run = arguments.model, arguments.run
    assert arguments.data.step_seconds * 8 == run.reference_step_seconds == 3800
    assert changes
    assert (run.max_steps, run.save_steps, run.checkpoint_steps) == (400_000, 50_000, 1000)
    assert model.ema_anneal_steps / run.max_steps == pytest.approx(30_000 / 400_000)
    assert (model.freeze_teacher_step - 1) / run.max_steps == 0.5
    assert run.max_steps * run.warmup_share == 5000 * 8
    sizes = ("hidden_size", "num_hidden_layers", "num_codebooks", "codebook_size", "mask_prob", "mask_length")
    assert [getattr(model, name) for name in sizes] == [getattr(BASE, name) for name in sizes]


def test_one_gpu_can_run_for_the_length_of_the_paper():
    # With the values that the file's comment names, it is the paper's run except for the batch.
    comment = "max_steps 400000 warmup_share 0.03 hold_share 0.47 ema_anneal_steps 30000 freeze_teacher_step 200001"
    words = [*comment.split(), "save_steps", "25000"]
    flags = [f"--{word}" if position % 2 == 0 else word for position, word in enumerate(words)]
    text = (CONFIGS / "base_1gpu.yaml").read_text().replace("\n# ", " ")
    assert all(f"{name} to {value}" in text for name, value in zip(words[::2], words[1::2], strict=True))
    small, paper = read_config("base_1gpu", *flags), read_config("base_ls960")
    assert small.model_config().to_diff_dict() == paper.model_config().to_diff_dict()
    assert (small.run.max_steps, small.run.save_steps) == (paper.run.max_steps, paper.run.save_steps)


def test_large_has_codebooks_for_two_thirds_of_its_layers():
    model = read_config("large_ll60k").model
    assert (model.num_hidden_layers, model.hidden_size, model.num_attention_heads) == (24, 1024, 16)
    assert model.num_codebooks / model.num_hidden_layers == BASE.num_codebooks / BASE.num_hidden_layers


def test_multilingual_mixes_several_data():
    arguments = read_config("multilingual")
    assert len(arguments.data.data) == len(arguments.data.data_weights) == 3
    assert arguments.data.data_temperature == 0.5
    assert arguments.model_config().to_diff_dict() == BASE.to_diff_dict()
