"""The configuration: the paper's values, what it refuses, frames of samples, and decays over the steps of a run."""

import re
import time

import pytest
import torch

from dinosr_hf import DinoSRConfig, DinoSRModel
from tiny import tiny_config

AT_LEAST_ONE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "num_conv_pos_embeddings",
    "conv_pos_kernel_size",
    "num_conv_pos_embedding_groups",
    "num_codebooks",
    "codebook_size",
    "mask_length",
    "mask_time_length",
    "mask_feature_length",
    "classifier_proj_size",
    "xvector_output_dim",
)
NOT_NEGATIVE = (
    "initializer_range",
    "codebook_end_decay_step",
    "ema_anneal_steps",
    "freeze_teacher_step",
    "num_anchor_labels",
    "mask_min_spans",
    "mask_time_min_masks",
    "mask_feature_min_masks",
)
SHARES = (
    "hidden_dropout",
    "activation_dropout",
    "attention_dropout",
    "feat_proj_dropout",
    "final_dropout",
    "layerdrop",
    "codebook_decay",
    "codebook_end_decay",
    "ema_decay",
    "ema_end_decay",
    "mask_prob",
    "mask_time_prob",
    "mask_feature_prob",
)


def test_defaults_are_the_base_model_of_the_paper():
    config = DinoSRConfig()
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (12, 768, 12)
    assert config.intermediate_size == 3072
    assert list(config.conv_dim) == [512] * 7
    assert list(config.conv_stride) == [5, 2, 2, 2, 2, 2, 2]
    assert list(config.conv_kernel) == [10, 3, 3, 3, 3, 2, 2]
    assert (config.num_conv_pos_embeddings, config.conv_pos_kernel_size) == (5, 19)
    assert config.num_conv_pos_embedding_groups == 16
    assert (config.hidden_dropout, config.attention_dropout, config.activation_dropout) == (0.1, 0.1, 0.0)
    assert (config.feat_proj_dropout, config.layerdrop) == (0.0, 0.05)
    assert (config.num_codebooks, config.codebook_size, config.codebook_decay) == (8, 256, 0.9)
    assert (config.ema_decay, config.ema_end_decay, config.ema_anneal_steps) == (0.999, 0.9999, 30_000)
    assert (config.freeze_teacher_step, config.freeze_mode) == (200_001, "frozen")
    assert (config.mask_prob, config.mask_length) == (0.8, 10)
    assert config.reference_padding is False
    assert config.inputs_to_logits_ratio == 320


@pytest.mark.parametrize("name", AT_LEAST_ONE)
def test_zero_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name}=0 is out of range.*at least 1"):
        DinoSRConfig(**{name: 0})


@pytest.mark.parametrize("name", NOT_NEGATIVE)
def test_negative_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name}=-1 (is out of range|must be at least 0)"):
        DinoSRConfig(**{name: -1})


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_what_is_no_share_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name}={value} is out of range.*at most 1"):
        DinoSRConfig(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**7}, r"num_hidden_layers=10000000 is out of range.*at most 1000\."),
        ({"hidden_size": 10**9, "num_attention_heads": 1}, r"hidden_size=1000000000 .*at most 65536\."),
        ({"codebook_size": 10**12}, r"codebook_size=1000000000000 .*at most 1000000\."),
        ({"vocab_size": 10**9}, "vocab_size=1000000000 .*at most 1000000"),
        ({"intermediate_size": 10**9}, "intermediate_size=1000000000 .*at most 1000000"),
        ({"num_anchor_labels": 10**9}, "num_anchor_labels=1000000000 .*at most 1000000"),
        ({"num_conv_pos_embeddings": 10**6}, "num_conv_pos_embeddings=1000000 .*at most 100"),
        ({"conv_pos_kernel_size": 10**9}, "conv_pos_kernel_size=1000000000 .*at most 65536"),
        ({"classifier_proj_size": 10**9}, "classifier_proj_size=1000000000 .*at most 65536"),
        ({"xvector_output_dim": 10**9}, "xvector_output_dim=1000000000 .*at most 65536"),
        ({"conv_kernel": [10**9] * 7}, "conv_kernel=.*entry above 65536"),
        ({"tdnn_dim": [10**9] * 5}, "tdnn_dim=.*entry above 65536"),
        ({"mask_length": 10**9}, "mask_length=1000000000 .*at most 100000"),
        ({"mask_time_min_masks": 10**9}, "mask_time_min_masks=1000000000 .*at most 100000"),
        ({"num_labels": 10**9}, "num_labels=1000000000 .*at most 1000000"),
        (
            {"conv_dim": [8] * 10**6, "conv_kernel": [1] * 10**6, "conv_stride": [1] * 10**6},
            "conv_dim has 1,000,000 entries, one a layer: it must have at most 100",
        ),
        ({"tdnn_kernel": (1,) * 10**6}, "tdnn_kernel has 1,000,000 entries"),
        (
            {"hidden_size": 16_384, "num_hidden_layers": 48, "num_attention_heads": 16},
            r"weights, .*at most 20,000,000,000: hidden_size=16384, num",
        ),
        ({"codebook_size": 10**6, "hidden_size": 7_680}, "codebook_size=1000000"),
        ({"layer_norm_eps": float("inf")}, "layer_norm_eps=inf is out of range"),
        ({"initializer_range": float("inf")}, "initializer_range=inf is out of range"),
    ],
)
def test_absurd_sizes_are_refused_at_once(changes, message):
    before = time.process_time()
    with pytest.raises(ValueError, match=message):
        DinoSRConfig(**changes)
    assert time.process_time() - before < 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        {"hidden_size": 1280, "num_hidden_layers": 48, "num_attention_heads": 16, "intermediate_size": 5120},
        {"hidden_size": 1920, "num_hidden_layers": 48, "num_attention_heads": 16, "intermediate_size": 7680},
        {"codebook_size": 65_536, "vocab_size": 250_000, "num_labels": 20_000},
        {"mask_length": 3_000},
    ],
    ids=["base", "large", "XL", "two billion weights", "many classes", "a minute masked"],
)
def test_the_largest_sensible_sizes_are_allowed(changes):
    assert DinoSRConfig(**changes).num_encoder_weights < 3 * 10**9


@pytest.mark.parametrize("front_end", ["conv", "log_mel"])
def test_the_encoder_has_as_many_weights_as_its_configuration_says(front_end):
    config = tiny_config(feature_encoder=front_end)
    matrices = [weight for weight in DinoSRModel(config).parameters() if weight.dim() > 1]
    assert sum(weight.numel() for weight in matrices) == config.num_encoder_weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"layer_norm_eps": 0}, "layer_norm_eps=0 is out of range.*more than 0", id="norm-without-eps"),
        pytest.param({"mask_prob": 0}, "mask_prob=0 is out of range.*more than 0", id="mask-of-nothing"),
        pytest.param(
            {"num_attention_heads": 7},
            "num_attention_heads=7 does not divide hidden_size=768",
            id="heads-not-dividing",
        ),
        pytest.param({"hidden_act": "sigh"}, "hidden_act='sigh' is unknown.*gelu", id="activation"),
        pytest.param(
            {"feature_encoder": "mfcc"},
            "feature_encoder='mfcc' is unknown. Choose one of conv, log_mel",
            id="front-end",
        ),
        pytest.param(
            {"feat_extract_activation": "sigh"}, "feat_extract_activation='sigh' is unknown", id="conv-activation"
        ),
        pytest.param(
            {"conv_dim": [], "conv_stride": [], "conv_kernel": []}, "conv_dim has 0, conv_stride has 0", id="no-convs"
        ),
        pytest.param({"conv_dim": [8, 8]}, "conv_dim has 2, conv_stride has 7, conv_kernel has 7", id="conv-lists"),
        pytest.param({"conv_stride": [5, 2, 2, 2, 2, 2, 0]}, r"conv_stride=.*entry below 1", id="conv-stride-0"),
        pytest.param({"conv_dim": [0] * 7}, r"conv_dim=.*entry below 1", id="conv-dim-0"),
        pytest.param({"conv_kernel": [-1] * 7}, r"conv_kernel=.*entry below 1", id="conv-kernel-negative"),
        pytest.param(
            {"num_codebooks": 13},
            "num_codebooks=13 is more than num_hidden_layers=12",
            id="more-codebooks-than-layers",
        ),
        pytest.param(
            {"codebook_revival_share": 0.6},
            "codebook_revival_share=0.6 is out of range.*at least 0 and at most 0.5",
            id="revival-of-what-is-in-use",
        ),
        pytest.param(
            {"freeze_mode": "cold"}, "freeze_mode='cold' is unknown.*copied, frozen, shared", id="freeze-mode"
        ),
        pytest.param(
            {"mask_feature_prob": 0.1, "mask_feature_length": 769},
            "mask_feature_length=769 is longer than hidden_size=768",
            id="mask-longer-than-channels",
        ),
        pytest.param(
            {"ctc_loss_reduction": "none"}, "ctc_loss_reduction='none' is unknown.*mean, sum", id="ctc-reduction"
        ),
        pytest.param({"tdnn_dim": [4]}, "tdnn_dim has 1, tdnn_kernel has 5", id="tdnn-lists"),
        pytest.param({"tdnn_dilation": [1, 0, 1, 1, 1]}, "tdnn_dilation=.*entry below 1", id="tdnn-dilation-0"),
    ],
)
def test_impossible_combinations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DinoSRConfig(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"freeze_teacher_step": 10, "ema_anneal_steps": 100}, id="freeze-before-end-of-annealing"),
        pytest.param({"freeze_teacher_step": 0}, id="frozen-from-the-start"),
        pytest.param({"codebook_decay": 1}, id="codebooks-that-stand-still"),
        pytest.param({"ema_decay": 0.9999, "ema_end_decay": 0.99}, id="end-below-start"),
        pytest.param({"mask_feature_length": 10_000}, id="long-mask-that-is-off"),
        pytest.param({"num_codebooks": 12}, id="a-codebook-every-layer"),
    ],
)
def test_unusual_combinations_are_allowed(changes):
    config = DinoSRConfig(**changes)
    assert all(getattr(config, name) == value for name, value in changes.items())


def test_groups_that_do_not_divide_are_refused_where_the_model_is_built():
    config = tiny_config(num_conv_pos_embedding_groups=5)
    with pytest.raises(ValueError, match="num_conv_pos_embedding_groups=5 does not divide hidden_size=36"):
        DinoSRModel(config)


@pytest.mark.parametrize(
    ("num_samples", "num_frames"),
    [(0, 0), (1, 0), (399, 0), (400, 1), (719, 1), (720, 2), (16_000, 49), (250_000, 781)],
)
def test_frames_of_samples(num_samples, num_frames):
    config = DinoSRConfig()
    assert config.num_frames(num_samples) == num_frames
    assert isinstance(config.num_frames(num_samples), int)
    tensor = config.num_frames(torch.tensor([[num_samples]]))
    assert torch.equal(tensor, torch.tensor([[num_frames]]))


def test_frames_are_those_that_the_convolutions_make():
    config = tiny_config()
    model = DinoSRModel(config).eval()
    for num_samples in range(40, 90):
        assert model(torch.randn(1, num_samples)).last_hidden_state.shape[1] == config.num_frames(num_samples)


def test_codebook_decay_is_constant_by_default():
    config = DinoSRConfig(codebook_decay=0.7)
    assert [config.codebook_decay_at(step) for step in (0, 1, 10**6)] == [0.7, 0.7, 0.7]


def test_codebook_decay_is_annealed_linearly():
    config = DinoSRConfig(codebook_decay=0.8, codebook_end_decay=1.0, codebook_end_decay_step=4)
    decays = [config.codebook_decay_at(step) for step in range(6)]
    assert decays == pytest.approx([0.8, 0.85, 0.9, 0.95, 1.0, 1.0])


def test_codebook_decay_without_steps_is_the_end_at_once():
    config = DinoSRConfig(codebook_decay=0.8, codebook_end_decay=0.9)
    assert config.codebook_decay_at(0) == 0.9


# Decays at the steps 0 to 6, worked out by hand: 0.6 to 0.8 over four steps, and towards 1 where the freeze says so.
@pytest.mark.parametrize(
    ("freeze_mode", "freeze_step", "decays"),
    [
        ("frozen", None, [0.6, 0.65, 0.7, 0.75, 0.8, 0.8, 0.8]),
        ("frozen", 5, [0.6, 0.65, 0.7, 0.75, 0.8, 1.0, 1.0]),
        ("shared", 5, [0.6, 0.65, 0.7, 0.75, 0.8, 1.0, 1.0]),
        ("copied", 5, [0.6, 0.65, 0.7, 0.75, 0.8, 1.0, 1.0]),
        ("frozen", 2, [0.6, 0.65, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("shared", 2, [0.6, 0.65, 0.8, 0.9, 1.0, 1.0, 1.0]),
        ("copied", 2, [0.6, 0.65, 0.8, 0.9, 1.0, 1.0, 1.0]),
    ],
)
def test_teacher_decay(freeze_mode, freeze_step, decays):
    config = DinoSRConfig(
        ema_decay=0.6,
        ema_end_decay=0.8,
        ema_anneal_steps=4,
        freeze_mode=freeze_mode,
        freeze_teacher_step=freeze_step,
    )
    assert [config.ema_decay_at(step) for step in range(7)] == pytest.approx(decays)
    frozen = [freeze_step is not None and step >= freeze_step for step in range(7)]
    assert [config.is_freeze_reached_at(step) for step in range(7)] == frozen


def test_round_trip_through_json(tmp_path):
    config = tiny_config(freeze_teacher_step=None, codebook_end_decay=0.95, freeze_mode="copied", layerdrop=0)
    config.save_pretrained(tmp_path)
    again = DinoSRConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.freeze_teacher_step is None
    assert "freeze_teacher_step" in (tmp_path / "config.json").read_text()
    other = DinoSRConfig.from_pretrained(tmp_path, hidden_size=72)
    assert other.to_dict() != config.to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_encoder": "logmel"}, "feature_encoder='logmel' is unknown. Choose one of conv, log_mel"),
        (
            {"mask_feature_length": 40, "mask_feature_prob": 0.1},
            "mask_feature_length=40 is longer than hidden_size=36",
        ),
    ],
    ids=["front-end", "mask"],
)
def test_impossible_overrides_of_a_saved_model_are_refused(tmp_path, changes, message):
    DinoSRModel(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        DinoSRModel.from_pretrained(tmp_path, **changes)
    model = DinoSRModel.from_pretrained(tmp_path, mask_feature_length=36, mask_feature_prob=0.1)
    assert model.config.mask_feature_length == 36


def test_a_file_with_an_impossible_value_is_refused(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(re.sub('"num_codebooks": 2', '"num_codebooks": 4', file.read_text()))
    with pytest.raises(ValueError, match="num_codebooks=4 is more than num_hidden_layers=3"):
        DinoSRConfig.from_pretrained(tmp_path)
