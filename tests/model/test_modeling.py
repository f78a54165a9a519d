"""The encoder: the same numbers as its Data2VecAudio relative, alone and in a batch, by every way of running it."""

import re

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Data2VecAudioConfig,
    Data2VecAudioModel,
    SpeechEncoderDecoderModel,
)

from dinosr_hf import DinoSRForCTC, DinoSRForPreTraining, DinoSRModel
from dinosr_hf.model.modeling_dinosr import zero_padding
from tiny import NO_DROPOUT, SIZES, deterministic_config, padded, randomize, tiny_config, waveforms
from tolerances import GRADIENTS, SAME_ARITHMETIC

KERNELS = pytest.mark.parametrize("kernel", [4, 5], ids=["even-kernel", "odd-kernel"])


def encoder(seed=0, **changes):
    torch.manual_seed(seed)
    return randomize(DinoSRModel(deterministic_config(**changes)))


def relative_config(**changes):
    fields = Data2VecAudioConfig().to_dict()
    shared = {name: value for name, value in {**SIZES, **NO_DROPOUT}.items() if name in fields}
    return Data2VecAudioConfig(**{**shared, **changes})


@KERNELS
@pytest.mark.parametrize("direction", ["theirs-to-ours", "ours-to-theirs"])
def test_weights_and_outputs_are_data2vec_audio_s(kernel, direction):
    torch.manual_seed(3)
    theirs = randomize(Data2VecAudioModel(relative_config(conv_pos_kernel_size=kernel)), seed=5).eval()
    ours = encoder(conv_pos_kernel_size=kernel).eval()
    x = waveforms(2, 777)
    before = ours(x, output_hidden_states=True).last_hidden_state - theirs(x).last_hidden_state
    assert before.abs().max() > 0.1
    if direction == "theirs-to-ours":
        ours.load_state_dict(theirs.state_dict())
    else:
        theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        a, b = (model(x, output_hidden_states=True) for model in (ours, theirs))
    assert len(a.hidden_states) == len(b.hidden_states) == 4
    torch.testing.assert_close(a.extract_features, b.extract_features, **SAME_ARITHMETIC)
    for mine, other in zip(a.hidden_states, b.hidden_states, strict=True):
        torch.testing.assert_close(mine, other, **SAME_ARITHMETIC)
    torch.testing.assert_close(a.last_hidden_state, b.last_hidden_state, **SAME_ARITHMETIC)


def test_a_saved_data2vec_audio_folder_opens(tmp_path):
    theirs = randomize(Data2VecAudioModel(relative_config())).eval()
    theirs.save_pretrained(tmp_path)
    ours = DinoSRModel.from_pretrained(tmp_path, config=deterministic_config()).eval()
    x = waveforms(1, 401)
    torch.testing.assert_close(ours(x).last_hidden_state, theirs(x).last_hidden_state, **SAME_ARITHMETIC)


def layer_outputs(model, *inputs):
    """What the convolutions and each encoder layer give, time last but one."""
    with torch.no_grad():
        output = model(*inputs, output_hidden_states=True)
        convolved = model.feature_extractor(inputs[0]).transpose(1, 2)
    return [convolved, output.extract_features, *output.hidden_states, output.last_hidden_state]


LENGTHS = (801, 390, 97)


def padding_differences(model):
    """The largest difference between an utterance alone and in a padded batch, for each layer."""
    waves = [waveforms(1, length, seed=length)[0] for length in LENGTHS]
    batch = layer_outputs(model, *padded(waves))
    differences = torch.zeros(len(batch))
    for row, wave in enumerate(waves):
        alone = layer_outputs(model, wave[None])
        for i, (one, many) in enumerate(zip(alone, batch, strict=True)):
            difference = (one[0] - many[row, : one.shape[1]]).abs().max()
            differences[i] = torch.maximum(differences[i], difference)
    return differences


@KERNELS
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_utterance_is_the_same_alone_and_in_a_padded_batch(kernel, attention):
    model = encoder(conv_pos_kernel_size=kernel, attn_implementation=attention).eval()
    differences = padding_differences(model)
    assert len(differences) == 1 + 1 + 4 + 1
    assert differences.max() < SAME_ARITHMETIC["atol"], differences


def test_padding_leaks_with_reference_padding():
    # the negative control, and what the authors' code does; the convolutions of the front are not concerned
    differences = padding_differences(encoder(reference_padding=True).eval())
    assert differences[:2].max() < SAME_ARITHMETIC["atol"]
    assert differences[2:].min() > 0.05


def test_content_of_the_padding_does_not_matter():
    model = encoder().eval()
    x, mask = padded([waveforms(1, length)[0] for length in LENGTHS])
    noisy = torch.where(mask.bool(), x, 3.0 * torch.ones_like(x))
    lengths = model.config.num_frames(mask.sum(dim=1))
    clean, dirty = model(x, mask).last_hidden_state, model(noisy, mask).last_hidden_state
    for row, length in enumerate(lengths):
        torch.testing.assert_close(clean[row, :length], dirty[row, :length], **SAME_ARITHMETIC)
    assert (model(x).last_hidden_state[2] - model(noisy).last_hidden_state[2]).abs().max() > 0.05


def test_eager_attention_is_sdpa():
    x, mask = padded([waveforms(1, length)[0] for length in LENGTHS])
    model = encoder(attn_implementation="eager").eval()
    eager = model(x, mask, output_attentions=True)
    model.set_attn_implementation("sdpa")
    sdpa = model(x, mask)
    frames = torch.arange(eager.last_hidden_state.shape[1]) < model.config.num_frames(mask.sum(dim=1))[:, None]
    torch.testing.assert_close(eager.last_hidden_state[frames], sdpa.last_hidden_state[frames], **SAME_ARITHMETIC)
    num_frames = eager.last_hidden_state.shape[1]
    assert [attention.shape for attention in eager.attentions] == [(3, 3, num_frames, num_frames)] * 3
    # nobody attends to padding
    assert not eager.attentions[0][2][..., model.config.num_frames(97) :].any()


def test_attentions_of_sdpa_are_empty_with_the_warning_of_transformers(monkeypatch):
    said = []
    monkeypatch.setattr("transformers.integrations.sdpa_attention.logger.warning_once", said.append)
    x, mask = padded([waveforms(1, length)[0] for length in LENGTHS])
    with torch.no_grad():  # in which packed frames have an attention of their own
        found = encoder().eval()(x, mask, output_attentions=True)
    assert found.attentions == () and "does not support `output_attentions=True`" in said[0]


def test_a_layer_on_another_device_than_the_mask():
    mask = torch.tensor([[True, True, False]])
    assert zero_padding(torch.empty(1, 3, 4, device="meta"), mask).shape == (1, 3, 4)


def test_flex_attention_is_sdpa():
    # flex attention wants heads of at least 16 on a CPU
    x, mask = padded([waveforms(1, length)[0] for length in LENGTHS])
    model = encoder(hidden_size=64, num_attention_heads=2, attn_implementation="sdpa").eval()
    with torch.no_grad():
        sdpa = model(x, mask).last_hidden_state
        model.set_attn_implementation("flex_attention")
        with torch.compiler.set_stance("force_eager"):  # its C++ takes a compiler 20 seconds
            flex = model(x, mask).last_hidden_state
    frames = torch.arange(sdpa.shape[1]) < model.config.num_frames(mask.sum(dim=1))[:, None]
    torch.testing.assert_close(flex[frames], sdpa[frames], **SAME_ARITHMETIC)


def test_outputs_and_shapes():
    config = tiny_config()
    model = DinoSRModel(config).eval()
    output = model(waveforms(2, 555), output_hidden_states=True)
    num_frames = config.num_frames(555)
    assert output.last_hidden_state.shape == (2, num_frames, 36)
    assert output.extract_features.shape == (2, num_frames, 15)
    assert [hidden.shape for hidden in output.hidden_states] == [(2, num_frames, 36)] * 4
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    as_tuple = model(waveforms(2, 555), return_dict=False)
    assert torch.equal(as_tuple[0], output.last_hidden_state)


def gradients(model, x, **kwargs):
    torch.manual_seed(11)  # the same dropout, layers and masks
    model.zero_grad()
    output = model(x, **kwargs).last_hidden_state
    output.square().sum().div(output.numel()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not-reentrant", "reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    torch.manual_seed(0)
    model = randomize(DinoSRModel(tiny_config(layerdrop=0.4, mask_time_prob=0.3))).train()
    x = waveforms(2, 655)
    plain = gradients(model, x)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    checkpointed = gradients(model, x)
    assert checkpointed.keys() == plain.keys() == dict(model.named_parameters()).keys()
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], **GRADIENTS)


def test_layerdrop_passes_hidden_states_through_and_reaches_every_parameter():
    model = encoder(layerdrop=1.0).train()
    output = model(waveforms(2, 333), output_hidden_states=True)
    assert len(output.hidden_states) == 4
    assert torch.equal(output.last_hidden_state, output.hidden_states[0])
    output.last_hidden_state.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.encoder.parameters())
    assert not any(parameter.grad.any() for parameter in model.encoder.layers.parameters())
    kept = encoder(layerdrop=1.0).eval()(waveforms(2, 333), output_hidden_states=True)
    assert not torch.equal(kept.last_hidden_state, kept.hidden_states[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("model_class", [DinoSRModel, DinoSRForCTC])
def test_low_precision_is_near_float32(model_class, dtype):
    torch.manual_seed(0)
    model = randomize(model_class(deterministic_config()), scale=0.05).eval()
    x, mask = padded([waveforms(1, 500)[0], waveforms(1, 301)[0]])
    exact = model(x, mask)[0]
    low = model.to(dtype)(x.to(dtype), mask)[0]
    assert low.dtype == dtype
    assert (low.float() - exact).abs().mean() < 0.05 * exact.abs().mean() + 0.01


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1)], ids=["bf16"])
def test_pretraining_in_low_precision(dtype, tolerance):
    torch.manual_seed(0)
    model = DinoSRForPreTraining(deterministic_config()).train()
    x = waveforms(2, 601)
    mask = torch.zeros(2, model.config.num_frames(601), dtype=torch.bool)
    mask[:, 3:9] = True
    exact = model(x, mask_time_indices=mask).loss
    model = model.to(dtype)
    low = model(x.to(dtype), mask_time_indices=mask)
    assert model.codebooks.sums.dtype == torch.float32
    assert low.loss.dtype == torch.float32
    assert low.loss.item() == pytest.approx(exact.item(), rel=tolerance)
    low.loss.backward()
    with pytest.raises(ValueError, match=r"dtype is torch\..*float16, .* hardly move\. Load it with dtype="):
        model.update_targets(1)


# Tracing takes its time for every layer.
SMALL = {"num_hidden_layers": 1, "num_codebooks": 1, "num_conv_pos_embeddings": 1}


def test_compiles_without_a_graph_break_in_training():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = randomize(DinoSRModel(tiny_config(**NO_DROPOUT, **SMALL))).train()
    x = waveforms(2, 401)
    mask = torch.zeros(2, model.config.num_frames(401), dtype=torch.bool)
    mask[0, 2:6] = True
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    plain = gradients(model, x, mask_time_indices=mask)
    for name, gradient in gradients(compiled, x, mask_time_indices=mask).items():
        torch.testing.assert_close(gradient, plain[name.removeprefix("_orig_mod.")], **GRADIENTS)


def test_compiles_without_a_graph_break_with_layerdrop():
    torch._dynamo.reset()
    model = DinoSRModel(tiny_config(**SMALL)).train()
    mask = torch.zeros(1, model.config.num_frames(401), dtype=torch.bool)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert compiled(waveforms(1, 401), mask_time_indices=mask).last_hidden_state.requires_grad


def augmented(model, x, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(x).last_hidden_state


@pytest.mark.parametrize("axis", ["time", "feature"])
def test_spec_augment_is_for_training_alone(axis):
    changes = {"mask_time_prob": 0.0, f"mask_{axis}_prob": 0.5, "apply_spec_augment": True}
    model, x = encoder(**changes), waveforms(2, 700)
    plain = augmented(model.eval(), x, 0)
    assert torch.equal(plain, augmented(model, x, 1))
    masked = augmented(model.train(), x, 0)
    assert (masked - plain).abs().max() > 0.1
    assert torch.equal(masked, augmented(model, x, 0))
    assert not torch.equal(masked, augmented(model, x, 1))
    model.config.apply_spec_augment = False
    torch.testing.assert_close(augmented(model, x, 0), plain, **SAME_ARITHMETIC)


def test_mask_embedding_replaces_the_masked_frames():
    model = encoder().eval()
    x = waveforms(1, 300)
    everything = torch.ones(1, model.config.num_frames(300), dtype=torch.bool)
    masked = model(x, mask_time_indices=everything).last_hidden_state
    torch.testing.assert_close(
        masked, model(2 * x + 1, mask_time_indices=everything).last_hidden_state, **SAME_ARITHMETIC
    )
    assert (masked - model(x, mask_time_indices=~everything).last_hidden_state).abs().max() > 0.1
    torch.testing.assert_close(
        model(x, mask_time_indices=~everything).last_hidden_state, model(x).last_hidden_state, **SAME_ARITHMETIC
    )


@pytest.mark.parametrize("layer", [0, 4])
def test_feed_forward_layers_that_are_not_there_are_refused(layer):
    with pytest.raises(ValueError, match=f"layer={layer} does not exist"):
        encoder()(waveforms(1, 500), feed_forward_layers=[layer])


def test_it_is_the_encoder_of_a_speech_encoder_decoder():
    own = encoder(hidden_size=16, num_attention_heads=2).eval()
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=7, is_decoder=True, add_cross_attention=True, **shape)
    whole = SpeechEncoderDecoderModel(encoder=own, decoder=BertLMHeadModel(config)).eval()
    x, mask = padded([waveforms(1, 500)[0], waveforms(1, 301)[0]])
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    both = whole(x, attention_mask=mask, decoder_input_ids=tokens).logits
    alone = whole(x[1:, :301], decoder_input_ids=tokens[1:]).logits
    torch.testing.assert_close(both[1:], alone, **SAME_ARITHMETIC)


def test_mask_embedding_always_exists():
    off = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0, "apply_spec_augment": False}
    assert "masked_spec_embed" in DinoSRModel(tiny_config(**off)).state_dict()


@pytest.mark.parametrize(
    ("x", "kwargs", "message"),
    [
        pytest.param(
            torch.zeros(1, 1, 400), {}, r"input_values has shape \(1, 1, 400\).*\(batch, samples\)", id="3-D"
        ),
        pytest.param(torch.zeros(400), {}, r"input_values has shape \(400,\)", id="1-D"),
        pytest.param(
            torch.zeros(2, 39), {}, "input_values has 39 samples, too few for a single frame", id="too-short"
        ),
        pytest.param(
            torch.zeros(2, 400),
            {"mask_time_indices": torch.zeros(2, 5, dtype=torch.bool)},
            re.escape("mask_time_indices has shape (2, 5), but must be (batch, frames) = (2, 19)"),
            id="mask-of-another-shape",
        ),
        pytest.param(
            torch.zeros(2, 400),
            {"attention_mask": torch.ones(2, 19)},
            re.escape("attention_mask has shape (2, 19), but must be (batch, samples) = (2, 400)"),
            id="attention-mask-of-frames",
        ),
    ],
)
@pytest.mark.parametrize("model_class", [DinoSRModel, DinoSRForPreTraining])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_wrong_inputs_are_refused(model_class, training, x, kwargs, message):
    model = model_class(tiny_config()).train(training)
    with pytest.raises(ValueError, match=message):
        model(x, **kwargs)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_utterance_without_a_frame_harms_nobody(attention):
    model = DinoSRForPreTraining(deterministic_config(attn_implementation=attention)).train()
    x, mask = padded([waveforms(1, 500)[0], waveforms(1, 20)[0]])
    output = model(x, mask)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_the_shortest_utterance_is_one_frame():
    model = encoder().eval()
    (shortest,) = [n for n in range(1, 60) if model.config.num_frames(n) == 1 and model.config.num_frames(n - 1) == 0]
    assert model(waveforms(1, shortest)).last_hidden_state.shape == (1, 1, 36)


def test_freezing_parts():
    model = DinoSRForCTC(tiny_config())
    model.freeze_feature_encoder()
    assert not any(p.requires_grad for p in model.dinosr.feature_extractor.parameters())
    assert all(p.requires_grad for p in model.dinosr.encoder.parameters())
    model.freeze_base_model()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"lm_head.weight", "lm_head.bias"}
