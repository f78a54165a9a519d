"""Units and features of a model: against slow twins, in batches, of chosen layers, and what is refused."""

import pytest
import torch

from dinosr_hf import DinoSRForPreTraining
from tiny import padded, randomize, tiny_config, waveforms
from tolerances import SAME_ARITHMETIC

SOURCES = ("student", "teacher")
LENGTHS = (611, 97, 430)


def build(**changes):
    """Three layers, of which the top two have codebooks; teacher and student differ, codewords are near targets."""
    torch.manual_seed(0)
    model = randomize(DinoSRForPreTraining(tiny_config(num_hidden_layers=3, **changes)).eval())
    with torch.no_grad():
        for name, parameter in model.teacher.named_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


@pytest.fixture(scope="module")
def model():
    return build()


def alone(model, wave, layer, source):
    """Units of an utterance by itself, from the whole model's public outputs."""
    index = layer - 2
    output = model.dinosr(wave[None])
    if source == "student":
        return model.heads[index](output.last_hidden_state[0]).argmax(dim=-1)
    targets = model.compute_targets(wave[None], output.extract_features)[index, 0]
    return torch.cdist(targets, model.codebooks.codewords[index]).argmin(dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("layer", [2, 3])
@pytest.mark.parametrize("changes", [{}, {"reference_padding": True}, {"freeze_mode": "copied"}], ids=str)
def test_units_are_those_of_each_utterance_alone(layer, source, changes):
    model = build(**changes)
    waves = [waveforms(1, length, seed)[0] for seed, length in enumerate(LENGTHS)]
    codes, lengths = model.encode_units(*padded(waves), layer=layer, source=source)
    assert codes.dtype == torch.int64 and lengths.tolist() == [model.config.num_frames(len(w)) for w in waves]
    for row, length, wave in zip(codes, lengths, waves, strict=True):
        assert torch.equal(row[:length], alone(model, wave, layer, source))
        assert (row[length:] == -1).all()
    assert len(codes.unique()) > 3
    other, _ = model.encode_units(*padded(waves), layer=5 - layer, source=source)
    assert not torch.equal(codes, other)


@pytest.mark.parametrize("source", SOURCES)
def test_several_layers_are_the_single_ones(model, source):
    batch = padded([waveforms(1, length)[0] for length in LENGTHS])
    both, lengths = model.encode_units(*batch, layers=[3, 2], source=source)
    for row, layer in zip(both, (3, 2), strict=True):
        single, same = model.encode_units(*batch, layer=layer, source=source)
        assert torch.equal(row, single) and torch.equal(lengths, same)


def test_student_and_teacher_differ(model):
    first, second = (model.encode_units(waveforms(1, 2_000), layer=2, source=source)[0] for source in SOURCES)
    assert not torch.equal(first, second)


@torch.no_grad()
def test_features_are_hidden_states(model):
    batch = padded([waveforms(1, length)[0] for length in LENGTHS])
    output = model.dinosr(*batch, output_hidden_states=True)
    found = model.layer_features(*batch, layers=[3, 1])
    for features, layer in zip(found, (3, 1), strict=True):
        torch.testing.assert_close(features, output.hidden_states[layer], **SAME_ARITHMETIC)


@pytest.mark.parametrize("source", SOURCES)
def test_units_are_computed_without_tf32(model, source, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []
    hook = model.dinosr.feature_extractor.register_forward_hook(
        lambda *_: seen.append(torch.backends.cudnn.allow_tf32)
    )
    model.encode_units(waveforms(1, 900), layer=2, source=source)
    hook.remove()
    assert seen == [False] and torch.backends.cudnn.allow_tf32


@torch.no_grad()
def test_features_of_the_teacher_are_targets_before_they_are_normalised(model):
    wave = waveforms(1, 900)
    features = model.layer_features(wave, layers=[2, 3], source="teacher")
    targets = model.compute_targets(wave, model.dinosr(wave).extract_features)
    centred = features - features.mean(dim=2, keepdim=True)
    made = centred / (centred.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(made, targets, **SAME_ARITHMETIC)
    assert not torch.allclose(features, targets, atol=1e-2)


@pytest.mark.parametrize(
    ("source", "layers", "student", "teacher"),
    [("student", [1], 1, 0), ("student", [2, 1], 2, 0), ("teacher", [2], 0, 2), ("teacher", [1, 3], 0, 3)],
)
def test_features_compute_no_layer_above(model, source, layers, student, teacher):
    ran = {"student": 0, "teacher": 0}
    hooks = []
    for name, encoder in (("student", model.dinosr.encoder), ("teacher", model.teacher)):
        for layer in encoder.layers:
            count = lambda *_, name=name: ran.__setitem__(name, ran[name] + 1)  # noqa: E731
            hooks.append(layer.attention.register_forward_hook(count))
    model.layer_features(waveforms(1, 300), layers=layers, source=source)
    assert ran == {"student": student, "teacher": teacher}
    if source == "teacher" and 1 not in layers:  # its units cost the same
        model.encode_units(waveforms(1, 300), layers=layers, source=source)
        assert ran == {"student": 0, "teacher": 2 * teacher}
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_a_model_on_the_disk_computes_what_one_in_memory_does(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(("dinosr", "teacher", "codebooks", "heads"), "disk")
    options = {"device_map": places, "offload_folder": tmp_path / "disk"}
    other = DinoSRForPreTraining.from_pretrained(tmp_path / "model", **options).eval()
    assert {weight.device.type for weight in other.parameters()} == {"meta"}
    batch = padded([waveforms(1, length)[0] for length in LENGTHS])
    mask = torch.arange(model.config.num_frames(LENGTHS[0])) % 3 == 0
    one, two = (each(*batch, mask.expand(3, -1)) for each in (model, other))
    torch.testing.assert_close(two.loss, one.loss, **SAME_ARITHMETIC)
    assert torch.equal(two.codes, one.codes) and len(one.codes.unique()) > 1
    for source in SOURCES:
        units = [each.encode_units(*batch, layers=[2, 3], source=source)[0] for each in (model, other)]
        assert torch.equal(*units)


@torch.no_grad()
@pytest.mark.parametrize("source", [*SOURCES, "anchor"])
def test_the_layer_by_default_has_units(source):
    anchored = build(num_anchor_labels=5)  # of three layers
    codes, _ = anchored.encode_units(waveforms(1, 900), source=source)
    assert torch.equal(codes, anchored.encode_units(waveforms(1, 900), layer=3, source=source)[0])


def test_units_in_half_precision_are_whole_numbers(model):
    half = build().to(torch.bfloat16)
    codes, _ = half.encode_units(waveforms(1, 900).bfloat16(), layers=[2, 3], source="teacher")
    assert codes.dtype == torch.int64 and half.codebooks.sums.dtype == torch.float32
    assert int(codes.min()) >= 0 and int(codes.max()) < 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 1}, "layer=1 has no codebook. Layers with a codebook: 2, 3"),
        ({"layers": [2, 4]}, "layer=4 has no codebook"),
        ({"layers": []}, "layers is empty"),
        ({"layer": 2, "source": "pupil"}, "source='pupil' is unknown. Choose one of student, teacher"),
    ],
)
def test_units_of_what_is_not_there(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.encode_units(waveforms(1, 300), **arguments)


def test_features_of_what_is_not_there(model):
    with pytest.raises(ValueError, match=r"layer=0 does not exist. Layers of this model: 1, 2, 3"):
        model.layer_features(waveforms(1, 300), layers=[0])
    with pytest.raises(ValueError, match="too few for a single frame"):
        model.layer_features(waveforms(1, 3), layers=[1])


def test_training_mode_is_refused():
    model = build().train()
    with pytest.raises(ValueError, match=r"training mode.*model.eval\(\)"):
        model.encode_units(waveforms(1, 300), layer=2)
