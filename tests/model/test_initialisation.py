"""
How a new model starts, and what a checkpoint fills in: in transformers 5 a parameter that is missing from a checkpoint
is uninitialised memory unless the model sees to it.
"""

import logging
import math

import pytest
import torch
import transformers

from dinosr_hf import DinoSRConfig, DinoSRForCTC, DinoSRForPreTraining, DinoSRForSequenceClassification, DinoSRModel
from tiny import randomize, tiny_config, waveforms

# Large enough for statistics: each group has thousands of weights.
CONFIG = DinoSRConfig(
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=512,
    conv_dim=[64, 64, 64],
    conv_stride=[5, 2, 2],
    conv_kernel=[10, 3, 3],
    conv_bias=True,
    num_conv_pos_embeddings=2,
    num_codebooks=2,
    codebook_size=64,
)


@pytest.fixture(scope="module")
def built():
    torch.manual_seed(0)
    return DinoSRForPreTraining(CONFIG)


@pytest.fixture(scope="module")
def from_encoder(tmp_path_factory):
    """The pre-training model out of a checkpoint of the encoder alone, whose weights are none that we would draw."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(1)
    randomize(DinoSRModel(CONFIG)).save_pretrained(folder)
    torch.manual_seed(2)
    return folder, DinoSRForPreTraining.from_pretrained(folder)


def assert_normal(tensor, deviation):
    """Mean and standard deviation within five standard errors, and no uniform distribution."""
    n = tensor.numel()
    assert abs(tensor.mean().item()) < 5 * deviation / math.sqrt(n)
    assert tensor.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * n))
    # 0.3 % of a normal distribution lie outside of three deviations; a uniform one ends at 1.73
    if n > 2000:
        assert tensor.abs().max() > 2.5 * deviation


def assert_uniform(tensor, low, high):
    n = tensor.numel()
    assert tensor.min() >= low and tensor.max() <= high
    assert tensor.mean().item() == pytest.approx((low + high) / 2, abs=5 * (high - low) / math.sqrt(12 * n))
    assert tensor.std().item() == pytest.approx((high - low) / math.sqrt(12), rel=5 / math.sqrt(n))


def assert_fresh_heads_and_codebooks(model):
    bound = 1 / math.sqrt(CONFIG.hidden_size)
    for head in model.heads:
        assert_uniform(head.weight, -bound, bound)
        assert_uniform(head.bias, -bound, bound)
    assert not torch.equal(model.heads[0].weight, model.heads[1].weight)
    assert torch.equal(model.codebooks.counts.data, torch.ones(2, 64))
    sums = model.codebooks.sums.data
    torch.testing.assert_close(sums.mean(dim=1), torch.zeros(2, 256), atol=1e-6, rtol=0.0)
    torch.testing.assert_close(sums.var(dim=1, correction=0), torch.ones(2, 256), atol=1e-4, rtol=0.0)
    assert_normal(sums, 1.0)
    assert not torch.equal(sums[0], sums[1])


def assert_teacher_is_student(model):
    student = model.dinosr.encoder.state_dict()
    teacher = model.teacher.state_dict()
    assert teacher.keys() == student.keys()
    assert all(torch.equal(tensor, student[name]) for name, tensor in teacher.items())


def assert_only_the_student_is_trainable(model):
    trainable = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name.partition(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert trainable == {"dinosr", "heads"} and frozen == {"teacher", "codebooks"}


def test_transformer_layers(built):
    for layer in built.dinosr.encoder.layers:
        attention = layer.attention
        linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj]
        linears += [layer.feed_forward.intermediate_dense, layer.feed_forward.output_dense]
        for linear in linears:
            assert_normal(linear.weight, 0.02)
            assert not linear.bias.any()


def test_initializer_range_is_that_of_the_transformer():
    model = DinoSRModel(tiny_config(hidden_size=144, initializer_range=0.3))
    assert_normal(model.encoder.layers[0].attention.q_proj.weight, 0.3)


def test_convolutions_are_kaiming_normal(built):
    for i, layer in enumerate(built.dinosr.feature_extractor.conv_layers):
        fan_in = (64 if i else 1) * layer.conv.kernel_size[0]
        assert_normal(layer.conv.weight, math.sqrt(2 / fan_in))
        assert_uniform(layer.conv.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))


def test_positional_convolutions_are_torch_s_default(built):
    for layer in built.dinosr.encoder.pos_conv_embed.layers:
        bound = 1 / math.sqrt(256 / 16 * 19)
        assert_uniform(layer.conv.weight, -bound, bound)
        assert_uniform(layer.conv.bias, -bound, bound)


def test_projection_is_torch_s_default(built):
    projection = built.dinosr.feature_projection.projection
    assert_uniform(projection.weight, -1 / 8, 1 / 8)
    assert_uniform(projection.bias, -1 / 8, 1 / 8)


def test_mask_embedding_is_uniform(built):
    assert_uniform(built.dinosr.masked_spec_embed, 0, 1)


def test_norms_are_neutral(built):
    norms = [m for m in built.modules() if isinstance(m, torch.nn.LayerNorm) and m.elementwise_affine]
    assert len(norms) == 3 + 1 + 2 * (1 + 2 * 2)
    assert all((norm.weight == 1).all() and not norm.bias.any() for norm in norms)


def test_heads_codebooks_and_teacher(built):
    assert_fresh_heads_and_codebooks(built)
    assert_teacher_is_student(built)
    assert_only_the_student_is_trainable(built)


def test_seed_decides(built):
    torch.manual_seed(0)
    again = DinoSRForPreTraining(CONFIG).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in built.state_dict().items())
    other = DinoSRForPreTraining(CONFIG).state_dict()
    assert not torch.equal(other["codebooks.sums"], again["codebooks.sums"])


def test_an_encoder_checkpoint_gives_a_fresh_objective(from_encoder):
    folder, model = from_encoder
    encoder = DinoSRModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, encoder[name]) for name, tensor in model.dinosr.state_dict().items())
    assert not torch.equal(model.dinosr.encoder.layer_norm.weight, torch.ones(256))
    assert_fresh_heads_and_codebooks(model)
    assert_teacher_is_student(model)
    assert_only_the_student_is_trainable(model)
    assert not any(module.training for module in model.teacher.modules())
    output = model.train()(waveforms(2, 1000))
    assert torch.isfinite(output.loss)


def test_an_encoder_checkpoint_gives_copies_of_its_convolutions(from_encoder):
    folder, _ = from_encoder
    model = DinoSRForPreTraining.from_pretrained(folder, freeze_mode="copied")
    state = model.state_dict()
    copies = [name for name in state if name.startswith("teacher.feature_")]
    assert copies
    assert all(torch.equal(state[name], state[name.replace("teacher", "dinosr", 1)]) for name in copies)
    assert_only_the_student_is_trainable(model)


def test_a_pretraining_checkpoint_is_loaded_as_it_is(tmp_path):
    model = randomize(DinoSRForPreTraining(tiny_config(freeze_mode="copied")))
    with torch.no_grad():
        model.codebooks.sums.mul_(3.0)
        model.codebooks.counts.uniform_(1.0, 9.0)
    saved = model.state_dict()
    assert not torch.equal(saved["teacher.layer_norm.weight"], saved["dinosr.encoder.layer_norm.weight"])
    model.save_pretrained(tmp_path)
    loaded = DinoSRForPreTraining.from_pretrained(tmp_path)
    state = loaded.state_dict()
    assert state.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in state.items())
    assert_only_the_student_is_trainable(loaded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_codebooks_are_loaded_in_float32(tmp_path, dtype):
    model = DinoSRForPreTraining(tiny_config())
    with torch.no_grad():
        model.codebooks.counts.uniform_(1.0, 9.0)
    model.save_pretrained(tmp_path)
    loaded = DinoSRForPreTraining.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dinosr.dtype == loaded.teacher.layer_norm.weight.dtype == dtype
    assert torch.equal(loaded.codebooks.counts, model.codebooks.counts)
    assert torch.equal(loaded.codebooks.sums, model.codebooks.sums)
    assert_only_the_student_is_trainable(loaded)


def test_a_half_precision_folder_keeps_float32_codebooks(tmp_path):
    model = DinoSRForPreTraining(tiny_config()).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = DinoSRForPreTraining.from_pretrained(tmp_path)
    assert torch.equal(loaded.codebooks.sums, model.codebooks.sums)
    assert loaded.codebooks.sums.dtype == torch.float32


class Messages(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.fixture
def messages():
    """What transformers says to its user, at its default level."""
    handler = Messages()
    logger = transformers.utils.logging.get_logger("transformers")
    logger.addHandler(handler)
    yield handler.texts
    logger.removeHandler(handler)


@pytest.fixture(scope="module")
def pretraining_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretraining")
    randomize(DinoSRForPreTraining(tiny_config(freeze_mode="copied"))).save_pretrained(folder)
    return folder


def test_the_encoder_of_a_pretraining_checkpoint_opens_without_a_word(pretraining_folder, messages):
    model = DinoSRModel.from_pretrained(pretraining_folder)
    whole = DinoSRForPreTraining.from_pretrained(pretraining_folder)
    assert messages == []
    assert all(torch.equal(t, whole.dinosr.state_dict()[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("model_class", "new"),
    [(DinoSRForCTC, "lm_head"), (DinoSRForSequenceClassification, "classifier")],
    ids=["ctc", "classification"],
)
def test_a_pretraining_checkpoint_in_another_head_warns_of_the_new_head_alone(
    pretraining_folder, messages, model_class, new
):
    model = model_class.from_pretrained(pretraining_folder)
    text = "\n".join(messages)
    assert new in text  # the negative control: that the handler hears, and the user is told what to train
    assert not any(word in text for word in ("teacher", "codebooks", "heads", "UNEXPECTED"))
    whole = DinoSRForPreTraining.from_pretrained(pretraining_folder)
    assert all(torch.equal(t, whole.dinosr.state_dict()[n]) for n, t in model.dinosr.state_dict().items())


def test_checkpoints_with_an_anchor_load_everywhere(tmp_path, messages):
    model = randomize(DinoSRForPreTraining(tiny_config(num_anchor_labels=9)))
    model.save_pretrained(tmp_path)
    again = DinoSRForPreTraining.from_pretrained(tmp_path)
    encoder = DinoSRModel.from_pretrained(tmp_path)
    without = DinoSRForPreTraining.from_pretrained(tmp_path, num_anchor_labels=0)
    assert messages == [] and without.anchor_head is None
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, model.dinosr.state_dict()[name]) for name, tensor in encoder.state_dict().items())
    DinoSRForCTC.from_pretrained(tmp_path)
    text = "\n".join(messages)
    assert "lm_head" in text and "anchor" not in text


def test_an_anchor_can_begin_with_a_model_that_was_trained_without_it(tmp_path, messages):
    plain = randomize(DinoSRForPreTraining(tiny_config()))
    plain.save_pretrained(tmp_path)
    model = DinoSRForPreTraining.from_pretrained(tmp_path, num_anchor_labels=200)
    assert "anchor_head" in "\n".join(messages)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in plain.state_dict().items())
    assert model.anchor_head.weight.shape == (200, 36) and model.anchor_head.weight.requires_grad
    assert_uniform(model.anchor_head.weight, -1 / 6, 1 / 6)
    assert_uniform(model.anchor_head.bias, -1 / 6, 1 / 6)
