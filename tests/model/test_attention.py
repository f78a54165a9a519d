"""Attention of one utterance after the other against attention written out: outputs, gradients, dropout."""

import pytest
import torch

from dinosr_hf import DinoSRModel
from dinosr_hf.model.fast_cpu_dinosr import attend_by_utterance
from dinosr_hf.model.modeling_dinosr import eager_attention_forward
from tiny import tiny_config
from tolerances import SAME_ARITHMETIC

LENGTHS = [5, 0, 1, 9]
SCALING = 0.37


def frames(dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    return [torch.randn(sum(LENGTHS), 3, 4, dtype=dtype, **kwargs) for _ in range(3)]


def written_out(query, key, value, dropout):
    """Each utterance by itself, as a batch of one."""
    module = torch.nn.Identity().train()
    utterances = zip(*(one.split(LENGTHS) for one in (query, key, value)), strict=True)
    return torch.cat(
        [
            eager_attention_forward(module, *(u.transpose(0, 1)[None] for u in each), None, SCALING, dropout)[0][0]
            for each in utterances
        ]
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3, 1.0])
def test_it_is_attention_written_out(dropout):
    results = []
    for form in (
        lambda *qkv: attend_by_utterance(*qkv, LENGTHS, SCALING, dropout),
        lambda *qkv: written_out(*qkv, dropout),
    ):
        inputs = frames(requires_grad=True)
        torch.manual_seed(1)
        output = form(*inputs)
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        results.append((output, *torch.autograd.grad((output * weights).sum(), inputs)))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)
    if dropout == 0.3:  # or it would be compared with itself without dropout
        assert (results[0][0] - attend_by_utterance(*frames(), LENGTHS, SCALING)).abs().max() > 0.1


def test_gradient_with_dropout_is_a_gradient():
    def attend(*qkv):
        torch.manual_seed(2)
        return attend_by_utterance(*qkv, LENGTHS, SCALING, 0.4)

    assert torch.autograd.gradcheck(attend, [value[:, :2, :2].detach().requires_grad_() for value in frames()])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_no_utterance_sees_another(dropout):
    outputs = []
    for change in (0.0, 3.0):
        query, key, value = frames()
        key[: LENGTHS[0]] += change
        value[: LENGTHS[0]] += change
        torch.manual_seed(3)
        outputs.append(attend_by_utterance(query, key, value, LENGTHS, SCALING, dropout))
    assert torch.equal(*(output[LENGTHS[0] :] for output in outputs))
    assert not torch.equal(*(output[: LENGTHS[0]] for output in outputs))


def test_the_mean_over_dropouts_is_attention_without():
    query, key, value = frames()
    torch.manual_seed(4)
    drawn = [attend_by_utterance(query, key, value, LENGTHS, SCALING, 0.2) for _ in range(2000)]
    right = attend_by_utterance(query, key, value, LENGTHS, SCALING)
    torch.testing.assert_close(torch.stack(drawn).mean(0), right, atol=0.08, rtol=0)


def test_low_precision_is_near():
    outputs = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [one.to(torch.bfloat16).to(dtype).requires_grad_() for one in frames()]
        torch.manual_seed(5)
        output = attend_by_utterance(*inputs, LENGTHS, SCALING, 0.3)
        assert output.dtype == dtype
        outputs[dtype] = (output, *torch.autograd.grad(output.sum(), inputs))
    for low, full in zip(outputs[torch.bfloat16], outputs[torch.float32], strict=True):
        torch.testing.assert_close(low.float(), full, atol=0.05, rtol=0.02)


def test_the_model_takes_it_for_sdpa_with_dropout():
    # Eager attention draws its dropout for the batch at once: for one utterance these are the same numbers.
    outputs = {}
    model = DinoSRModel(tiny_config(attention_dropout=0.4, apply_spec_augment=False)).train()
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        torch.manual_seed(6)
        outputs[implementation] = model(torch.randn(1, 600)).last_hidden_state
    torch.testing.assert_close(outputs["sdpa"], outputs["eager"], **SAME_ARITHMETIC)
