"""Padded batches without their padding: the same numbers as with it, and less work."""

import pytest
import torch

from dinosr_hf import DinoSRForCTC, DinoSRForPreTraining, DinoSRModel, set_fast_cpu
from dinosr_hf.model.fast_cpu_dinosr import ValidFrames
from scripts import load_script
from tiny import NO_DROPOUT, randomize, tiny_config
from tolerances import SAME_ARITHMETIC

MASK = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()


def batch():
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(700) < torch.tensor([700, 180, 333])[:, None]).long()
    return torch.randn(3, 700, generator=generator) * mask, mask


@pytest.fixture
def switch_off():
    """A function that switches the fast forms off for the rest of the test."""
    yield lambda: set_fast_cpu(False)
    set_fast_cpu(True)


def test_pack_takes_the_frames_and_unpack_puts_them_back():
    frames = ValidFrames(MASK, MASK.shape)
    padded = torch.arange(1.0, 33.0).view(4, 4, 2)
    assert frames.has_padding and frames.lengths == [2, 0, 4, 1]
    assert torch.equal(frames.pack(padded), padded[MASK][None])
    assert torch.equal(frames.unpack(frames.pack(padded)), padded * MASK[..., None])


@pytest.mark.parametrize("mask", [None, torch.ones(4, 4, dtype=torch.bool)], ids=["no mask", "all frames"])
def test_a_batch_without_padding_stays_as_it_is(mask):
    frames = ValidFrames(mask, (4, 4))
    padded = torch.randn(4, 4, 2)
    assert not frames.has_padding and frames.lengths == [4] * 4
    assert frames.pack(padded) is padded and frames.unpack(padded) is padded


def test_gradients_go_through():
    frames = ValidFrames(MASK, MASK.shape)
    padded = torch.randn(4, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: frames.unpack(frames.pack(x) ** 2), padded)


@pytest.mark.parametrize("changes", [{}, {"feat_extract_activation": "gelu_new"}, {"conv_bias": True}], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_is_padded(switch_off, changes, implementation):
    results = []
    for is_second in (False, True):
        if is_second:
            switch_off()
        torch.manual_seed(0)
        model = randomize(DinoSRModel(tiny_config(**NO_DROPOUT, **changes))).double().train()
        model.set_attn_implementation(implementation)
        waveforms, mask = batch()
        output = model(waveforms.double(), mask, output_hidden_states=True)
        output.last_hidden_state.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((output, gradients))
    (packed, packed_gradients), (padded, padded_gradients) = results
    torch.testing.assert_close(packed.extract_features, padded.extract_features)
    # The padding of the first layer's input is not cleared.
    for ours, plain in zip(packed.hidden_states[1:], padded.hidden_states[1:], strict=True):
        torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(packed_gradients, padded_gradients)


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "plain"])
def test_padding_comes_out_as_zeros(switch_off, is_packed):
    if not is_packed:
        switch_off()
    model = randomize(DinoSRModel(tiny_config())).eval()
    waveforms, mask = batch()
    output = model(waveforms, mask, output_hidden_states=True)
    frames = torch.arange(output.last_hidden_state.shape[1]) < model.config.num_frames(mask.sum(1))[:, None]
    for states in output.hidden_states[1:]:
        assert not states[~frames].any() and states[frames].all()


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_units_and_features_are_the_same(switch_off, source):
    model = randomize(DinoSRForPreTraining(tiny_config())).eval()
    found = []
    for is_second in (False, True):
        if is_second:
            switch_off()
        layers = model.config.codebook_layers
        codes, lengths = model.encode_units(*batch(), layers=layers, source=source)
        found.append((codes, lengths, model.layer_features(*batch(), layers=layers, source=source)))
    for packed, padded in zip(*found, strict=True):
        torch.testing.assert_close(packed, padded, **SAME_ARITHMETIC)


def operations(model, mask):
    waveforms, _ = batch()
    with load_script("benchmarks/contest.py").CountOperations() as counter, torch.no_grad():
        model(waveforms, mask)
    return counter.total


def test_of_padding_nothing_is_computed():
    model = DinoSRForCTC(tiny_config()).eval()
    mask = (torch.arange(700) < torch.tensor([700, 90, 90])[:, None]).long()
    assert operations(model, mask) < 0.6 * operations(model, None)
    reference = DinoSRForCTC(tiny_config(reference_padding=True)).eval()
    assert operations(reference, mask) == operations(reference, None)  # there padding has a part in the result
