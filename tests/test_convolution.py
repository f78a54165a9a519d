"""The folded batch of convolution_dinosr against torch's own convolutions: outputs, gradients, precisions."""

import pytest
import torch
from torch import nn

from dinosr_hf.convolution_dinosr import fold, frames_to_fold, strided_conv, unfold
from dinosr_hf.encoder_dinosr import DinoSRFeatureEncoder
from tiny import tiny_config, waveforms

GEOMETRIES = {
    "base": ([10, 3, 3, 3, 3, 2, 2], [5, 2, 2, 2, 2, 2, 2]),
    "tiny_cpu": ([20, 8, 4, 4, 4], [10, 4, 2, 2, 2]),
    "several_further_products": ([7, 8, 5], [2, 3, 1]),
    "kernel_below_stride": ([3, 2, 1], [5, 3, 2]),
    "field_of_many_frames": ([9, 9, 9], [1, 2, 1]),
}


def encoders(geometry, **changes):
    kernels, strides = GEOMETRIES[geometry]
    config = tiny_config(conv_dim=[6] * (len(kernels) - 1) + [9], conv_kernel=kernels, conv_stride=strides, **changes)
    torch.manual_seed(0)
    return DinoSRFeatureEncoder(config).double(), config


def usual(encoder, input_values):
    """The same layers in the form that wav2vec 2.0 has them, one utterance at a time."""
    outputs = []
    for waveform in input_values:
        signal = waveform[None, None]
        for layer in encoder.conv_layers:
            signal = layer.conv(signal)
            signal = layer.activation(layer.layer_norm(signal.transpose(1, 2)).transpose(1, 2))
        outputs.append(signal)
    return torch.cat(outputs)


def with_gradients(function, encoder, input_values):
    input_values = input_values.clone().requires_grad_()
    output = function(encoder, input_values)
    weights = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((output * weights).sum(), [input_values, *encoder.parameters()])
    return output, gradients


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("extra", [0, 1, 37])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_outputs_and_gradients_are_torch_s(geometry, extra, bias):
    encoder, config = encoders(geometry, conv_bias=bias)
    samples = config.receptive_field + 3 * config.inputs_to_logits_ratio + extra
    input_values = waveforms(3, samples).double()
    mine, my_gradients = with_gradients(DinoSRFeatureEncoder.__call__, encoder, input_values)
    theirs, their_gradients = with_gradients(usual, encoder, input_values)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(my_gradients, their_gradients)


def test_one_frame_of_one_utterance():
    for geometry in GEOMETRIES:
        encoder, config = encoders(geometry)
        input_values = waveforms(1, config.receptive_field).double()
        torch.testing.assert_close(encoder(input_values), usual(encoder, input_values))


def test_an_utterance_of_nan_stays_alone():
    encoder, _ = encoders("base")
    input_values = waveforms(3, 2000).double()
    input_values[1] = torch.nan
    output = encoder(input_values)
    assert output[1].isnan().all()
    torch.testing.assert_close(output[[0, 2]], usual(encoder, input_values[[0, 2]]))


def test_gradients_against_differences():
    conv = nn.Conv1d(3, 4, kernel_size=5, stride=2).double()
    signal = torch.randn(12, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda signal, weight, bias: torch.func.functional_call(
            _Strided(conv), {"conv.weight": weight, "conv.bias": bias}, (signal,)
        ),
        (signal, conv.weight, conv.bias),
    )


class _Strided(nn.Module):
    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, signal):
        return strided_conv(self.conv, signal)


def test_frozen_weights_get_no_gradient_and_pass_it_on():
    conv = nn.Conv1d(3, 4, kernel_size=5, stride=2)
    conv.weight.requires_grad_(False)
    signal = torch.randn(12, 3, requires_grad=True)
    strided_conv(conv, signal).sum().backward()
    assert conv.weight.grad is None and conv.bias.grad is not None
    assert signal.grad.abs().sum() > 0


@pytest.mark.parametrize("channels", [1, 3])
def test_autocast_decides_the_precision(channels):
    conv = nn.Conv1d(channels, 4, kernel_size=5, stride=2)
    signal = torch.randn(12, channels)
    with torch.autocast("cpu", torch.bfloat16):
        low = strided_conv(conv, signal)
    assert low.dtype == torch.bfloat16
    low.float().sum().backward()
    assert conv.weight.grad.dtype == torch.float32
    torch.testing.assert_close(low.float(), strided_conv(conv, signal), atol=0.03, rtol=0.03)


def test_a_batch_that_is_not_folded_goes_the_usual_way():
    conv = nn.Conv1d(3, 4, kernel_size=5, stride=2)
    signal = torch.randn(2, 12, 3)
    assert torch.equal(strided_conv(conv, signal), conv(signal.transpose(1, 2)).transpose(1, 2))


def test_folding():
    assert frames_to_fold(49, receptive_field=400, hop=320) == 50
    assert frames_to_fold(49, receptive_field=320, hop=320) == 49
    assert frames_to_fold(49, receptive_field=200, hop=320) == 49
    assert frames_to_fold(49, receptive_field=641, hop=320) == 51
    waves = torch.arange(1.0, 11.0).view(2, 5)
    assert fold(waves, 6).flatten().tolist() == [1, 2, 3, 4, 5, 0, 6, 7, 8, 9, 10, 0]
    assert fold(waves, 3).flatten().tolist() == [1, 2, 3, 6, 7, 8]
    assert unfold(torch.arange(6.0)[:, None], batch=2, num_frames=2).squeeze(-1).tolist() == [[0, 1], [3, 4]]
