"""Padded batches without their padding: the same numbers as with it, and less work."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinosr_hf import DinoSRForCTC, DinoSRForPreTraining, DinoSRModel, encoder_dinosr
from dinosr_hf.model.packing_dinosr import ValidFrames, valid_frames
from tiny import NO_DROPOUT, randomize, tiny_config
from tolerances import GRADIENTS, SAME_ARITHMETIC

MASK = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()


def batch():
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(700) < torch.tensor([700, 180, 333])[:, None]).long()
    return torch.randn(3, 700, generator=generator) * mask, mask


@pytest.fixture
def as_on_gpus(monkeypatch):
    """A function from which on batches are left as they are."""
    return lambda: monkeypatch.setattr(encoder_dinosr, "valid_frames", ValidFrames)


def test_pack_takes_the_frames_and_unpack_puts_them_back():
    frames = valid_frames(MASK)
    padded = torch.arange(1.0, 33.0).view(4, 4, 2)
    assert frames.are_packed and frames.lengths == [2, 0, 4, 1]
    assert torch.equal(frames.pack(padded), padded[MASK])
    assert torch.equal(frames.unpack(frames.pack(padded)), padded * MASK[..., None])


def test_unpacked_batches_have_their_padding_cleared():
    frames = ValidFrames(MASK)
    padded = torch.arange(1.0, 33.0).view(4, 4, 2)
    assert not frames.are_packed and frames.pack(padded) is padded
    assert torch.equal(frames.unpack(padded), padded * MASK[..., None])


def test_gradients_go_through():
    frames = valid_frames(MASK)
    padded = torch.randn(4, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: frames.unpack(frames.pack(x) ** 2), padded)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([20, 20], None), ([20, 19], True), ([0, 7], True), ([0, 0], False)],
    ids=["no padding", "little", "an empty one", "nothing else"],
)
def test_when_batches_are_packed(lengths, expected):
    frames = valid_frames(torch.arange(20) < torch.tensor(lengths)[:, None])
    assert (frames and frames.are_packed) is expected
    assert valid_frames(None) is None


@pytest.mark.parametrize("changes", [{}, {"feat_extract_activation": "gelu_new"}, {"conv_bias": True}], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_is_padded(as_on_gpus, changes, implementation):
    results = []
    for is_second in (False, True):
        if is_second:
            as_on_gpus()
        torch.manual_seed(0)
        model = randomize(DinoSRModel(tiny_config(**NO_DROPOUT, **changes))).train()
        model.set_attn_implementation(implementation)
        output = model(*batch(), output_hidden_states=True)
        output.last_hidden_state.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((output, gradients))
    (packed, packed_gradients), (padded, padded_gradients) = results
    torch.testing.assert_close(packed.extract_features, padded.extract_features, **SAME_ARITHMETIC)
    # Of the first layer's input, padding is not cleared.
    for ours, plain in zip(packed.hidden_states[1:], padded.hidden_states[1:], strict=True):
        torch.testing.assert_close(ours, plain, **SAME_ARITHMETIC)
    assert packed_gradients.keys() == padded_gradients.keys()
    for name, gradient in packed_gradients.items():
        torch.testing.assert_close(gradient, padded_gradients[name], **GRADIENTS)


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "as on GPUs"])
def test_padding_comes_out_as_zeros(as_on_gpus, is_packed):
    if not is_packed:
        as_on_gpus()
    model = randomize(DinoSRModel(tiny_config())).eval()
    waveforms, mask = batch()
    output = model(waveforms, mask, output_hidden_states=True)
    frames = torch.arange(output.last_hidden_state.shape[1]) < model.config.num_frames(mask.sum(1))[:, None]
    for states in output.hidden_states[1:]:
        assert not states[~frames].any() and states[frames].all()


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_units_and_features_are_the_same(as_on_gpus, source):
    model = randomize(DinoSRForPreTraining(tiny_config())).eval()
    found = []
    for is_second in (False, True):
        if is_second:
            as_on_gpus()
        layers = model.config.codebook_layers
        codes, lengths = model.encode_units(*batch(), layers=layers, source=source)
        found.append((codes, lengths, model.layer_features(*batch(), layers=layers, source=source)))
    for packed, padded in zip(*found, strict=True):
        torch.testing.assert_close(packed, padded, **SAME_ARITHMETIC)


def operations(model, mask):
    waveforms, _ = batch()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(waveforms, mask)
    return counter.get_total_flops()


def test_of_padding_nothing_is_computed():
    model = DinoSRForCTC(tiny_config()).eval()
    mask = (torch.arange(700) < torch.tensor([700, 90, 90])[:, None]).long()
    assert operations(model, mask) < 0.6 * operations(model, None)
    reference = DinoSRForCTC(tiny_config(reference_padding=True)).eval()
    assert operations(reference, mask) == operations(reference, None)  # there padding has a part in the result
