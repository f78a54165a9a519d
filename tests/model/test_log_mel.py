"""The log-mel front end: against a slow twin, in every precision, and everywhere the model goes."""

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutomaticSpeechRecognitionPipeline, AutoModel, pipeline

from dinosr_hf import (
    DinoSRForAudioFrameClassification,
    DinoSRForCTC,
    DinoSRForPreTraining,
    DinoSRForSequenceClassification,
    DinoSRForXVector,
    DinoSRModel,
    set_fast_cpu,
)
from dinosr_hf.model.modeling_dinosr import DinoSRLogMelEncoder
from dinosr_hf.utils.model_folder import feature_extractor
from recognisers import save_recogniser
from tiny import deterministic_config, padded, randomize, tiny_config, waveforms
from tolerances import ACTIVATIONS, GRADIENTS

LENGTHS = (6_801, 560, 3_390)
SMALL = {"num_hidden_layers": 1, "num_codebooks": 1, "num_conv_pos_embeddings": 1}  # tracing a layer takes its time
HEADS = {
    DinoSRForCTC: torch.tensor([[3, 7], [1, -100]]),
    DinoSRForSequenceClassification: torch.tensor([4, 0]),
    DinoSRForAudioFrameClassification: torch.arange(44).view(2, 22) % 5,
    DinoSRForXVector: torch.tensor([2, 1]),
}


def build(kind=DinoSRModel, **changes):
    torch.manual_seed(0)
    return randomize(kind(deterministic_config(feature_encoder="log_mel", **changes)))


def utterances():
    return [waveforms(1, length, seed=length)[0] for length in LENGTHS]


def mask_of(num_samples, batch_size=2):
    mask = torch.zeros(batch_size, tiny_config(feature_encoder="log_mel").num_frames(num_samples), dtype=torch.bool)
    mask[:, 1::3] = True
    return mask


@pytest.fixture
def energies():
    """The encoder without its normalisation: waveforms (B, S) to log energies (B, T, 160)."""
    return DinoSRLogMelEncoder().energies


def by_hand(wave, floor=0.01):
    """The twin: one window and one filter at a time, in float64; (T, 160)."""

    def mel(frequency):
        return 2595 * math.log10(1 + frequency / 700)

    shape = [0.5 - 0.5 * math.cos(2 * math.pi * n / 400) for n in range(400)]
    ends = np.linspace(mel(20), mel(8000), 82)
    windows = []
    for start in range(0, len(wave) - 400 + 1, 160):
        power = np.abs(np.fft.rfft(wave[start : start + 400] * shape, 512)) ** 2
        row = []
        for low, centre, high in zip(ends, ends[1:], ends[2:], strict=False):
            total = 0.0
            for number, value in enumerate(power):
                place = mel(number * 16_000 / 512)
                total += value * max(0.0, min((place - low) / (centre - low), (high - place) / (high - centre)))
            row.append(math.log(total + floor))
        windows.append(row)
    frames = np.array([windows[2 * i] + windows[2 * i + 1] for i in range(len(windows) // 2)])
    return (frames - frames.mean(axis=0)) / np.sqrt(frames.var(axis=0) + 1e-5)


def test_features_equal_a_slow_twin():
    wave = waveforms(1, 3_000)[0] * torch.linspace(0, 2, 3_000)  # from silence on, so that the floor shows
    features = DinoSRLogMelEncoder()(wave[None])
    assert features.shape == (1, 160, 8) and features.dtype == torch.float32
    expected = by_hand(wave.double().numpy())
    np.testing.assert_allclose(features[0].T, expected, **ACTIVATIONS)
    assert np.abs(by_hand(wave.double().numpy(), floor=0.02) - expected).max() > 1e-3


def test_frames_of_samples():
    config, encoder = tiny_config(feature_encoder="log_mel"), DinoSRLogMelEncoder()
    assert (config.inputs_to_logits_ratio, config.receptive_field, config.feature_size) == (320, 560, 160)
    lengths = [*range(560, 1_300, 7), 879, 880, 1_199, 1_200, 5_000]
    made = [encoder(torch.zeros(1, length)).shape[-1] for length in lengths]
    assert (
        made == [config.num_frames(length) for length in lengths] == config.num_frames(torch.tensor(lengths)).tolist()
    )
    assert [config.num_frames(length) for length in (0, 399, 400, 559, 560, 879, 880)] == [0, 0, 0, 0, 1, 1, 2]


def test_frame_sees_its_receptive_field_alone(energies):
    wave, frame = waveforms(1, 4_000), 5
    begin, end = frame * 320, frame * 320 + 560
    outside = wave.clone()
    outside[:, :begin], outside[:, end:] = 7.0, -9.0
    assert torch.equal(energies(outside)[:, frame], energies(wave)[:, frame])
    for sample in (begin + 20, begin + 280, end - 20):
        inside = wave.clone()
        inside[:, sample] += 5
        assert (energies(inside) - energies(wave))[:, frame].abs().max() > 0.01
    # A click in the middle of a frame's field is in no other frame.
    click = torch.zeros(1, 4_000)
    click[:, (begin + end) // 2] = 9
    changed = (energies(click) - energies(0 * click)).abs().amax(dim=-1)[0] > 0.01
    assert changed.nonzero().flatten().tolist() == [frame]


def test_level_and_offset(energies):
    wave = waveforms(1, 4_000)
    torch.testing.assert_close(
        energies(10 * wave) - energies(wave), torch.full((1, 11, 160), math.log(100)), atol=0.05, rtol=0
    )
    torch.testing.assert_close(energies(1e-5 * wave), torch.full((1, 11, 160), math.log(0.01)), atol=1e-3, rtol=0)
    difference = (energies(wave + 1) - energies(wave)).abs().amax(dim=(0, 1))  # in the lowest filters alone
    assert difference[[0, 80]].min() > 0.1 and difference[20:80].max() < 0.02 and difference[100:].max() < 0.02


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("reference_padding", [False, True])
def test_an_utterance_is_the_same_alone_and_in_a_padded_batch(attention, reference_padding):
    model = build(attn_implementation=attention, reference_padding=reference_padding).eval()
    values, mask = padded(utterances())
    noisy = torch.where(mask.bool(), values, 3.0)
    batch, unaware = model(noisy, mask, output_hidden_states=True), model(values)
    for row, wave in enumerate(utterances()):
        alone = model(wave[None], output_hidden_states=True)
        length = alone.extract_features.shape[1]
        torch.testing.assert_close(batch.extract_features[row, :length], alone.extract_features[0], **ACTIVATIONS)
        layers = zip(batch.hidden_states, alone.hidden_states, strict=True)
        is_same = all(torch.allclose(many[row, :length], one[0], **ACTIVATIONS) for many, one in layers)
        # The authors' padding leaks in the positional convolutions, whatever the front end; the first has none.
        assert is_same == (not reference_padding or row == 0)
        if row:
            assert (unaware.extract_features[row, :length] - alone.extract_features[0]).abs().max() > 0.05
    assert not DinoSRLogMelEncoder()(values, torch.zeros(3, 20, dtype=torch.bool)).any()


def test_precision_of_the_model_does_not_matter():
    values = waveforms(2, 6_801)
    model = build().eval()
    exact, features = model.feature_extractor(values), model(values).extract_features
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.feature_extractor(values), exact)
        autocast = model(values).last_hidden_state
    assert autocast.dtype == torch.bfloat16  # the control: autocast was on
    for dtype in (torch.bfloat16, torch.float16):
        model = build().eval().to(dtype)
        assert torch.equal(model.feature_extractor(values), exact)
        output = model(values)
        assert output.last_hidden_state.dtype == dtype and output.last_hidden_state.isfinite().all()
        torch.testing.assert_close(output.extract_features.float(), features, atol=0.1, rtol=0.02)
        # Waveforms of a low precision are other waveforms.
        assert not torch.equal(model.feature_extractor(values.to(dtype)), exact)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(model.feature_extractor(values), exact)
    finally:
        torch.set_default_dtype(torch.float32)


def test_silence_and_single_frames_are_finite():
    model = build(DinoSRForPreTraining).train()
    for values in (torch.zeros(2, 4_000), torch.full((2, 4_000), 0.7), waveforms(2, 560)):
        output = model(
            values, mask_time_indices=torch.ones(2, model.config.num_frames(values.shape[1]), dtype=torch.bool)
        )
        output.loss.backward()
        assert output.loss.isfinite() and output.last_hidden_state.isfinite().all()
    silence = model.dinosr.feature_extractor(torch.zeros(1, 4_000))
    torch.testing.assert_close(silence, torch.zeros_like(silence), atol=1e-2, rtol=0)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)


def test_an_utterance_without_a_frame_harms_nobody():
    model = build(DinoSRForPreTraining).train()
    output = model(*padded([waveforms(1, 4_000)[0], waveforms(1, 100)[0]]))
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)


def test_too_short_waveforms_are_refused():
    with pytest.raises(ValueError, match="input_values has 559 samples, too few for a single frame, which sees 560"):
        build()(torch.zeros(2, 559))


def test_folders_keep_the_front_end(tmp_path):
    model, values = build().eval(), waveforms(2, 4_000)
    assert not any("feature_extractor" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert loaded.config.feature_encoder == "log_mel" and loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loaded(values).last_hidden_state, model(values).last_hidden_state)
    with torch.device("meta"):
        empty = DinoSRModel(model.config)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty.eval()(values).last_hidden_state, model(values).last_hidden_state)


def test_computes_shapes_on_the_meta_device():
    model, values = build(DinoSRForCTC), waveforms(2, 4_000)
    shape = model(values).logits.shape
    assert model.to("meta")(values.to("meta")).logits.shape == shape


def test_pipelines(tmp_path):
    save_recogniser(tmp_path / "recogniser", feature_encoder="log_mel")
    recognise = pipeline("automatic-speech-recognition", model=str(tmp_path / "recogniser"))
    assert type(recognise) is AutomaticSpeechRecognitionPipeline
    waves = [wave.numpy() for wave in utterances()]
    alone = [recognise(wave)["text"] for wave in waves]
    assert [found["text"] for found in recognise(waves, batch_size=3)] == alone and len(set(alone)) == 3
    chunks = recognise(waves[0], return_timestamps="char")["chunks"]
    assert chunks and all(round(time * 50, 6).is_integer() for chunk in chunks for time in chunk["timestamp"])
    assert isinstance(recognise(waves[0], chunk_length_s=0.2, stride_length_s=0.04)["text"], str)
    build(DinoSRForSequenceClassification).save_pretrained(tmp_path / "classifier")
    feature_extractor().save_pretrained(tmp_path / "classifier")
    assert len(pipeline("audio-classification", model=str(tmp_path / "classifier"))(waves[0])) == 5


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
def test_compiles_without_a_graph_break(is_padded):
    torch._dynamo.reset()
    model = build(**SMALL).eval()
    values, mask = padded(utterances()) if is_padded else (waveforms(2, 4_000), None)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model(values, mask).last_hidden_state
        torch.testing.assert_close(compiled(values, mask).last_hidden_state, expected, **ACTIVATIONS)


def loss_and_gradients(model, values, mask=None):
    model.zero_grad()
    output = model(values, mask).last_hidden_state
    loss = (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum() / output.numel()
    loss.backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_fast_and_plain_agree():
    model = build().train()
    results = []
    try:
        for enabled in (True, False):
            set_fast_cpu(enabled)
            results.append(loss_and_gradients(model, *padded(utterances())))
    finally:
        set_fast_cpu(True)
    (fast, fast_gradients), (plain, plain_gradients) = results
    assert not torch.equal(fast, plain)
    torch.testing.assert_close(fast, plain, **ACTIVATIONS)
    torch.testing.assert_close(fast_gradients, plain_gradients, **GRADIENTS)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not-reentrant", "reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    model = build().train()
    _, plain = loss_and_gradients(model, waveforms(2, 4_000))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    _, recomputed = loss_and_gradients(model, waveforms(2, 4_000))
    assert plain.keys() == recomputed.keys() and len(plain) > 20
    torch.testing.assert_close(recomputed, plain, **GRADIENTS)


def test_torch_func_and_second_gradients():
    model, values = build(attn_implementation="eager").eval(), waveforms(2, 4_000)
    _, expected = loss_and_gradients(model, values)

    def loss(parameters, values):
        output = torch.func.functional_call(model, parameters, (values,)).last_hidden_state
        return (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum() / output.numel()

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = torch.func.grad(loss)(parameters, values)
    torch.testing.assert_close({name: found[name] for name in expected}, expected, **GRADIENTS)
    by_sample = torch.func.vmap(lambda wave: model(wave[None]).last_hidden_state[0])(values)
    torch.testing.assert_close(by_sample, model(values).last_hidden_state, **ACTIVATIONS)

    # The gradient of the gradient's square with respect to the samples, against a difference along a direction.
    def penalty(values):
        (gradient,) = torch.autograd.grad(loss(parameters, values), values, create_graph=True)
        return gradient.square().sum() * 1e4

    direction = waveforms(2, 4_000, seed=5)
    (second,) = torch.autograd.grad(penalty(values.requires_grad_()), values)
    ends = [penalty((values + step * direction).detach().requires_grad_()) for step in (1e-3, -1e-3)]
    assert (second * direction).sum().item() == pytest.approx((ends[0] - ends[1]).item() / 2e-3, rel=0.02)


@pytest.mark.parametrize("kind", HEADS, ids=lambda kind: kind.__name__)
def test_every_head_trains(kind):
    model = build(kind).train()
    model.freeze_feature_encoder()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = model(waveforms(2, 7_300), labels=HEADS[kind]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    still = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    # The gradient of a key's bias is zero but for rounding, and nothing was masked.
    assert {name for name in still if not name.endswith("k_proj.bias")} == {"dinosr.masked_spec_embed"}


@pytest.mark.parametrize("freeze_mode", ["frozen", "shared", "copied"])
def test_freezing_in_pretraining(freeze_mode):
    model = build(DinoSRForPreTraining, freeze_mode=freeze_mode, freeze_teacher_step=2, ema_anneal_steps=1).train()
    copies = {name for name in model.state_dict() if name.startswith("teacher.feature_")}
    projection = {name for name in model.state_dict() if name.startswith("dinosr.feature_projection")}
    expected = {name.replace("dinosr", "teacher") for name in projection} if freeze_mode == "copied" else set()
    assert copies == expected and len(projection) == 2
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    moved = {}
    for step in range(1, 5):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer.zero_grad()
        model(waveforms(2, 7_300, seed=step), mask_time_indices=mask_of(7_300)).loss.backward()
        optimizer.step()
        model.update_targets(step)
        moved[step] = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved[1] >= projection | copies
    assert not moved[4] & copies
    assert (moved[4] >= projection) == (freeze_mode != "frozen")
    assert any(name.startswith("heads") for name in moved[4])


def test_pretraining_reads_no_number_of_a_step():
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = DinoSRForPreTraining(tiny_config(feature_encoder="log_mel")).train()
        mask = torch.empty(2, 20, dtype=torch.bool)
        output = model(torch.empty(2, 6_801), mask_time_indices=mask, masked_frames=torch.empty(9, dtype=torch.int64))
        output.loss.backward()
        model.update_targets(1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantisation():
    model, values = build(DinoSRForCTC).eval(), waveforms(2, 4_000)
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        exact, near = model(values).logits, quantised(values).logits
    assert not torch.equal(exact, near)
    torch.testing.assert_close(near, exact, atol=0.3, rtol=0.1)


def test_a_hook_of_the_front_end_is_heeded():
    model, values = build().eval(), waveforms(1, 4_000)
    before = model(values).last_hidden_state
    handle = model.feature_extractor.register_forward_hook(lambda *call: call[-1].flip(1))
    assert (model(values).last_hidden_state - before).abs().max() > 0.1
    handle.remove()
    assert torch.equal(model(values).last_hidden_state, before)
