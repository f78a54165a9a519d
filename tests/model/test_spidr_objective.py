"""What `head_input="own_layer"`, `teacher_init`, `attention_init`, `qkv_bias` and their like do at the start."""

import math

import pytest
import torch

from dinosr_hf import DinoSRConfig, DinoSRForCTC, DinoSRForPreTraining
from tiny import tiny_config

SPIDR = {
    "head_input": "own_layer",
    "ema_schedule": "exponential",
    "teacher_init": "random",
    "attention_init": "xavier",
    "qkv_bias": False,
    "freeze_teacher_step": None,
    "freeze_front_end_step": 3,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DinoSRForPreTraining(tiny_config(**SPIDR))


def test_the_teacher_begins_with_attention_and_feed_forward_weights_of_its_own(model):
    student = dict(model.dinosr.encoder.named_parameters())
    for name, parameter in model.teacher.named_parameters():
        is_drawn = (".attention." in name or ".feed_forward." in name) and name.endswith("weight")
        assert torch.equal(parameter, student[name]) is not is_drawn, name
        if is_drawn:
            assert parameter.std().item() == pytest.approx(student[name].std().item(), rel=0.3)


def test_attention_begins_as_one_xavier_matrix():
    model = DinoSRForPreTraining(tiny_config(**SPIDR))
    width = model.config.hidden_size
    for encoder in (model.dinosr.encoder, model.teacher):
        attention = encoder.layers[0].attention
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            assert projection.bias is None
            assert 0.95 < projection.weight.abs().max() / math.sqrt(3 / 4 / width) <= 1
        assert 0.95 < attention.out_proj.weight.abs().max() / math.sqrt(3 / width) <= 1
        assert not attention.out_proj.bias.any()


def test_the_norm_that_no_loss_reads_is_not_trained_unless_an_anchor_reads_it(model):
    def last_norm(model):
        return model.dinosr.encoder.layers[-1].final_layer_norm.weight.requires_grad

    assert not last_norm(model)
    assert last_norm(DinoSRForPreTraining(tiny_config(**SPIDR, num_anchor_labels=4)))
    assert last_norm(DinoSRForPreTraining(tiny_config()))


def test_every_other_parameter_gets_a_gradient(model):
    model.train()
    output = model(torch.randn(2, 6000, generator=torch.Generator().manual_seed(0)))
    output.loss.backward()
    lacking = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad()
    assert lacking == []


def test_heads_read_before_dropout():
    config = tiny_config(**SPIDR, hidden_dropout=0.9, attention_dropout=0.0, layerdrop=0.0)
    model = DinoSRForPreTraining(config).train()
    seen = []
    model.dinosr.encoder.layers[0].feed_forward.register_forward_hook(lambda *args: seen.append(args[-1]))
    got = model.dinosr(torch.randn(1, 6000), feed_forward_layers=[1]).feed_forward_outputs[0]
    assert torch.equal(got, seen[0]) and (got == 0).float().mean() < 0.01


def test_a_frozen_front_end_does_not_move_and_the_teacher_still_does(model):
    model.train()
    for step in (1, 2):
        model.update_targets(step)
        assert all(p.requires_grad for p in model.dinosr.feature_projection.parameters())
    teacher = model.teacher.layer_norm.weight.clone()
    with torch.no_grad():
        model.dinosr.encoder.layer_norm.weight.add_(1.0)
    decay = model.update_targets(3)["ema_decay"]
    assert not any(p.requires_grad for p in model.dinosr.feature_projection.parameters())
    assert decay == pytest.approx(1 - 0.001 * math.exp(-3 / 20_000))
    assert not torch.equal(model.teacher.layer_norm.weight, teacher)


def test_a_saved_model_keeps_the_objective_and_its_encoder_fine_tunes(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = DinoSRForPreTraining.from_pretrained(tmp_path)
    assert {name: getattr(again.config, name) for name in SPIDR} == SPIDR
    for name, parameter in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter), name
    recogniser = DinoSRForCTC.from_pretrained(tmp_path)
    assert all(p.requires_grad for p in recogniser.parameters())
    assert torch.equal(
        recogniser.dinosr.encoder.layers[0].attention.q_proj.weight,
        model.dinosr.encoder.layers[0].attention.q_proj.weight,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_input": "middle"}, r"head_input='middle' is unknown\. Choose one of last_layer, own_layer"),
        ({"ema_schedule": "cosine"}, r"ema_schedule='cosine' is unknown\. Choose one of exponential, linear"),
        ({"teacher_init": "zero"}, r"teacher_init='zero' is unknown\. Choose one of random, student"),
        ({"attention_init": "zero"}, r"attention_init='zero' is unknown\. Choose one of normal, xavier"),
        ({"ema_timescale": 0}, "ema_timescale=0 is out of range: it must be more than 0"),
        ({"ema_threshold": 2}, "ema_threshold=2 is out of range: it must be at least 0 and at most 1"),
        (
            {"freeze_front_end_step": -1},
            "freeze_front_end_step=-1 must be at least 0: the update from which",
        ),
    ],
)
def test_impossible_values_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DinoSRConfig(**change)


@pytest.mark.parametrize("freeze_mode", ["frozen", "shared", "copied"])
@pytest.mark.parametrize("freeze_step", [None, 3, 9])
@pytest.mark.parametrize("end", [0.9, 1.0])
def test_the_linear_schedule_stops_where_the_decay_is_1(freeze_mode, freeze_step, end):
    config = DinoSRConfig(ema_decay=0.5, ema_end_decay=end, ema_anneal_steps=6, freeze_mode=freeze_mode)
    config.freeze_teacher_step = freeze_step
    stops = [step for step in range(1, 20) if config.ema_decay_at(step) == 1]
    assert config.teacher_stop_step == min(stops, default=None)
    assert stops in ([], [*range(min(stops, default=0), 20)])


def test_the_exponential_schedule_stops_at_the_threshold_or_the_freeze():
    config = DinoSRConfig(ema_schedule="exponential", ema_decay=0.7, ema_timescale=2.5, ema_threshold=0.03)
    assert config.teacher_stop_step == 6
    assert config.ema_decay_at(5) == pytest.approx(1 - 0.3 * math.exp(-2)) and config.ema_decay_at(6) == 1
    config.freeze_teacher_step = 4
    assert config.teacher_stop_step == 4 and config.ema_decay_at(4) == 1 and config.ema_decay_at(3) < 1
    config.ema_threshold = 0
    config.freeze_teacher_step = None
    assert config.teacher_stop_step is None and config.ema_decay_at(20) < 1
