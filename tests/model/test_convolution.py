"""The fast convolutions of CPUs against torch's own: outputs, gradients, precisions."""

import pytest
import torch
from torch import nn

from dinosr_hf.model import fast_cpu_dinosr
from dinosr_hf.model.fast_cpu_dinosr import convolve, convolve_same_length, cut, frames_of_piece
from dinosr_hf.model.modeling_dinosr import DinoSRFeatureEncoder
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


@pytest.fixture(params=[2**25, 1, 20_000], ids=["one_group", "groups_of_a_frame", "groups_of_some"])
def group_bytes(request, monkeypatch):
    monkeypatch.setattr(fast_cpu_dinosr, "_GROUP_BYTES", request.param)
    return request.param


@pytest.mark.usefixtures("group_bytes")
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("extra", [0, 37])
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


def layers(bias=True):
    torch.manual_seed(0)
    config = tiny_config(conv_dim=[3, 4], conv_kernel=[5, 5], conv_stride=[2, 2], conv_bias=bias)
    return DinoSRFeatureEncoder(config).conv_layers


@pytest.mark.parametrize("recompute", [False, True], ids=["remembered", "recomputed"])
def test_gradients_against_differences(recompute):
    modules = layers().double()
    signal = torch.randn(2, 33, dtype=torch.double, requires_grad=True)  # 6 frames, of 13 samples each

    def run(signal, *_):  # the parameters are changed where they are
        return convolve(modules, signal, 6, 13, recompute=recompute, group_bytes=128)

    assert torch.autograd.gradcheck(run, (signal, *modules.parameters()))


def test_recomputing_changes_nothing_and_remembers_less():
    encoder, _ = encoders("base")
    input_values = waveforms(2, 5000).double().requires_grad_()
    found, elements = {}, {"remembered": 0, "recomputed": 0}
    for name in elements:
        for layer in encoder.conv_layers:
            layer.gradient_checkpointing = name == "recomputed"

        def count(tensor, name=name):
            elements[name] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            found[name] = with_gradients(DinoSRFeatureEncoder.__call__, encoder, input_values)
    assert elements["remembered"] > 2 * elements["recomputed"] > 0
    torch.testing.assert_close(found["recomputed"], found["remembered"], rtol=0, atol=0)


@pytest.mark.parametrize("keeps", ["nothing", "norms", "waveforms"])
def test_only_what_is_trained_gets_a_gradient(keeps):
    modules = layers().requires_grad_(False)
    for layer in modules:
        layer.layer_norm.requires_grad_(keeps == "norms")
    signal = torch.randn(2, 33, requires_grad=keeps == "waveforms")
    output = convolve(modules, signal, 6, 13)
    assert output.requires_grad == (keeps != "nothing")
    if output.requires_grad:
        output.square().sum().backward()
    assert (signal.grad is not None) == (keeps == "waveforms")
    for name, parameter in modules.named_parameters():
        assert (parameter.grad is not None) == (keeps == "norms" and "layer_norm" in name)


@pytest.mark.parametrize("group_bytes", [None, 64])
def test_autocast_decides_the_precision(group_bytes):
    modules = layers()
    signal = torch.randn(2, 33)
    with torch.autocast("cpu", torch.bfloat16):
        low = convolve(modules, signal, 6, 13, group_bytes=group_bytes)
    assert low.dtype == torch.float32  # norms and activations
    low.square().sum().backward()
    gradients = {}
    gradients["low"] = [parameter.grad for parameter in modules.parameters()]
    modules.zero_grad()
    exact = convolve(modules, signal, 6, 13, group_bytes=group_bytes)
    exact.square().sum().backward()
    torch.testing.assert_close(low, exact, atol=0.05, rtol=0.05)
    assert not torch.equal(low, exact)
    for low, parameter in zip(gradients["low"], modules.parameters(), strict=True):
        assert low.dtype == torch.float32
        assert (low - parameter.grad).norm() <= 0.05 * parameter.grad.norm()


def test_autocast_of_weights_in_low_precision():
    modules, signal = layers().bfloat16(), torch.randn(2, 33)
    with torch.autocast("cpu", torch.bfloat16):
        low = convolve(modules, signal, 6, 13)
    low.square().sum().backward()
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in modules.parameters())
    torch.testing.assert_close(low, convolve(modules.float(), signal, 6, 13), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("geometry", ["base", "tiny_cpu"])
def test_autocast_is_as_exact_as_in_the_plain_layers(geometry):
    encoder, _ = encoders(geometry)
    encoder, input_values = encoder.float(), waveforms(2, 3000)
    exact = usual(encoder, input_values)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = encoder(input_values), usual(encoder, input_values)
    assert theirs.dtype == torch.bfloat16
    assert 0 < (mine - exact).norm() < 1.5 * (theirs - exact).norm()


def test_another_activation_goes_the_usual_way():
    encoder, _ = encoders("base", feat_extract_activation="relu")
    input_values = waveforms(2, 3000).double()
    torch.testing.assert_close(encoder(input_values), usual(encoder, input_values))


def test_pieces():
    assert frames_of_piece(100, bytes_per_frame=10, limit=1000) == 100
    assert frames_of_piece(101, bytes_per_frame=10, limit=1000) == 51
    assert frames_of_piece(3, bytes_per_frame=10, limit=1) == 1
    waves = torch.arange(1.0, 11.0).view(2, 5)
    assert cut(waves, 2, piece_frames=2, hop=2, receptive_field=3).tolist() == [
        [1, 2, 3, 4, 5, 0],
        [6, 7, 8, 9, 10, 0],
    ]
    assert cut(waves, 2, piece_frames=1, hop=2, receptive_field=3).tolist() == [
        *([1, 2, 3, 4], [3, 4, 5, 0]),
        *([6, 7, 8, 9], [8, 9, 10, 0]),
    ]
    assert cut(waves, 1, piece_frames=1, hop=3, receptive_field=3).tolist() == [[1, 2, 3], [6, 7, 8]]


@pytest.mark.parametrize("kernel", [4, 5])
def test_a_convolution_that_keeps_the_length(kernel):
    conv = nn.Conv1d(4, 6, kernel, padding=kernel // 2, groups=2)
    signal = torch.randn(2, 7, 4, requires_grad=True)
    mine = convolve_same_length(conv, signal)
    theirs = conv(signal.transpose(1, 2))[..., :7].transpose(1, 2)
    torch.testing.assert_close(mine, theirs)
    weights = torch.randn(theirs.shape)
    leaves = [signal, *conv.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad((mine * weights).sum(), leaves), torch.autograd.grad((theirs * weights).sum(), leaves)
    )
