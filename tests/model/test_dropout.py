"""Dropout by 16 random bits an element: how much, how random, and that its gradient is its own."""

import pytest
import torch

from dinosr_hf.model.modeling_dinosr import DinoSRDropout, apply_dropout


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_share_and_scale(share):
    torch.manual_seed(0)
    dropped = apply_dropout(torch.ones(1000, 1001), share)
    deviation = (share * (1 - share) / dropped.numel()) ** 0.5
    assert abs((dropped == 0).float().mean().item() - share) < 4 * deviation
    torch.testing.assert_close(dropped[dropped != 0].unique(), torch.tensor([1 / (1 - share)]), rtol=1e-3, atol=0)


def test_neighbours_and_lanes_are_independent():
    torch.manual_seed(1)
    kept = (apply_dropout(torch.ones(4_000_000), 0.5) != 0).float().view(-1, 4)
    assert (kept.mean(0) - 0.5).abs().max() < 0.003  # each quarter of a random number
    assert (kept.T.corrcoef() - torch.eye(4)).abs().max() < 0.005
    assert abs(torch.stack((kept[:-1, 3], kept[1:, 0])).corrcoef()[0, 1]) < 0.005


@pytest.mark.parametrize("shape", [(7,), (3, 5, 2), (0, 4), ()])
def test_gradient_is_that_of_the_output(shape):
    signal = torch.rand(shape, dtype=torch.float64).add(1).requires_grad_()
    dropped = apply_dropout(signal, 0.4)
    assert dropped.shape == signal.shape and dropped.dtype == signal.dtype
    (gradient,) = torch.autograd.grad(dropped.sum(), signal)
    torch.testing.assert_close(gradient * signal, dropped)


def test_the_seed_decides():
    signal = torch.ones(1000)
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(apply_dropout(signal, 0.3))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_nothing_and_all():
    signal = torch.ones(5)
    assert apply_dropout(signal, 0.0) is signal
    assert not apply_dropout(signal, 1.0).any()
    assert DinoSRDropout(0.5).eval()(signal) is signal
    assert DinoSRDropout(1.0).train()(signal).sum() == 0
