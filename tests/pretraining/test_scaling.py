"""`scale_to_batch`: values for an eighth of the batch by hand, what they keep, and that nothing is scaled twice."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from dinosr_hf.pretraining import ArgumentError, parse_arguments
from dinosr_hf.pretraining.scaling import Change, changes_table, format_value, scale_to_batch
from dinosr_hf.training.schedules import tri_stage
from pretraining_runs import CONFIGS, read_config


def base(*flags):
    return read_config("base_ls960", "--scale_to_batch", *flags)


def eighth(*flags):
    return scale_to_batch(base("--step_seconds", "475", *flags))


def values(arguments):
    return asdict(arguments.model) | asdict(arguments.data) | asdict(arguments.run)


# Computed by hand from the rules in the module's docstring.
EIGHTH = {
    "max_steps": 3_200_000,
    "learning_rate": 1.767767e-4,
    "adam_beta1": 0.9869162,
    "adam_beta2": 0.9974779,
    "adam_epsilon": 2.828427e-6,
    "weight_decay": 3.535534e-3,
    "save_steps": 200_000,
    "eval_steps": 40_000,
    "codebook_update_steps": 8,
    "ema_decay": 0.99987495,
    "ema_end_decay": 0.999987499,
    "ema_anneal_steps": 240_000,
    "freeze_teacher_step": 1_600_001,
}


def test_values_for_an_eighth_of_the_batch():
    scaled, changes = eighth()
    before, after = values(base("--step_seconds", "475")), values(scaled)
    changed = {name: after[name] for name in after if after[name] != before[name]}
    assert changed.pop("scale_to_batch") is False
    assert changed == pytest.approx(EIGHTH, rel=1e-6)
    assert {change.name: (change.before, change.after) for change in changes} == {
        name: (before[name], after[name]) for name in EIGHTH
    }
    assert all(change.why for change in changes)


def test_whole_numbers_stay_whole():
    scaled, _ = scale_to_batch(base("--step_seconds", "1234.5"))
    before = values(base())
    for name, value in values(scaled).items():
        assert isinstance(value, int) == isinstance(before[name], int), name


def test_clipping_and_codebook_annealing_are_scaled_if_used():
    flags = ("--max_grad_norm", "2", "--codebook_decay", "0.5", "--codebook_end_decay", "0.9")
    scaled, changes = eighth(*flags, "--codebook_end_decay_step", "200")
    assert scaled.run.max_grad_norm == pytest.approx(2 * math.sqrt(8))
    assert (scaled.model.codebook_decay, scaled.model.codebook_end_decay) == (0.5, 0.9)
    assert (scaled.model.codebook_end_decay_step, scaled.model.codebook_update_steps) == (1600, 8)
    names = {change.name for change in changes}
    assert {"max_grad_norm", "codebook_update_steps", "codebook_end_decay_step"} <= names
    # The n-th update of the codebooks has the decay it had: 8 n updates of the weights are as much audio as n were.
    config, before = scaled.model_config(), base(*flags, "--codebook_end_decay_step", "200").model_config()
    for number in (1, 2, 100, 201):
        assert config.codebook_decay_at(8 * number - 8) == pytest.approx(before.codebook_decay_at(number - 1))


@pytest.mark.parametrize(("seconds", "num_steps"), [(2500, 2), (3000, 1), (7600, 1), (1000, 4)])
def test_codebooks_remember_the_same_audio_if_the_ratio_is_not_whole(seconds, num_steps):
    scaled, _ = scale_to_batch(base("--step_seconds", str(seconds)))
    assert scaled.model.codebook_update_steps == num_steps
    kept_a_second = scaled.model.codebook_decay ** (1 / (num_steps * seconds))
    assert kept_a_second == pytest.approx(0.9 ** (1 / 3800))


def test_options_that_are_off_stay_off():
    scaled, changes = eighth("--save_steps", "0", "--freeze_teacher_step", "0", "--max_grad_norm", "0")
    assert (scaled.run.save_steps, scaled.model.freeze_teacher_step, scaled.run.max_grad_norm) == (0, 0, 0)
    scaled.model.freeze_teacher_step = None
    assert scaled.model.codebook_end_decay is None
    assert not {"save_steps", "freeze_teacher_step", "max_grad_norm"} & {change.name for change in changes}
    tiny, _ = scale_to_batch(
        parse_arguments(["--scale_to_batch", "--reference_step_seconds", "320"], CONFIGS / "tiny_cpu.yaml")
    )
    assert tiny.model.freeze_teacher_step is None


def test_options_that_concern_the_machine_stay():
    before, after = values(base("--step_seconds", "475")), values(eighth()[0])
    for name in ("log_steps", "checkpoint_steps", "keep_checkpoints", "warmup_share", "hold_share", "final_lr_scale"):
        assert after[name] == before[name]


@pytest.mark.parametrize("moves", [1, 7, 200_000])
def test_the_last_move_of_the_teacher_is_at_the_same_audio(moves):
    before = base("--step_seconds", "475", "--freeze_teacher_step", str(moves + 1))
    after, _ = scale_to_batch(before)
    paper, small = before.model_config(), after.model_config()
    assert not paper.is_freeze_reached_at(moves) and paper.is_freeze_reached_at(moves + 1)
    assert not small.is_freeze_reached_at(8 * moves) and small.is_freeze_reached_at(8 * moves + 1)


def test_schedule_and_annealing_are_the_same_over_audio():
    before = base("--step_seconds", "475")
    after, _ = scale_to_batch(before)
    shares = ("warmup_share", "hold_share", "final_lr_scale")
    paper, small = before.model_config(), after.model_config()
    for step in (0, 6_000, 12_000, 29_000, 150_000, 199_999, 300_000, 400_000):
        factors = [
            tri_stage(n, max_steps=a.run.max_steps, **{name: getattr(a.run, name) for name in shares})
            for n, a in ((step, before), (8 * step, after))
        ]
        assert factors[0] == pytest.approx(factors[1], rel=1e-6)
        # Only about the same: annealing is linear in the decay, and a power of a line is not a line.
        assert math.log(small.ema_decay_at(8 * step)) * 8 == pytest.approx(
            math.log(paper.ema_decay_at(step)), rel=0.01
        )


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.98, 0.999])
def test_an_average_keeps_its_memory_and_its_noise(decay):
    """Compare the impulse response after a reference step, and the variance for noise that is eight times as large."""
    kappa = 1 / 8
    scaled = decay**kappa
    assert scaled**8 == pytest.approx(decay)

    def variance(d, noise):
        return noise * (1 - d) / (1 + d)

    kept, linear = variance(scaled, 8.0), variance(1 - kappa * (1 - decay), 8.0)
    target = variance(decay, 1.0)
    assert kept == pytest.approx(target, rel=0.05)
    assert abs(kept - target) < abs(linear - target)  # 1 - kappa (1 - d), the other way to write the rule


def adam_walk(arguments, num_steps, noise, generator):
    """Return mean and deviation of weights that AdamW trains on gradients that are noise around a small slope."""
    run = arguments.run
    weights = torch.nn.Parameter(torch.full((4000,), 0.5))
    betas = (run.adam_beta1, run.adam_beta2)
    optimizer = torch.optim.AdamW([weights], run.learning_rate, betas, run.adam_epsilon, run.weight_decay)
    for _ in range(num_steps):
        weights.grad = 0.05 + noise * torch.randn(weights.shape, generator=generator)
        optimizer.step()
    return weights.detach().mean().item(), weights.detach().std().item()


def test_adam_gets_as_far_and_is_as_noisy_with_the_same_audio():
    before = base("--step_seconds", "475")
    after, _ = scale_to_batch(before)
    generator = torch.Generator().manual_seed(0)
    mean, spread = adam_walk(before, 300, 1.0, generator)
    # The gradient of an eighth of the audio is noisier by sqrt(8).
    small_mean, small_spread = adam_walk(after, 2400, math.sqrt(8), generator)
    assert small_mean == pytest.approx(mean, rel=0.003)
    assert small_spread == pytest.approx(spread, rel=0.05)
    unscaled_mean, unscaled_spread = adam_walk(before, 2400, math.sqrt(8), generator)
    assert abs(unscaled_mean - mean) > 10 * abs(small_mean - mean)
    assert unscaled_spread > 2 * spread


def test_without_the_option_nothing_changes():
    arguments = read_config("base_ls960", "--step_seconds", "475")
    assert scale_to_batch(arguments) == (arguments, [])


def test_the_reference_batch_changes_nothing():
    scaled, changes = scale_to_batch(base())
    assert changes == []
    assert values(scaled) == values(base()) | {"scale_to_batch": False}


def test_scaled_arguments_are_not_scaled_again(tmp_path):
    scaled, _ = eighth()
    path = tmp_path / "arguments.yaml"
    path.write_text(scaled.to_yaml())
    again = parse_arguments([str(path)], "unused")
    assert again == scaled
    assert scale_to_batch(again) == (scaled, [])


def test_the_given_arguments_are_not_modified():
    arguments = base("--step_seconds", "475")
    before = values(arguments)
    scale_to_batch(arguments)
    assert values(arguments) == before


def test_scaling_back_restores_the_values():
    scaled, _ = eighth()
    scaled.run.scale_to_batch, scaled.run.reference_step_seconds, scaled.data.step_seconds = True, 475.0, 3800.0
    back, _ = scale_to_batch(scaled)
    # Decays close to 1 lose a few digits.
    expected = values(base()) | {"scale_to_batch": False, "reference_step_seconds": 475.0}
    numbers = {name for name, value in expected.items() if isinstance(value, float)}
    assert {n: values(back)[n] for n in numbers} == pytest.approx({n: expected[n] for n in numbers}, rel=1e-9)
    assert {n: v for n, v in values(back).items() if n not in numbers} == {
        n: v for n, v in expected.items() if n not in numbers
    }


@pytest.mark.parametrize("step_seconds", [20, 60, 20_000, 380_000])
def test_any_batch_gives_a_run(step_seconds):
    # With 1 - kappa (1 - d), a beta of 0.9 would be negative at more than ten times the reference.
    scaled, _ = scale_to_batch(base("--step_seconds", str(step_seconds), "--window_seconds", "380000"))
    scaled.model_config()
    for name in ("adam_beta1", "adam_beta2"):
        assert 0 < getattr(scaled.run, name) < 1
    assert scaled.run.max_steps >= 1


@pytest.mark.parametrize(("seconds", "value"), [("reference_step_seconds", 0.0), ("step_seconds", float("nan"))])
def test_impossible_batches_are_refused(seconds, value):
    arguments = base()
    owner = arguments.run if hasattr(arguments.run, seconds) else arguments.data
    setattr(owner, seconds, value)
    with pytest.raises(ArgumentError, match=f"{seconds}={value} is out of range: scale_to_batch needs more than 0"):
        scale_to_batch(arguments)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3_200_000, "3,200,000"),
        (10.0, "10"),
        (0.9, "0.9"),
        (0.98691623, "0.9869"),
        (0.999987499, "0.9999875"),
        (1.767767e-4, "0.0001768"),
        (2.828427e-6, "2.828e-06"),
        (0, "0"),
        (1.0, "1"),
    ],
)
def test_format_value(value, expected):
    assert format_value(value) == expected


@pytest.mark.parametrize("decay", np.linspace(0.5, 0.99999, 50))
def test_decays_keep_three_digits_of_their_distance_to_one(decay):
    assert 1 - float(format_value(decay)) == pytest.approx(1 - decay, rel=0.01)


def test_changes_table():
    changes = [Change("learning_rate", 5e-4, 1.25e-4, "rule one"), Change("max_steps", 10, 80, "rule two")]
    assert changes_table(base("--step_seconds", "475"), changes).splitlines() == [
        "scale_to_batch: a step is 0.125 (kappa) times the reference step.",
        "  learning_rate  0.0005 -> 0.000125  rule one",
        "  max_steps          10 ->       80  rule two",
    ]
