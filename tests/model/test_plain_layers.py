"""
Layers do what their `forward` says: hooks fire, wrapped and replaced layers are used, gradients have gradients.

Each test also runs, where they apply, the fast forms of `fast_cpu_dinosr`, which must give the same numbers.
"""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations

import dinosr_hf
from dinosr_hf import DinoSRForCTC, DinoSRForPreTraining, DinoSRModel, set_fast_cpu
from dinosr_hf.model import fast_cpu_dinosr
from dinosr_hf.model.fast_cpu_dinosr import attend_by_utterance, may_use_fast_forms
from dinosr_hf.model.modeling_dinosr import DinoSRFeatureEncoder
from tiny import deterministic_config, padded, randomize, tiny_config, waveforms

LABELS = torch.tensor([[3, 4, 5], [1, 2, -100]])


@pytest.fixture(autouse=True)
def fast_forms_on():
    yield
    set_fast_cpu(True)


@pytest.fixture
def fast_calls(monkeypatch):
    """How often the fast convolutions have run."""
    calls = []
    convolve = dinosr_hf.modeling_dinosr.convolve
    monkeypatch.setattr(
        dinosr_hf.modeling_dinosr, "convolve", lambda *args, **kwargs: calls.append(1) or convolve(*args, **kwargs)
    )
    return calls


def build(kind=DinoSRModel, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return randomize(kind(deterministic_config(**changes))).to(dtype)


def batch(is_padded, dtype=torch.float64):
    if not is_padded:
        return waveforms(2, 700).to(dtype), None
    values, mask = padded([waveforms(1, 700)[0], waveforms(1, 444, seed=1)[0]])
    return values.to(dtype), mask


def output_and_gradients(model, values, mask):
    """The model's last layer, and the gradient of each trained parameter."""
    output = model(values, mask).last_hidden_state
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    found = torch.autograd.grad((output * weights).sum(), list(trained.values()), allow_unused=True)
    return output, dict(zip(trained, found, strict=True))


def both_ways(function):
    """What a function gives with the fast forms and without them."""
    results = []
    for enabled in (True, False):
        set_fast_cpu(enabled)
        results.append(function())
    set_fast_cpu(True)
    return results


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("is_training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", [DinoSRModel, DinoSRForCTC, DinoSRForPreTraining], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("hook", ["forward", "pre"])
def test_hooks_fire_on_every_layer(kind, is_training, is_padded, hook):
    model = build(kind).train(is_training)
    fired, layers = set(), {}
    for name, layer in model.named_modules():
        if not list(layer.children()) and not name.startswith("codebooks"):
            layers[name] = layer
    values, mask = batch(is_padded)
    extra = {"mask_time_indices": torch.ones(2, 34, dtype=torch.bool)} if kind is DinoSRForPreTraining else {}
    before = model(values, mask, **extra)
    for name, layer in layers.items():
        register = layer.register_forward_hook if hook == "forward" else layer.register_forward_pre_hook
        register(lambda *_, name=name: fired.add(name))
    after = model(values, mask, **extra)
    assert fired == layers.keys() and len(layers) > 40
    torch.testing.assert_close(after[0], before[0])  # the plain layers give what the fast forms gave


def test_a_hook_that_changes_an_output_is_heeded():
    model = build().eval()
    values, mask = batch(True)
    before = model(values, mask).last_hidden_state
    handle = model.feature_extractor.conv_layers[1].activation.register_forward_hook(lambda *call: call[-1].square())
    assert (model(values, mask).last_hidden_state - before).abs().max() > 0.01
    handle.remove()
    assert torch.equal(model(values, mask).last_hidden_state, before)


def test_global_hooks_fire():
    seen = set()
    model = build().eval()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        model(*batch(True))
    finally:
        handle.remove()
    assert {layer for layer in model.modules() if not isinstance(layer, nn.ModuleList)} <= seen


def test_gathering_hidden_states_leaves_the_fast_forms_on(fast_calls):
    model = build().eval()
    model(*batch(True), output_hidden_states=True)  # transformers leaves its hooks on the layers
    model(*batch(True))
    assert len(fast_calls) == 2
    assert may_use_fast_forms(torch.zeros(1), model.encoder)


class Wrapper(nn.Module):
    """A layer of another type that calls the one it replaces, and bends its output by a weight of its own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.bend = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, *args, **kwargs):
        output = self.layer(*args, **kwargs)
        return output + self.bend * output.square()


REPLACED = {
    "convolution": "feature_extractor.conv_layers.1.conv",
    "first_convolution": "feature_extractor.conv_layers.0.conv",
    "convolution_norm": "feature_extractor.conv_layers.0.layer_norm",
    "convolution_activation": "feature_extractor.conv_layers.2.activation",
    "convolution_layer": "feature_extractor.conv_layers.0",
    "projection": "feature_projection.projection",
    "positional_convolution": "encoder.pos_conv_embed.layers.1.conv",
    "positional_norm": "encoder.pos_conv_embed.layers.0.layer_norm",
    "query": "encoder.layers.1.attention.q_proj",
    "feed_forward": "encoder.layers.0.feed_forward.output_dense",
}


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", REPLACED.values(), ids=REPLACED)
def test_a_wrapped_layer_is_used_and_gets_a_gradient(name, is_padded):
    model = build().train()
    values, mask = batch(is_padded)
    before = model(values, mask).last_hidden_state
    model.set_submodule(name, Wrapper(model.get_submodule(name)))
    after, gradients = output_and_gradients(model, values, mask)
    assert (after - before).abs().max() > 1e-3
    assert gradients[f"{name}.bend"].abs() > 0
    model.get_submodule(name).bend.data.zero_()
    torch.testing.assert_close(model(values, mask).last_hidden_state, before)


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_lora_in_checkpointed_layers_is_trained(is_reentrant):
    values, mask = batch(True)
    adapted = get_peft_model(build().train(), LoraConfig(target_modules=["q_proj", "v_proj"], r=2)).double()
    adapted.enable_input_require_grads()  # as PEFT and `Trainer` do
    adapted.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
    adapted(values, mask).last_hidden_state.sum().backward()
    names = [name for name, parameter in adapted.named_parameters() if "lora_B" in name]
    assert names and all(adapted.get_parameter(name).grad.abs().max() > 0 for name in names)
    adapted.base_model.model.disable_input_require_grads()


LORA = {
    "convolutions": (r".*conv_layers\.\d\.conv", {}),
    "positional_convolutions": (r".*pos_conv_embed\.layers\.\d\.conv", {"r": 4}),
    "linear": (r".*(q_proj|v_proj|output_dense|\.projection)", {}),
}


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(("targets", "options"), LORA.values(), ids=LORA)
def test_lora_is_used_and_trained(targets, options, is_padded):
    model = build().eval()
    values, mask = batch(is_padded)
    before = model(values, mask).last_hidden_state
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, **{"r": 2, **options})).double()
    torch.testing.assert_close(adapted(values, mask).last_hidden_state, before)  # a new adapter adds nothing
    output, gradients = output_and_gradients(adapted, values, mask)
    assert gradients and all("lora_" in name for name in gradients)
    assert all(gradient.abs().max() > 0 for name, gradient in gradients.items() if "lora_B" in name)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    assert (adapted(values, mask).last_hidden_state - output).abs().max() > 1e-3
    if "pos_conv" in targets:  # which peft does not merge, for their groups
        return
    merged = copy.deepcopy(adapted).merge_and_unload()
    torch.testing.assert_close(merged(values, mask).last_hidden_state, adapted(values, mask).last_hidden_state)


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
def test_weight_norm_is_used(is_padded, fast_calls):
    model = build().train()
    values, mask = batch(is_padded)
    before = model(values, mask).last_hidden_state
    for layer in model.feature_extractor.conv_layers:
        parametrizations.weight_norm(layer.conv)
    parametrizations.weight_norm(model.encoder.pos_conv_embed.layers[0].conv)
    fast_calls.clear()
    after, gradients = output_and_gradients(model, values, mask)
    assert not fast_calls
    torch.testing.assert_close(after, before)
    assert all(gradient is not None for name, gradient in gradients.items() if "original" in name)
    assert sum("conv.parametrizations" in name for name in gradients) == 8


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
def test_dynamic_quantisation_is_used(is_padded):
    model = build(DinoSRForCTC, torch.float32).eval()
    values, mask = batch(is_padded, torch.float32)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert "DynamicQuantizedLinear" in repr(quantised)
    with torch.no_grad():
        exact, near = model(values, mask).logits, quantised(values, mask).logits
    assert not torch.equal(exact, near)
    torch.testing.assert_close(near, exact, atol=0.2, rtol=0.1)


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_a_gradient_has_a_gradient(is_padded, recompute):
    model = build().train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    values, mask = batch(is_padded)
    values.requires_grad_()
    parameters = [parameter for name, parameter in model.named_parameters() if "masked_spec" not in name]

    def twice():
        output = model(values, mask).last_hidden_state
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        first = torch.autograd.grad((output * weights).sum(), [values, *parameters], create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        return first, torch.autograd.grad(penalty, [values, *parameters], allow_unused=True)

    fast_first, fast_second = twice()
    set_fast_cpu(False)
    model.set_attn_implementation("eager")  # torch's sdpa has no second derivative on a CPU
    plain_first, plain_second = twice()
    torch.testing.assert_close(fast_first, plain_first)
    torch.testing.assert_close(fast_second, plain_second, rtol=1e-6, atol=1e-7)
    assert sum(gradient is not None for gradient in fast_second) > len(parameters) // 2


def test_dropout_attention_has_a_second_gradient():
    def attend(*qkv):
        torch.manual_seed(2)
        return attend_by_utterance(*qkv, [5, 0, 1, 4], 0.37, 0.4)

    inputs = [torch.randn(10, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradgradcheck(attend, inputs)


def test_fast_convolutions_have_a_second_gradient():
    config = tiny_config(conv_dim=[3, 2], conv_kernel=[5, 4], conv_stride=[2, 2], conv_bias=True)
    layers = DinoSRFeatureEncoder(config).conv_layers.double()
    signal = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)

    def convolve(signal, *_):  # the parameters are changed where they are
        return fast_cpu_dinosr.convolve(layers, signal, 5, 11, group_bytes=128)

    assert torch.autograd.gradgradcheck(convolve, (signal, *layers.parameters()))


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("kind", [DinoSRModel, DinoSRForCTC], ids=lambda kind: kind.__name__)
def test_torch_func(kind, is_padded):
    model = build(kind).train()
    values, mask = batch(is_padded)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    extra = {"labels": LABELS} if kind is DinoSRForCTC else {}

    def loss(parameters):
        output = torch.func.functional_call(model, parameters, (values, mask), extra)
        return output.loss if extra else output.last_hidden_state.square().sum()

    expected_loss = model(values, mask, **extra)
    expected_loss = expected_loss.loss if extra else expected_loss.last_hidden_state.square().sum()
    expected_loss.backward()
    found, value = torch.func.grad_and_value(loss)(parameters)
    torch.testing.assert_close(value, expected_loss.detach())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad)
    # functional_call by itself reads the given parameters, also in the fast forms
    doubled = {name: 2 * parameter for name, parameter in parameters.items()}
    assert loss(doubled) != loss(parameters)
    torch.testing.assert_close(*both_ways(lambda: loss(doubled)))


def test_forward_derivatives():
    model = build().eval()
    values, _ = batch(False)

    def encode(values):
        return model(values).last_hidden_state

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, by_transform = torch.func.jvp(encode, (values,), (torch.ones_like(values),))
    step = 1e-6
    difference = (encode(values + step) - encode(values - step)) / (2 * step)
    torch.testing.assert_close(by_transform, difference, rtol=1e-4, atol=1e-6)


def test_samples_of_a_batch_by_vmap():
    model = build().eval()
    values = waveforms(3, 500).double()
    one_by_one = torch.func.vmap(lambda wave: model(wave[None]).last_hidden_state[0])(values)
    torch.testing.assert_close(one_by_one, model(values).last_hidden_state)


@pytest.mark.parametrize("is_training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("changes", [{}, {"conv_bias": True}, {"conv_pos_kernel_size": 4}], ids=str)
def test_fast_and_plain_agree(changes, is_padded, is_training, fast_calls):
    model = build(**changes).train(is_training)
    values, mask = batch(is_padded)
    (fast, fast_gradients), (plain, plain_gradients) = both_ways(lambda: output_and_gradients(model, values, mask))
    assert len(fast_calls) == 1  # or plain layers would be compared with themselves
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(fast_gradients, plain_gradients)
    assert not torch.equal(fast, plain)


@pytest.mark.parametrize(
    ("changes", "is_fast"),
    [({}, True), ({"feat_extract_activation": "gelu_new"}, False), ({"feat_extract_activation": "relu"}, False)],
    ids=["gelu", "gelu_new", "relu"],
)
def test_fast_convolutions_are_for_exact_gelu(changes, is_fast, fast_calls):
    model = build(**changes).eval()
    values, mask = batch(True)
    torch.testing.assert_close(*both_ways(lambda: model(values, mask).last_hidden_state))
    assert len(fast_calls) == is_fast


def test_the_switch_says_what_it_was(fast_calls):
    model = build().eval()
    assert set_fast_cpu(False) is True
    model(*batch(False))
    assert set_fast_cpu(True) is False and not fast_calls
    model(*batch(False))
    assert len(fast_calls) == 1


def test_layers_with_a_forward_of_their_own_are_plain():
    model = build().eval()
    conv = model.feature_extractor.conv_layers[0].conv
    values, _ = batch(False)
    before = model(values).last_hidden_state
    forward = conv.forward
    conv.forward = lambda signal: forward(signal).square()  # as accelerate's offloading does it
    assert (model(values).last_hidden_state - before).abs().max() > 1e-3


def test_low_precision_models_take_float32_waveforms():
    model = build(dtype=torch.bfloat16).eval()
    values, mask = batch(True, torch.float32)
    fast, plain = both_ways(lambda: model(values, mask).last_hidden_state)
    assert fast.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(fast, plain, atol=0.2, rtol=0.1)


def test_dropout_differs_in_its_random_numbers_alone():
    model = DinoSRModel(tiny_config(hidden_dropout=0.5, apply_spec_augment=False)).train()
    values, mask = batch(False, torch.float32)
    means = []
    for enabled in (True, False):
        set_fast_cpu(enabled)
        torch.manual_seed(0)
        means.append(torch.stack([model(values, mask).last_hidden_state for _ in range(100)]).mean(0).detach())
    assert (means[0] - means[1]).abs().mean() < 0.15 < means[0].abs().mean()
